"""What a key service refuses over its socket: every row costs nobody anything, is recorded, and is counted."""

from __future__ import annotations

import pytest

from tests.refusals.conftest import Services
from tests.refusals.rows_claims import AFTER, BEFORE, FIELDS
from tests.refusals.rows_delegation import ALTERED
from tests.refusals.rows_delegation import FIELDS as DELEGATION_FIELDS
from tests.refusals.rows_freshness import FRESHNESS
from tests.refusals.rows_messages import BEAT_FIELDS, BEATS, WATCH_FIELDS, WATCHES
from tests.refusals.rows_quote import CHAIN, QUOTE_V3
from tests.refusals.sections import SECTIONS
from tests.refusals.table import Case, Section

ROWS = [
    pytest.param(section, case, id=case.name)
    for section in SECTIONS
    if section.stage == "service"
    for case in section.cases
]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("section", "case"), ROWS)
async def test_is_refused(services: Services, section: Section, case: Case) -> None:
    service = await services(section, case)
    await service.judge(case, own=section.own)


@pytest.mark.asyncio(loop_scope="module")
async def test_the_last_heartbeat_captured_and_repeated_gets_the_same_answer_and_costs_nothing(
    services: Services,
) -> None:
    service = await services(FRESHNESS, FRESHNESS.cases[0])
    scene = service.scene(own=False)
    captured = scene.heartbeat(await scene.lease(), fed=50)
    answer = await scene.renewed(captured)
    spent, length = service.spent(), service.audit.length()
    for stub in (await service.stub("127.0.0.2"), (await scene.replica()).stub):
        assert (await stub.Renew(captured)).renewal == answer.renewal
    assert (service.spent(), service.audit.length()) == (spent, length)


def test_every_field_of_heartbeats_watches_and_delegations_is_altered_after_signing() -> None:
    assert (BEATS.keys(), WATCHES.keys(), ALTERED.keys()) == (BEAT_FIELDS, WATCH_FIELDS, DELEGATION_FIELDS)


def test_every_field_of_the_claims_is_altered_before_and_after_quoting() -> None:
    assert AFTER.keys() == BEFORE.keys() == FIELDS


def test_every_byte_before_the_certificates_of_a_quote_belongs_to_a_field_that_is_altered() -> None:
    assert CHAIN == 1052
    assert sum(field.size for field in QUOTE_V3) == CHAIN
    assert next(field.offset for field in QUOTE_V3 if field.name == "MRENCLAVE") == 112
    assert next(field.offset for field in QUOTE_V3 if field.name == "QE report REPORTDATA") == 564 + 320
