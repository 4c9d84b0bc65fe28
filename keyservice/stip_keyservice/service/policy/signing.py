"""The detached signature of a policy: `policy.toml.sig` beside `policy.toml`.

A `Signed` document (Ed25519 over `"stip/policy" ‖ 0x00 ‖ payload`, `stip_protocol.documents`), whose payload names the
exact bytes of the file by their SHA-256, and says serial and meaning once more: whoever signs has seen both.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from stip_keyservice.service.policy.document import Policy, read_policy
from stip_protocol.documents import Document, Signed
from stip_protocol.durable import write_atomically
from stip_protocol.errors import FrameInvalid, PolicyInvalid, SignatureInvalid, VersionUnsupported
from stip_protocol.lease import Bytes32, Seconds, Tokens
from stip_protocol.release import service_id

SUFFIX = ".sig"
SIGNATURE_LIMIT = 4096
"""Bytes of the largest signature file read."""


class PolicySignature(Document):
    """What is signed about a policy."""

    context: ClassVar[str] = "stip/policy"

    file: Bytes32
    """SHA-256 of the file's bytes."""
    serial: Tokens
    policy: Bytes32
    """`Policy.digest`: what the file means."""
    signed_at: Seconds


@dataclass(frozen=True)
class Sealed:
    """A policy as it was read, and by whom it is signed."""

    policy: Policy
    digest: bytes
    signature: PolicySignature | None
    """None: there is no signature beside the file."""
    signer: bytes | None
    """SHA-256 of the raw public key that signed."""


def signature_path(policy: Path) -> Path:
    """Where the signature of a policy file lies."""
    return policy.with_name(policy.name + SUFFIX)


def sign(path: Path, key: Ed25519PrivateKey, *, now: int) -> PolicySignature:
    """Sign a policy file, and write the signature beside it.

    Raises `PolicyInvalid` where the policy does not load or has no serial, and where the signature that lies there
    already, by the same key, is for another policy of this serial or for a later one.
    """
    data = read_policy(path)
    policy = Policy.parse(data, name=str(path))
    if policy.serial is None:
        raise PolicyInvalid.because(f"policy {path}: serial", "none", "1 or more, higher with each signed change")
    made = PolicySignature(file=sha256(data).digest(), serial=policy.serial, policy=policy.digest(), signed_at=now)
    before = _before(path, key.public_key())
    if before is not None and (before.serial, before.policy) != (made.serial, made.policy):
        least = before.serial + 1
        if made.serial < least:
            raise PolicyInvalid.because(f"policy {path}: serial", made.serial, f"at least {least} for a changed policy")
    signature_path(path).with_name(signature_path(path).name + ".partial").unlink(missing_ok=True)
    write_atomically(signature_path(path), Signed.sign(made, key).to_bytes())
    return made


def read(path: Path, key: Ed25519PublicKey) -> Sealed:
    """A policy file, with its signature by `key` where one lies beside it.

    The signature is verified before anything of the file is parsed. Raises `SignatureInvalid` where there is one and
    it does not hold (another key, other bytes), `PolicyInvalid`, `VersionUnsupported`.
    """
    data, signed = read_policy(path), _read_signature(path)
    if signed is None:
        policy = Policy.parse(data, name=str(path))
        return Sealed(policy, policy.digest(), None, None)
    found = _open(path, signed, key)
    if not hmac.compare_digest(found.file, sha256(data).digest()):
        raise SignatureInvalid(f"policy {path}: changed since it was signed; sign it again (`policy sign`)")
    policy = Policy.parse(data, name=str(path))
    digest = policy.digest()
    if (policy.serial, digest) != (found.serial, found.policy):
        # The bytes are the signed ones, so whoever signed read them in another way than this version does.
        raise SignatureInvalid(f"policy {path}: signed by a version that reads it differently; sign it again")
    return Sealed(policy, digest, found, service_id(key))


def require_signed(path: Path, key: Ed25519PublicKey) -> tuple[Policy, PolicySignature]:
    """A signed policy. Raises as `read` does, and `PolicyInvalid` where there is no signature."""
    found = read(path, key)
    if found.signature is None:
        raise unsigned(path)
    return found.policy, found.signature


def unsigned(path: Path) -> PolicyInvalid:
    """The refusal of a policy without a signature."""
    return PolicyInvalid.because(f"policy {path}", "no signature", f"{signature_path(path).name} (`policy sign`)")


def _before(path: Path, key: Ed25519PublicKey) -> PolicySignature | None:
    """What the same key signed before; None where there is no signature that says so."""
    signed = _read_signature(path)
    try:
        return None if signed is None else _open(path, signed, key)
    except SignatureInvalid:
        return None


def _open(path: Path, signed: bytes, key: Ed25519PublicKey) -> PolicySignature:
    try:
        return Signed.from_bytes(signed).open(PolicySignature, key)
    except FrameInvalid:
        raise SignatureInvalid(f"policy {signature_path(path)}: not a signature of a policy") from None
    except VersionUnsupported as error:
        raise SignatureInvalid(f"policy {signature_path(path)}: {error.message}") from None
    except SignatureInvalid:
        raise SignatureInvalid(f"policy {path}: not signed by the expected key") from None


def _read_signature(path: Path) -> bytes | None:
    """None where there is no such file: whoever removes it has made the policy an unsigned one."""
    beside = signature_path(path)
    try:
        with beside.open("rb") as file:
            data = file.read(SIGNATURE_LIMIT + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PolicyInvalid(f"policy {beside}: {error.strerror}") from None
    if len(data) > SIGNATURE_LIMIT:
        raise SignatureInvalid(f"policy {beside}: not a signature of a policy")
    return data
