"""What every table of the policy is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, Field

from stip_protocol.runtime.config import Settings


class Rules(Settings):
    """Base of a table: frozen, an unknown rule is an error, and a number is a number: neither text nor true."""

    model_config = ConfigDict(strict=True)


def _from_hex(value: object) -> object:
    return bytes.fromhex(value) if isinstance(value, str) else value


Digest = Annotated[bytes, BeforeValidator(_from_hex), Field(min_length=32, max_length=32)]
"""SHA-256, in the file as 64 hex digits."""
