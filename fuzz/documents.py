"""Targets that read canonical CBOR: every document of the protocol, bare, signed and sealed."""

from __future__ import annotations

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fuzz import material
from fuzz.target import Broken, Target
from stip_keyservice.service.auditlog import AuditEntry
from stip_protocol import lease, release
from stip_protocol.documents import Document, Signed
from stip_protocol.lease import Lease
from stip_protocol.release import (
    AuditHead,
    Bundle,
    Claims,
    Delegation,
    Grant,
    Heartbeat,
    Notice,
    Renewal,
    Watch,
)
from stip_protocol.secrets_file import SECRETS_INFO, InstanceSecrets, open_secrets, seal_secrets

KINDS: tuple[type[Document], ...] = (
    Claims, Delegation, Lease, Heartbeat, Renewal, Watch, Notice, Grant, Bundle, AuditHead, AuditEntry, InstanceSecrets,
)  # fmt: skip
B16, B32 = bytes(16), bytes(32)


def _lease(**changes: object) -> Lease:
    fields: dict[str, object] = {
        "handle": B16, "serial": 1, "audience": "gateway.stip", "instance": material.INSTANCE, "epoch": 0,
        "manifest_digest": B32, "link_key": B32, "not_before": material.NOW - 1, "expires": material.NOW + 900,
        "tokens": 4096, "audit_head": B32,
    }  # fmt: skip
    return Lease.model_validate(fields | changes)


def good_lease(**changes: object) -> bytes:
    """A signed lease."""
    return Signed.sign(_lease(**changes), material.SIGNING).to_bytes()


def _documents() -> list[Document]:
    head = AuditHead(sequence=3, hash=B32, at=material.NOW)
    signed_head = Signed.sign(head, material.SIGNING).to_bytes()
    grant = Grant(instance=material.INSTANCE, epoch=0, preset="paper", manifest_digest=B32, part_key=B32,
                  vocabulary_seed=B32)  # fmt: skip
    return [
        Claims(nonce=B32, hpke_key=B32, tls_key=B32, link_key=material.LINK_SPKI, service=B32, delegation=B32,
               kind="bundle", instance=material.INSTANCE, tokens=1024, epochs=(0, 1)),
        Delegation(user=B32, enclave_key=B32, measurement=B32, instance=material.INSTANCE, nonce=B32,
                   expires=material.NOW + 60),
        _lease(),
        Heartbeat(handle=B16, serial=1, nonce=B32, fed=64, wanted=1024),
        Renewal(nonce=B32, lease=good_lease(), link_certificate=bytes(64), audit_head=signed_head, superseded=True),
        Watch(nonce=B32, link_key=B32),
        Notice(kind="revoked", nonce=B32, sequence=2, handles=(B16, B16), instance=material.INSTANCE, epoch=1),
        grant,
        Bundle(delegation=B32, user_key=B32, instance=material.INSTANCE, epoch=0, manifest_digest=B32,
               lease=good_lease(), link_certificate=bytes(64), heartbeat_tokens=64, cache_salt=B32, policy_digest=B32,
               audit_head=signed_head, grant=grant.to_bytes(), canaries=(bytes(32),)),
        head,
        InstanceSecrets(instance=material.INSTANCE, epoch=0, preset="paper", manifest_digest=B32, root=B32),
    ]  # fmt: skip


def _selected(data: bytes) -> tuple[type[Document], bytes]:
    """The first byte says which document the others are read as."""
    return KINDS[data[0] % len(KINDS) if data else 0], data[1:]


def _document(data: bytes) -> None:
    """What is accepted has the same meaning in its own canonical bytes."""
    kind, payload = _selected(data)
    read = kind.from_bytes(payload)
    if kind.from_bytes(read.to_bytes()) != read:
        raise Broken(f"{kind.__name__}: accepted, and another document once written")


def _seeds() -> list[bytes]:
    return [bytes([KINDS.index(type(one))]) + one.to_bytes() for one in _documents()]


def _signed(data: bytes) -> None:
    """A signed document as it comes, and the same bytes as the payload of one whose signature is good."""
    key = material.SIGNING.public_key()
    kind, payload = _selected(data)
    proved = Signed(payload=payload, signature=material.SIGNING.sign(kind.context.encode() + b"\x00" + payload))
    proved.open(kind, key)
    Signed.from_bytes(payload).open(kind, key)


def _gateway_lease(data: bytes) -> None:
    lease.admit(data, key=material.SIGNING.public_key(), audience="gateway.stip", instance=material.INSTANCE, epoch=0,
                link_key=B32, now=material.NOW)  # fmt: skip


def _heartbeat(data: bytes) -> None:
    """A heartbeat or a watch under a good signature of the link key: the first byte says which."""
    name, read = ((b"heartbeat", release.open_heartbeat), (b"watch", release.open_watch))[bool(data[:1] > b"\x7f")]
    signature = material.LINK.sign(b"stip/" + name + b"\x00" + data[1:], ec.ECDSA(hashes.SHA256()))
    read(data[1:], signature, material.LINK.public_key())


def _heartbeats() -> list[bytes]:
    beat = Heartbeat(handle=B16, serial=1, nonce=B32, fed=64, wanted=1024)
    return [b"\xff" + Watch(nonce=B32, link_key=B32).to_bytes(), b"\x00" + beat.to_bytes()]


def _sealed(data: bytes) -> None:
    open_secrets(data, material.OPENING)


def _opened(data: bytes) -> None:
    """What lies inside secrets.sealed: sealing needs only the public key."""
    open_secrets(release.SUITE.encrypt(data, material.OPENING.public_key(), SECRETS_INFO), material.OPENING)


def _secrets() -> InstanceSecrets:
    return next(one for one in _documents() if isinstance(one, InstanceSecrets))


TARGETS = (
    Target("document", _document, _seeds),
    Target("signed-document", _signed, lambda: [*_seeds(), b"\x02" + good_lease()]),
    Target("lease", _gateway_lease, lambda: [good_lease(), good_lease(expires=material.NOW)], 2048),
    Target("heartbeat-and-watch", _heartbeat, _heartbeats),
    Target("secrets-sealed", _sealed, lambda: [seal_secrets(_secrets(), material.OPENING.public_key())], 2048),
    Target("secrets-opened", _opened, lambda: [_secrets().to_bytes()], 2048),
)
