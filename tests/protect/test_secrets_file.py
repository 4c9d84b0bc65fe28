"""Instance secrets reach one key service, and an enclave gets of them only what opens its part."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from stip_protocol.errors import FrameInvalid, SealedPartInvalid
from stip_protocol.keys import derive, vocabulary_key
from stip_protocol.release import SUITE, Grant
from stip_protocol.secrets_file import (
    PART_LABEL,
    SECRETS_INFO,
    SECRETS_LIMIT,
    InstanceSecrets,
    grant_of,
    open_secrets,
    seal_secrets,
)

ROOT = bytes(range(100, 132))
PRIVATE = X25519PrivateKey.generate()


def secrets_of(preset: str) -> InstanceSecrets:
    return InstanceSecrets.model_validate(
        {"instance": "a" * 32, "epoch": 7, "preset": preset, "manifest_digest": bytes(32), "root": ROOT}
    )


def test_sealed_secrets_open_for_their_key_service_only() -> None:
    sealed = seal_secrets(secrets_of("paper"), PRIVATE.public_key())
    assert open_secrets(sealed, PRIVATE) == secrets_of("paper")
    with pytest.raises(SealedPartInvalid, match="not sealed to this key service"):
        open_secrets(sealed, X25519PrivateKey.generate())


def test_changed_or_cut_secrets_are_refused() -> None:
    sealed = seal_secrets(secrets_of("hardened"), PRIVATE.public_key())
    for position in range(len(sealed)):
        changed = bytearray(sealed)
        changed[position] ^= 1
        if position == 31:
            continue  # the top byte of an X25519 point: its highest bit, not this one, is ignored by RFC 7748
        with pytest.raises(SealedPartInvalid):
            open_secrets(bytes(changed), PRIVATE)
    for length in (0, 31, 32, len(sealed) - 1):
        with pytest.raises(SealedPartInvalid):
            open_secrets(sealed[:length], PRIVATE)


def test_oversize_secrets_are_refused_unread() -> None:
    with pytest.raises(SealedPartInvalid, match=f"at most {SECRETS_LIMIT}"):
        open_secrets(bytes(SECRETS_LIMIT + 1), PRIVATE)


def test_another_document_sealed_in_their_place_is_refused() -> None:
    foreign = SUITE.encrypt(grant_of(secrets_of("paper")).to_bytes(), PRIVATE.public_key(), SECRETS_INFO)
    with pytest.raises(FrameInvalid, match="ctx"):
        open_secrets(foreign, PRIVATE)


def test_a_grant_holds_the_part_key_and_never_the_root() -> None:
    grant = grant_of(secrets_of("hardened"))
    assert grant.part_key == derive(ROOT, PART_LABEL)
    assert grant.vocabulary_seed is None
    assert ROOT not in grant.to_bytes()
    assert (grant.instance, grant.epoch, grant.preset) == ("a" * 32, 7, "hardened")
    assert Grant.from_bytes(grant.to_bytes()) == grant


@pytest.mark.parametrize("preset", ["paper", "throughput"])
def test_the_grant_of_a_head_on_the_server_expands_to_the_vocabulary_permutation(preset: str) -> None:
    seed = grant_of(secrets_of(preset)).vocabulary_seed
    assert seed is not None
    assert sorted(vocabulary_key(seed, 50).index) == list(range(50))


def test_reprs_show_no_secret() -> None:
    secrets = secrets_of("paper")
    for text in (repr(secrets), str(secrets), repr(grant_of(secrets))):
        for secret in (ROOT, derive(ROOT, PART_LABEL)):
            assert repr(secret)[2:-1] not in text
            assert secret.hex() not in text
