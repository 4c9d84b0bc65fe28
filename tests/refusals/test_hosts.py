"""What the host policy refuses of TDX hosts; a genuine host is accepted right afterwards."""

from __future__ import annotations

import pytest

from stip_protocol.errors import StipError
from stip_stack.tee import SimulatedPlatform
from tests.keyservice.conftest import START
from tests.refusals.forge import Forge
from tests.refusals.rows_host import CHAIN, QUOTE_V4, RTMRS, HostScene
from tests.refusals.sections import cases_of
from tests.refusals.table import Case


@pytest.mark.parametrize("case", cases_of("host"))
async def test_is_refused(platform: SimulatedPlatform, forge: Forge, case: Case) -> None:
    scene = HostScene(platform, forge, START)
    act = await case.arrange(scene)
    with pytest.raises(StipError) as refused:
        await act()
    assert refused.value.code == case.code, refused.value.message
    assert case.says in refused.value.message
    assert (await scene.verifying(scene.evidence())()).rtmrs == RTMRS


def test_every_byte_before_the_certificates_of_a_quote_belongs_to_a_field_that_is_altered() -> None:
    assert CHAIN == 1258
    assert next(field.offset for field in QUOTE_V4 if field.name == "REPORTDATA") == 568
