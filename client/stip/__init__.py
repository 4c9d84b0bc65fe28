"""`stip`: talk to a model through an attested enclave that only you can recognise.

    with stip.connect("profile.toml") as connection:      # verifies, or raises
        with connection.session() as session:
            for chunk in session.generate("Once upon a time", max_tokens=64):
                print(chunk.text, end="")

The surface is `connect` and `aconnect` with what they return, `verify` and `averify` for the document alone, and
the error tree of `stip_protocol.errors`.
"""

from stip.connection import AsyncConnection, aconnect, averify
from stip.profile import Profile
from stip.session import AsyncSession, Chunk, Completion
from stip.stream import FinishReason
from stip.sync import Connection, Session, connect, verify
from stip.verification import Verification
from stip_protocol.errors import (
    AttestationError,
    ChannelChanged,
    ConfigurationError,
    IntegrityError,
    RequestInvalid,
    StipError,
    Unavailable,
)

__all__ = [
    "AsyncConnection",
    "AsyncSession",
    "AttestationError",
    "ChannelChanged",
    "Chunk",
    "Completion",
    "ConfigurationError",
    "Connection",
    "FinishReason",
    "IntegrityError",
    "Profile",
    "RequestInvalid",
    "Session",
    "StipError",
    "Unavailable",
    "Verification",
    "aconnect",
    "averify",
    "connect",
    "verify",
]
