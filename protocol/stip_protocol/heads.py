"""Signed heads of an audit log that were kept elsewhere, and what two heads of one log can never say.

A key service could show one log to its auditor and another to its users. Whoever keeps the heads that it signed can
tell: clients do (they get one with every session), and an auditor holds what they kept against the log
(`stip-keyservice audit-log verify --heads FILE`). The file is a JSON document:

    {"service": "<64 hex digits: the key service's id>", "heads": ["<base64 of a signed `AuditHead`>", ...]}
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stip_protocol.documents import Signed, explain
from stip_protocol.errors import AuditLogForked, FrameInvalid
from stip_protocol.release import DER_LIMIT, AuditHead

HEADS_LIMIT = 4096
"""Heads in one file."""
FILE_LIMIT = 8 << 20
"""Bytes of the largest file read: `HEADS_LIMIT` heads of some 300 bytes in base64, with room."""


@dataclass(frozen=True, slots=True)
class Heads:
    """What a file of heads says. Nothing of it is verified yet."""

    service: bytes
    """SHA-256 of the service's raw Ed25519 key (`release.service_id`)."""
    heads: tuple[bytes, ...]
    """Signed `AuditHead`s."""

    def to_json(self) -> bytes:
        """The document, one head a line."""
        heads = [base64.b64encode(head).decode() for head in self.heads]
        return json.dumps({"service": self.service.hex(), "heads": heads}, indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> Heads:
        """Parse strictly. Raises `FrameInvalid`."""
        if len(data) > FILE_LIMIT:
            raise FrameInvalid.because("heads", f"{len(data)} bytes", f"at most {FILE_LIMIT}")
        try:
            read = _File.model_validate_json(data)
            heads = tuple(base64.b64decode(head, validate=True) for head in read.heads)
        except ValidationError as error:
            raise FrameInvalid(f"heads: {explain(error)}", field="heads") from None
        except ValueError:  # of base64: its text may quote the input
            raise FrameInvalid.because("heads", "another form", "base64 of signed heads") from None
        return cls(bytes.fromhex(read.service), heads)


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    service: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    heads: Annotated[list[Annotated[str, Field(max_length=2 * DER_LIMIT)]], Field(max_length=HEADS_LIMIT)]


def open_head(signed: bytes, service: Ed25519PublicKey) -> AuditHead:
    """Verify and parse. Raises `SignatureInvalid`, `FrameInvalid`, `VersionUnsupported`."""
    return Signed.from_bytes(signed).open(AuditHead, service)


def require_one_log(known: Sequence[AuditHead], head: AuditHead) -> None:
    """Hold a verified head against others of the same service. Raises `AuditLogForked`, which names no secret.

    One sequence has one hash and one time, and a log does not get shorter: the times of its entries never go back, so a
    head that is signed later and counts fewer is of a log that was cut. An older head that comes late, as from another
    enclave, contradicts nothing.
    """
    for other in known:
        if other.sequence == head.sequence and other.hash != head.hash:
            raise AuditLogForked(
                f"audit log of the key service: entry {head.sequence} has two hashes, {other.hash.hex()} and "
                f"{head.hash.hex()}: two logs were shown, or one was rewritten",
                field="audit_head",
            )
        if other.sequence == head.sequence and other.at != head.at:
            raise AuditLogForked(
                f"audit log of the key service: entry {head.sequence} has two times, {other.at} and {head.at}: one of "
                "its heads does not say what the entry says",
                field="audit_head",
            )
        if other.sequence > head.sequence and other.at < head.at:
            raise AuditLogForked(
                f"audit log of the key service: went back from entry {other.sequence} to {head.sequence}: it was cut, "
                "restored from a backup, or its clock was set back",
                field="audit_head",
            )
