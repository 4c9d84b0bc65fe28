"""What a row of the table of refusals is. The rows stand in `rows_*.py`, and `sections` puts them in order.

A row is one thing that is wrong while everything else is in order, and the stable code (`stip_protocol.errors`) that
it must be refused with. `docs/refusals.md` is generated from the same rows.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Act = Callable[[], Awaitable[Any]]
"""What must be refused, ready to be done once."""
Event = Literal["release", "renewal", "policy_loaded"]
Rules = Mapping[str, Any]
"""What a file says beyond the ordinary, by table. A value that is a function is called with the platform's `Forge`."""


@dataclass(frozen=True, slots=True)
class Case:
    """One row."""

    name: str
    """A sentence's worth: what comes."""
    altered: str
    """What is altered in what would be served otherwise, for `docs/refusals.md`."""
    code: str
    arrange: Callable[[Any], Awaitable[Act]]
    """Prepares a scene in which everything else is in order."""
    says: str = ""
    """Part of the message: that it was refused for what was altered, where the code alone would not tell."""
    event: Event | None = "release"
    """Of the audit log's entry. None where there was nothing that could be decided, or nobody who decides."""
    counted: bool = True
    """False where the transport refuses before the service is asked: then there is no code on the wire, either."""
    rules: Rules = field(default_factory=dict)
    """Of the policy of this row's service."""
    limits: Rules = field(default_factory=dict)
    """Of its `[limits]`."""


Stage = Literal["service", "client", "host", "process"]


@dataclass(frozen=True, slots=True)
class Section:
    """Rows about one thing."""

    title: str
    told: str
    """Two sentences for the reader of `docs/refusals.md`."""
    stage: Stage
    cases: tuple[Case, ...]
    own: bool = False
    """Each row has a person and an instance of its own, because rows take something from them."""
