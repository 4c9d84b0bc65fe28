"""The whole table, in the order of `docs/refusals.md`."""

from __future__ import annotations

from tests.refusals import rows_collateral as collateral
from tests.refusals import rows_freshness as freshness
from tests.refusals import rows_messages as messages
from tests.refusals import rows_revocation as revocation
from tests.refusals.rows_budget import BUDGETS
from tests.refusals.rows_claims import CLAIMS
from tests.refusals.rows_delegation import DELEGATIONS
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
    DELEGATIONS,
    BUDGETS,
    revocation.REVOCATIONS,
    revocation.INSTANCES,
    revocation.LEAKS,
    revocation.POLICIES,
    messages.HEARTBEATS,
    messages.MESSAGES,
    messages.RATES,
)
