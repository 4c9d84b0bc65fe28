"""Probes: whether a part lives, is ready, and has started, each apart (Kubernetes, "Liveness, Readiness and Startup
Probes").

*live*: the process answers; where it does not, only a restart helps. *ready*: it can do its work now; where it cannot,
callers go elsewhere and nobody restarts it. *startup*: it has come up once.

A check says why it does not hold in words that hold no secret and no content. Checks may block: each runs in a thread,
is given up after `CHECK_SECONDS`, is never started twice at once, and is asked at most once a second however often
somebody probes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stip_protocol.errors import StipError
from stip_protocol.runtime.logs import fault

CHECK_SECONDS = 2.0
KEPT_SECONDS = 1.0
"""How long an answer is repeated."""


@dataclass(frozen=True)
class Check:
    """One condition. `failing` returns why it does not hold, None where it does; what it raises is a failure."""

    name: str
    failing: Callable[[], str | None]


@dataclass(frozen=True)
class Probes:
    """The checks of one part."""

    ready: Sequence[Check] = ()
    live: Sequence[Check] = ()


@dataclass(frozen=True)
class Answer:
    """What a probe found: the names of all checks, those that fail with the reason."""

    checks: Mapping[str, str | None]

    @property
    def good(self) -> bool:
        return not any(self.checks.values())

    def document(self) -> dict[str, Any]:
        """As JSON: `{"status", "checks": [{"name", "status", "reason"}]}`."""
        checks = [
            {"name": name, "status": "ok"} if reason is None else {"name": name, "status": "failing", "reason": reason}
            for name, reason in self.checks.items()
        ]
        return {"status": "ok" if self.good else "failing", "checks": checks}


@dataclass
class _Running:
    done: threading.Event = field(default_factory=threading.Event)
    reason: str | None = None


class Runner:
    """Runs checks in bounded time. Safe from any thread."""

    def __init__(self, checks: Sequence[Check], *, seconds: float = CHECK_SECONDS) -> None:
        self._checks, self._seconds = checks, seconds
        self._lock = threading.Lock()
        self._running: dict[str, _Running] = {}
        self._kept: tuple[float, Answer] | None = None

    def answer(self) -> Answer:
        """Run every check at once; returns within `seconds`."""
        with self._lock:
            now = time.monotonic()
            if self._kept is not None and now - self._kept[0] < KEPT_SECONDS:
                return self._kept[1]
            runs = {check.name: self._begin(check) for check in self._checks}
            end = now + self._seconds
            found = {name: self._outcome(name, run, end) for name, run in runs.items()}
            self._kept = (time.monotonic(), Answer(found))
            return self._kept[1]

    def _begin(self, check: Check) -> _Running:
        """Start a check, or take the one that has not ended since: a check that hangs holds one thread. What one said
        after it was given up is of then, and is asked again."""
        late = self._running.get(check.name)
        if late is None or late.done.is_set():
            run = self._running[check.name] = _Running()

            def work() -> None:
                try:
                    run.reason = check.failing()
                except StipError as error:
                    run.reason = error.message
                except Exception as error:  # noqa: BLE001 - whatever it is, the check does not hold
                    run.reason = fault(error)
                run.done.set()

            threading.Thread(target=work, name=f"probe {check.name}", daemon=True).start()
        return self._running[check.name]

    def _outcome(self, name: str, run: _Running, end: float) -> str | None:
        if not run.done.wait(max(0.0, end - time.monotonic())):
            return f"no answer within {self._seconds:g} s"
        del self._running[name]
        return run.reason
