"""The whole table, in the order of `docs/refusals.md`."""

from __future__ import annotations

from typing import Any

import pytest

from tests.refusals import rows_collateral as collateral
from tests.refusals import rows_freshness as freshness
from tests.refusals import rows_messages as messages
from tests.refusals import rows_process as process
from tests.refusals import rows_revocation as revocation
from tests.refusals.rows_budget import BUDGETS
from tests.refusals.rows_claims import CLAIMS
from tests.refusals.rows_client import ANSWERS, CERTIFICATES
from tests.refusals.rows_delegation import DELEGATIONS
from tests.refusals.rows_enclave import ENCLAVES
from tests.refusals.rows_host import HOST_QUOTES, HOSTS
from tests.refusals.rows_quote import FORMS, QUOTES
from tests.refusals.table import Section, Stage

SECTIONS: tuple[Section, ...] = (
    CLAIMS,
    QUOTES,
    FORMS,
    collateral.SIGNERS,
    collateral.DATES,
    collateral.REVOKED,
    collateral.LEVELS,
    collateral.FORM,
    collateral.OWN,
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
    CERTIFICATES,
    ANSWERS,
    HOST_QUOTES,
    HOSTS,
    process.ENVIRONMENTS,
    process.FILES,
    process.STARTS,
)


def cases_of(stage: Stage) -> list[Any]:
    """The rows of a stage, each under its name, for `pytest.mark.parametrize`."""
    return [pytest.param(case, id=case.name) for one in SECTIONS if one.stage == stage for case in one.cases]
