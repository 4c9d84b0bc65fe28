"""The table `[budgets]`: how much any user may be given, whatever their own budget says.

    [budgets]
    tokens_per_user = 10_000_000    # in all, since the user was registered
    tokens_per_day = 500_000        # a day of UTC

A user's budget (`users budget`) is what an administrator grants; these are the policy's caps on every grant. Tokens are
rows of the residual stream that were debited, in chunks, whether they were used or not.
"""

from __future__ import annotations

from pydantic import Field

from stip_keyservice.service.policy.tables import Rules

CAP_LIMIT = 2**40
"""Tokens: as large as a user's budget can be."""


class Budgets(Rules):
    """Caps on what is debited for one user; None: no cap."""

    tokens_per_user: int | None = Field(default=None, ge=1, le=CAP_LIMIT)
    tokens_per_day: int | None = Field(default=None, ge=1, le=CAP_LIMIT)

    def allowance(self, spent_total: int, spent_today: int) -> int | None:
        """Tokens that may still be debited for a user of whom so many were; None where nothing caps them."""
        caps = ((self.tokens_per_user, spent_total), (self.tokens_per_day, spent_today))
        return min((max(0, cap - spent) for cap, spent in caps if cap is not None), default=None)
