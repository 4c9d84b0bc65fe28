"""`secrets.sealed`: what the developer's offline machine hands to the key service about one instance.

The root secret of an instance, HPKE-sealed (RFC 9180, base mode, `stip_protocol.release.SUITE`) to the key
service's X25519 key. Everything that opens the instance derives from the root by label, so this is the one
secret that `protect` leaves behind; `grant_of` is the only part of it that ever reaches an enclave.
"""

from __future__ import annotations

from typing import ClassVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from pydantic import Field

from stip_protocol.documents import Document
from stip_protocol.errors import SealedPartInvalid
from stip_protocol.keys.draw import VOCABULARY_LABEL
from stip_protocol.keys.stream import derive
from stip_protocol.lease import Bytes32, Epoch, InstanceId
from stip_protocol.manifest import Preset
from stip_protocol.release import SUITE, Grant

SECRETS_INFO = b"stip/instance-secrets"
"""HPKE info of `secrets.sealed`."""
SECRETS_LIMIT = 1 << 16
"""Bytes of the largest `secrets.sealed` read."""
PART_LABEL = "enclave-part"
"""Label of the key that opens the enclave part: `derive(root, PART_LABEL)`."""


class InstanceSecrets(Document):
    """The root secret of one instance, and which signed manifest it belongs to."""

    context: ClassVar[str] = "stip/instance-secrets"

    instance: InstanceId
    epoch: Epoch
    preset: Preset
    manifest_digest: Bytes32
    root: Bytes32 = Field(repr=False)


def seal_secrets(secrets: InstanceSecrets, public: X25519PublicKey) -> bytes:
    """The bytes of `secrets.sealed` (HPKE encapsulation ‖ ciphertext) for the key service that owns `public`."""
    return SUITE.encrypt(secrets.to_bytes(), public, SECRETS_INFO)


def open_secrets(data: bytes, private: X25519PrivateKey) -> InstanceSecrets:
    """Open `secrets.sealed`.

    Raises `SealedPartInvalid` where it was changed or sealed to another key service, `FrameInvalid` or
    `VersionUnsupported` where what was sealed is no such document.
    """
    if len(data) > SECRETS_LIMIT:
        raise SealedPartInvalid.because("secrets.sealed", f"{len(data)} bytes", f"at most {SECRETS_LIMIT}")
    try:
        plain = SUITE.decrypt(data, private, SECRETS_INFO)
    except (InvalidTag, ValueError):
        raise SealedPartInvalid("secrets.sealed: changed, or not sealed to this key service") from None
    return InstanceSecrets.from_bytes(plain)


def grant_of(secrets: InstanceSecrets) -> Grant:
    """What an attested enclave gets of the secrets: the part's key, and π_c where the server holds the head."""
    return Grant(
        instance=secrets.instance,
        epoch=secrets.epoch,
        preset=secrets.preset,
        manifest_digest=secrets.manifest_digest,
        part_key=derive(secrets.root, PART_LABEL),
        vocabulary_seed=None if secrets.preset == "hardened" else derive(secrets.root, VOCABULARY_LABEL),
    )
