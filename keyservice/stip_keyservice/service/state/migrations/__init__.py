"""The steps from one schema to the next (Alembic), each with the data."""

from __future__ import annotations

from dataclasses import dataclass, field

from stip_keyservice.rootkey.ring import RootKey


@dataclass(frozen=True)
class Secrets:
    """What opens rows that a step seals anew."""

    root: RootKey
    storage_key: bytes | None = field(default=None, repr=False)
    """Of version 1: what grants were encrypted under."""
