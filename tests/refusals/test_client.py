"""What a client refuses before it says anything; a genuine enclave is verified right afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stip_protocol.attestation import ratls
from stip_protocol.errors import StipError
from stip_stack.tee import SimulatedPlatform
from tests.client.conftest import (
    ScriptedEnclave,
    client_folder,
    developer,
    make_profile,
    serving_loop,
)
from tests.refusals.rows_client import ClientScene
from tests.refusals.sections import cases_of
from tests.refusals.table import Case

__all__ = ["client_folder", "developer", "make_profile", "serving_loop"]


@pytest.fixture
def enclaves(platform: SimulatedPlatform, serving_loop: Any) -> Iterator[tuple[list[ScriptedEnclave], Any]]:
    """The enclaves that were started, and what starts one."""
    running: list[ScriptedEnclave] = []

    def start(*, identity: ratls.Identity | None = None, provider: Any = None, certificate_provider: Any = None) -> Any:
        genuine = platform.provider(bytes(range(32)))
        made = ScriptedEnclave(
            serving_loop, provider or genuine, answers=[[]], certificate_provider=certificate_provider
        )
        made.identity = identity or made.identity
        made.start()
        running.append(made)
        return made

    yield running, start
    for enclave in running:
        enclave.stop()


@pytest.mark.parametrize("case", cases_of("client"))
async def test_is_refused(
    platform: SimulatedPlatform,
    enclaves: tuple[list[ScriptedEnclave], Any],
    make_profile: Callable[..., Path],
    case: Case,
) -> None:
    running, start = enclaves
    scene = ClientScene(platform, int(time.time()), start, make_profile)
    act = await case.arrange(scene)
    with pytest.raises(StipError) as refused:
        await act()
    assert refused.value.code == case.code, refused.value.message
    assert case.says in refused.value.message
    assert [(enclave.opens, enclave.turns) for enclave in running] == [([], [])]
    assert (await scene.connecting(scene.start())()).verified
