"""What a key service refuses over its socket: every row costs nobody anything, is recorded, and is counted."""

from __future__ import annotations

import pytest

from tests.refusals.conftest import Services
from tests.refusals.rows_claims import AFTER, BEFORE, FIELDS
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


def test_every_field_of_the_claims_is_altered_before_and_after_quoting() -> None:
    assert AFTER.keys() == BEFORE.keys() == FIELDS


def test_every_byte_before_the_certificates_of_a_quote_belongs_to_a_field_that_is_altered() -> None:
    assert CHAIN == 1052
    assert sum(field.size for field in QUOTE_V3) == CHAIN
    assert next(field.offset for field in QUOTE_V3 if field.name == "MRENCLAVE") == 112
    assert next(field.offset for field in QUOTE_V3 if field.name == "QE report REPORTDATA") == 564 + 320
