"""The whole table, in the order of `docs/refusals.md`."""

from __future__ import annotations

from tests.refusals import rows_collateral as collateral
from tests.refusals import rows_freshness as freshness
from tests.refusals.rows_claims import CLAIMS
from tests.refusals.rows_enclave import ENCLAVES
from tests.refusals.rows_quote import FORMS, QUOTES
from tests.refusals.table import Section

SECTIONS: tuple[Section, ...] = (
    CLAIMS,
    QUOTES,
    FORMS,
    collateral.SIGNERS,
    collateral.DATES,
    collateral.REVOKED,
    collateral.LEVELS,
    collateral.FORM,
    ENCLAVES,
    freshness.FRESHNESS,
    freshness.CLOCKS,
)
