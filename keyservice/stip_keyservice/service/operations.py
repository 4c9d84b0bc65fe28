"""What a running key service tells its operators: readiness, gauges of the state, and the housekeeping beside requests.

No user, device, instance or lease is named in any of it.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Callable, Sequence

import structlog
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from stip_keyservice.home import Home
from stip_keyservice.service.issuer import Issuer
from stip_keyservice.service.state.schema import leases, revocations
from stip_keyservice.service.state.store import Store
from stip_protocol.errors import StipError
from stip_protocol.runtime.logs import fault
from stip_protocol.runtime.probes import Check
from stip_protocol.telemetry import (
    COLLATERAL_AGE,
    CONTROL_STREAMS,
    LEASES,
    RATE_LIMITED,
    REVOCATIONS,
    STORE_SECONDS,
    Telemetry,
)

HOUSEKEEPING_SECONDS = 15.0


class Operations:
    """One key service, as its operators see it."""

    def __init__(self, home: Home, store: Store, issuer: Issuer, telemetry: Telemetry) -> None:
        self._home, self._store, self._issuer, self._telemetry = home, store, issuer, telemetry
        store.observe = self._transaction
        self._streams = telemetry.gauge(CONTROL_STREAMS)
        telemetry.gauge(LEASES).set_function(lambda: self._counted(self._leases))
        telemetry.gauge(REVOCATIONS).set_function(lambda: self._counted(self._revocations))
        self._collateral: Callable[[], Sequence[tuple[int, int]]] | None = None

    def watch_collateral(self, shelves: Callable[[], Sequence[tuple[int, int]]]) -> None:
        """`shelves`: (issued, expires) in Unix seconds of the collateral of each platform that is kept."""
        self._collateral = shelves
        self._telemetry.gauge(COLLATERAL_AGE).set_function(lambda: self._counted(self._collateral_age))

    def limited(self, kind: str) -> None:
        """Count what a peer's limit refused."""
        self._telemetry.counter(RATE_LIMITED).labels(kind=kind).inc()

    def streams(self, open_now: int) -> None:
        """Show how many watch streams are open."""
        self._streams.set(open_now)

    def ready(self) -> list[Check]:
        """What must hold for releases and renewals to be decided."""
        checks = [
            Check("root key", self._unsealed),
            Check("store", self._answers),
            Check("policy", self._issuer.outdated),
            Check("clock", lambda: "behind the audit log's last entry" if self._clock_refuses() else None),
        ]
        return [*checks, Check("collateral", self._fresh)] if self._collateral is not None else checks

    async def keep_house(self) -> None:
        """Write what was folded of refusals, now and then, for ever."""
        while True:
            await asyncio.sleep(HOUSEKEEPING_SECONDS)
            try:
                await asyncio.to_thread(self._issuer.write_folded)
            except (StipError, SQLAlchemyError) as error:  # kept, and written the next time
                structlog.get_logger().warning("folded refusals are not written yet", fault=fault(error))

    def _unsealed(self) -> str | None:
        key = secrets.token_bytes(32)
        same = self._home.root.unwrap(self._home.root.wrap(key, b"stip/probe"), b"stip/probe") == key
        return None if same else "the root key does not open what it wrapped"

    def _answers(self) -> str | None:
        with self._store.read() as db:
            db.execute(select(1))
        return None

    def _clock_refuses(self) -> bool:
        if not self._issuer.clock.behind:
            return False
        try:
            self._issuer.clock.require()
        except StipError:
            return True
        return False

    def _fresh(self) -> str | None:
        """Nothing kept is nothing wrong: it is fetched with the first platform that asks."""
        now = time.time()
        kept = self._collateral() if self._collateral is not None else ()
        over = sum(expires <= now for _, expires in kept)
        return f"expired for all {over} platforms kept" if kept and over == len(kept) else None

    def _collateral_age(self) -> float:
        kept = self._collateral() if self._collateral is not None else ()
        return time.time() - min((issued for issued, _ in kept), default=time.time())

    def _transaction(self, kind: str, seconds: float) -> None:
        self._telemetry.histogram(STORE_SECONDS).labels(kind=kind).observe(seconds)

    def _counted(self, count: Callable[[], float]) -> float:
        """Not a number where the state does not answer: a scrape shows the rest all the same."""
        try:
            return float(count())
        except (StipError, SQLAlchemyError):
            return math.nan

    def _leases(self) -> int:
        now = self._issuer.clock.reading()
        with self._store.read() as db:
            query = select(func.count()).where(leases.c.expires > now, leases.c.revoked.is_(None))
            return int(db.execute(query).scalar_one())

    def _revocations(self) -> int:
        with self._store.read() as db:
            return int(db.execute(select(func.count()).where(revocations.c.lifted_at.is_(None))).scalar_one())
