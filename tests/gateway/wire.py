"""What the gateway's tests send: cards, leases and frames of one small instance."""

from __future__ import annotations

import hashlib
import os
import struct
import time
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from stip_gateway.admission import Admission
from stip_gateway.link import LinkSessions
from stip_protocol.documents import Signed
from stip_protocol.lease import Lease
from stip_protocol.wire import model_pb2
from stip_stack.pki import Identity

INSTANCE, EPOCH, WIDTH = "ab" * 16, 3, 8
DIGEST = hashlib.sha256(b"manifest").digest()
SERVICE_KEY = Ed25519PrivateKey.generate()
AUDIENCE = "gateway.test"
MAX_POSITIONS, MAX_ROWS, MAX_OUTPUTS = 64, 4096, 4


def spki_digest(identity: Identity) -> bytes:
    public = x509.load_pem_x509_certificate(identity.certificate).public_key()
    return hashlib.sha256(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()


def lease(link_key: bytes, *, key: Ed25519PrivateKey = SERVICE_KEY, **changes: Any) -> bytes:
    now = int(time.time())
    fields: dict[str, Any] = {
        "handle": os.urandom(16),
        "serial": 0,
        "audience": AUDIENCE,
        "instance": INSTANCE,
        "epoch": EPOCH,
        "manifest_digest": DIGEST,
        "link_key": link_key,
        "not_before": now,
        "expires": now + 600,
        "tokens": 100,
        "audit_head": bytes(32),
    }
    return Signed.sign(Lease(**{**fields, **changes}), key).to_bytes()


def card() -> model_pb2.Card:
    return model_pb2.Card(
        version=1, instance=INSTANCE, epoch=EPOCH, manifest_digest=DIGEST, preset="hardened", dtype="float32",
        width=WIDTH, max_positions=MAX_POSITIONS, max_sessions=4, max_rows=MAX_ROWS, max_outputs=MAX_OUTPUTS,
    )  # fmt: skip


def rows(count: int, fill: float = 1.0) -> bytes:
    return struct.pack(f"<{count * WIDTH}f", *([fill] * count * WIDTH))


def ids(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def opening(session: bytes, signed: bytes) -> model_pb2.Up:
    return model_pb2.Up(open=model_pb2.Open(session=session, lease=signed, output=model_pb2.OUTPUT_HIDDEN))


def feeding(*slices: tuple[bytes, int, int], data: bytes | None = None) -> model_pb2.Up:
    """(session, position, count) each; the rows of the first slice are full of 0.0, of the second of 1.0, and on."""
    parts = [model_pb2.Slice(session=s, position=p, count=c, outputs=min(c, 1)) for s, p, c in slices]
    body = b"".join(rows(c, fill=float(i)) for i, (_, _, c) in enumerate(slices)) if data is None else data
    return model_pb2.Up(feed=model_pb2.Feed(slices=parts, rows=body))


def feeding_ids(*slices: tuple[bytes, int, tuple[int, ...]]) -> model_pb2.Up:
    """(session, position, ids) each."""
    parts = [model_pb2.Slice(session=s, position=p, count=len(values)) for s, p, values in slices]
    return model_pb2.Up(feed=model_pb2.Feed(slices=parts, ids=b"".join(ids(*values) for _, _, values in slices)))


def generating(session: bytes, **fields: Any) -> model_pb2.Up:
    return model_pb2.Up(generate=model_pb2.Generate(session=session, **{"max_ids": 8, **fields}))


def generated(*slices: tuple[bytes, int, tuple[int, ...]], done: bool = False) -> model_pb2.Down:
    """(session, position, ids) each, as a replica says it."""
    parts = [model_pb2.Slice(session=s, position=p, count=len(values), done=done) for s, p, values in slices]
    body = model_pb2.Ids(ids=b"".join(ids(*values) for _, _, values in slices))
    return model_pb2.Down(fed=model_pb2.Fed(slices=parts, ids=body, compute_us=5), load=1)


def link_sessions(*, clock: Any = time.time, sessions: int = 2, **changes: Any) -> LinkSessions:
    """The bookkeeping of one link whose certificate is all zeros; the card with `changes`."""
    described = card()
    for name, value in changes.items():
        setattr(described, name, value)
    admission = Admission(key=SERVICE_KEY.public_key(), audience=AUDIENCE, limit=4, clock=clock)
    return LinkSessions(described, admission, link_key=bytes(32), sessions=sessions, slices=8, retry_after=2.0)


def opened(link: LinkSessions, **changes: Any) -> bytes:
    """A session on `link` under a lease of its own, with `changes`."""
    session = os.urandom(16)
    assert link.up(opening(session, lease(bytes(32), **changes))).up
    return session
