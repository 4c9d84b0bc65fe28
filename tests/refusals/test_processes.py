"""What commands and processes refuse: real ones, in an environment of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from stip_keyservice.home import Home
from stip_keyservice.service import auditlog
from stip_keyservice.service.auditlog import AuditLog
from stip_keyservice.service.state.store import Store
from stip_protocol.errors import StipError
from stip_stack.tee import SimulatedPlatform
from tests.client.conftest import MEASUREMENT, ScriptedEnclave, client_folder, developer, make_profile, serving_loop
from tests.refusals.rows_process import ProcessScene, production
from tests.refusals.sections import cases_of
from tests.refusals.table import Case

__all__ = ["client_folder", "developer", "make_profile", "serving_loop"]


@pytest.fixture
def client(platform: SimulatedPlatform, serving_loop: Any, make_profile: Callable[..., Path]) -> Iterator[Any]:
    """Starts a simulated enclave; returns the profile of a user in production mode."""
    running: list[ScriptedEnclave] = []

    def profile() -> Path:
        made = ScriptedEnclave(serving_loop, platform.provider(MEASUREMENT), answers=[[]], certificate_provider=None)
        made.start()
        running.append(made)
        rules = {"mode": "production", "simulated_root_sha256": None}
        return make_profile(made.port, policy=rules, mode="production", simulated_root=None)

    yield profile
    for enclave in running:
        enclave.stop()
        assert (enclave.opens, enclave.turns) == ([], [])


@pytest.mark.parametrize("case", cases_of("process"))
async def test_is_refused(
    platform: SimulatedPlatform, client: Any, tmp_path_factory: pytest.TempPathFactory, case: Case
) -> None:
    scene = ProcessScene(tmp_path_factory.mktemp("place"), platform, client)
    act = await case.arrange(scene)
    with pytest.raises(StipError) as refused:
        await act()
    assert refused.value.code == case.code, refused.value.message
    assert case.says in refused.value.message
    if case.event is not None:
        if case.event == "release":
            assert f'stip_refusals_total{{code="{case.code}"}} 1.0' in scene.metrics
        home = Home.open(scene.folder / "home")
        with closing(Store(home.database)) as store:
            entry = AuditLog(store, home.service).latest(1)[0]
            assert (entry.event, entry.code, entry.tokens) == (case.event, case.code, None)
            auditlog.verify(store, home.service.public_key())


def test_the_policy_that_the_others_were_altered_from_loads_and_serves(
    platform: SimulatedPlatform, tmp_path: Path
) -> None:
    scene = ProcessScene(tmp_path, platform, Path)
    scene.write(production())
    scene.command("policy", "check", str(scene.policy), home=False)
    with scene.serving({}) as announced:
        assert announced["event"] == "listening"
