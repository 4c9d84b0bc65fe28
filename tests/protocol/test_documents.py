"""Canonical bytes, signed documents, leases and the release's seals."""

from __future__ import annotations

import os
import time
from typing import Any, ClassVar

import cbor2
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from stip_protocol import canonical, lease, release
from stip_protocol.documents import Document, Signed
from stip_protocol.errors import (
    FrameInvalid,
    LeaseExpired,
    LeaseForeign,
    LeaseMalformed,
    SignatureInvalid,
    StipError,
    VersionUnsupported,
)

KEY = Ed25519PrivateKey.generate()
OTHER = Ed25519PrivateKey.generate()
NOW = int(time.time())

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.binary(max_size=40) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(plain)
def test_canonical_bytes_come_back_as_the_value_they_were_made_from(value: Any) -> None:
    assert canonical.decode(canonical.encode(value), what="value") == value


@given(st.binary(max_size=60))
def test_arbitrary_bytes_decode_to_themselves_or_are_refused(data: bytes) -> None:
    try:
        value = canonical.decode(data, what="value")
    except FrameInvalid:
        return
    assert canonical.encode(value) == data


def test_a_second_form_of_the_same_value_is_refused() -> None:
    repeated = b"\xa2\x61a\x01\x61a\x01"
    for form in (cbor2.dumps({"b": 1, "a": 2}), b"\x18\x01", b"\x9f\x01\xff", canonical.encode(1) + b"\x00", repeated):
        with pytest.raises(FrameInvalid):
            canonical.decode(form, what="value")


def test_a_document_beyond_the_limit_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(FrameInvalid, match="at most"):
        canonical.decode(b"\x00" * (canonical.DOCUMENT_LIMIT + 1), what="value")


def shared_references(levels: int) -> bytes:
    """A list whose n-th item stands for 2ⁿ values, by shared references (tags 28 and 29): few bytes, endless work."""
    items = [b"\xd8\x1c\x81\x00"]
    items += [b"\xd8\x1c\x82" + 2 * (b"\xd8\x1d" + cbor2.dumps(level)) for level in range(levels)]
    return bytes([0x98, len(items)]) + b"".join(items)


BOMBS: dict[str, bytes] = {
    "references that double at each of 60 levels": shared_references(60),
    "a list within a list, thousands deep": b"\x81" * 60_000 + b"\x00",
    "a list of 2⁶⁴ items": b"\x9b" + b"\xff" * 8,
    "a string of 2⁶⁴ bytes": b"\x5b" + b"\xff" * 8,
    "a float": cbor2.dumps(1.5),
    "an integer of 1000 bytes": cbor2.dumps(1 << 8000),
    "a decimal with an endless exponent": cbor2.dumps(cbor2.CBORTag(4, [2**62, 1])),
    "a pattern to compile": cbor2.dumps(cbor2.CBORTag(35, "(a{1,9999}){1,9999}")),
}


@pytest.mark.parametrize("name", BOMBS)
def test_few_bytes_cannot_ask_for_endless_work(name: str) -> None:
    with pytest.raises(FrameInvalid):
        canonical.decode(BOMBS[name], what="value")


def test_a_version_that_is_no_small_number_is_a_refusal_and_no_crash() -> None:
    with pytest.raises(FrameInvalid):
        Note.from_bytes(canonical.encode({"ctx": Note.context, "version": [1 << 20_000, 0], "number": 1}))


class Note(Document):
    context: ClassVar[str] = "stip/test-note"
    number: int
    secret: bytes = b""


class OtherNote(Note):
    context: ClassVar[str] = "stip/test-other-note"


def test_a_signature_over_one_kind_of_document_is_not_one_over_another() -> None:
    signed = Signed.sign(Note(number=1), KEY)
    assert Signed.from_bytes(signed.to_bytes()).open(Note, KEY.public_key()) == Note(number=1)
    with pytest.raises(SignatureInvalid):
        signed.open(OtherNote, KEY.public_key())
    with pytest.raises(SignatureInvalid):
        signed.open(Note, OTHER.public_key())


@given(st.data())
def test_a_flipped_bit_anywhere_in_a_signed_document_is_refused(data: st.DataObject) -> None:
    raw = bytearray(Signed.sign(Note(number=7, secret=b"x" * 40), KEY).to_bytes())
    bit = data.draw(st.integers(0, len(raw) * 8 - 1))
    raw[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(StipError):
        Signed.from_bytes(bytes(raw)).open(Note, KEY.public_key())


def test_an_unknown_major_version_is_refused_and_a_newer_minors_field_is_ignored() -> None:
    fields = {"ctx": Note.context, "number": 1, "secret": b""}
    newer = canonical.encode({**fields, "version": [1, 1], "added": True})
    assert Note.from_bytes(newer) == Note(number=1)
    with pytest.raises(VersionUnsupported):
        Note.from_bytes(canonical.encode({**fields, "version": [2, 0]}))


def test_a_refusal_names_the_field_and_never_its_value() -> None:
    data = canonical.encode({"ctx": Note.context, "version": [1, 0], "number": "s3cret-value", "secret": b""})
    with pytest.raises(FrameInvalid, match="number") as caught:
        Note.from_bytes(data)
    assert "s3cret-value" not in repr(caught.value) + str(caught.value)


def make_lease(**changes: Any) -> lease.Lease:
    fields: dict[str, Any] = {
        "handle": bytes(16),
        "serial": 0,
        "audience": "gateway",
        "instance": "ab" * 16,
        "epoch": 1,
        "manifest_digest": bytes(32),
        "link_key": b"l" * 32,
        "not_before": NOW,
        "expires": NOW + 60,
        "tokens": 10,
        "audit_head": bytes(32),
    }
    return lease.Lease(**{**fields, **changes})


def admit(signed: bytes, now: int = NOW, **changes: Any) -> lease.Lease:
    here: dict[str, Any] = {"audience": "gateway", "instance": "ab" * 16, "epoch": 1, "link_key": b"l" * 32}
    return lease.admit(signed, key=KEY.public_key(), now=now, **{**here, **changes})


def test_a_lease_is_admitted_where_it_was_made_out_to_and_nowhere_else() -> None:
    good = make_lease()
    signed = Signed.sign(good, KEY).to_bytes()
    assert admit(signed) == good
    for change in ({"audience": "x"}, {"instance": "cd" * 16}, {"epoch": 2}, {"link_key": b"m" * 32}):
        with pytest.raises(LeaseForeign):
            admit(signed, **change)
    with pytest.raises(LeaseForeign):
        admit(Signed.sign(good, OTHER).to_bytes())
    with pytest.raises(LeaseExpired):
        admit(signed, now=NOW + 60)
    with pytest.raises(LeaseExpired):
        admit(signed, now=NOW - 3600)
    with pytest.raises(LeaseMalformed):
        admit(signed[:-1])


HPKE = X25519PrivateKey.generate()
LINK = ec.generate_private_key(ec.SECP256R1())


def claims(**changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "nonce": os.urandom(32),
        "hpke_key": HPKE.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw),
        "tls_key": bytes(32),
        "link_key": LINK.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        "service": release.service_id(KEY.public_key()),
        "delegation": bytes(32),
        "kind": "grant",
        "instance": "ab" * 16,
        "tokens": 1,
    }
    return release.Claims(**{**fields, **changes}).to_bytes()


GRANT = release.Grant(
    instance="ab" * 16,
    epoch=0,
    preset="paper",
    manifest_digest=bytes(32),
    part_key=b"k" * 32,
    vocabulary_seed=b"v" * 32,
)


def test_what_is_sealed_for_one_request_opens_for_that_request_alone() -> None:
    asked = claims()
    sealed, signature = release.seal(GRANT, asked, KEY)
    assert release.unseal(sealed, signature, asked, HPKE, KEY.public_key()) == GRANT
    refused = {
        "another request": (sealed, signature, claims(), HPKE, KEY.public_key()),
        "another HPKE key": (sealed, signature, asked, X25519PrivateKey.generate(), KEY.public_key()),
        "another key service": (sealed, signature, asked, HPKE, OTHER.public_key()),
        "a flipped bit": (sealed[:-1] + bytes([sealed[-1] ^ 1]), signature, asked, HPKE, KEY.public_key()),
    }
    for arguments in refused.values():
        with pytest.raises(SignatureInvalid):
            release.unseal(*arguments)


def test_a_seal_by_another_service_is_refused_though_it_is_made_for_these_claims() -> None:
    asked = claims()
    sealed, signature = release.seal(GRANT, asked, OTHER)
    with pytest.raises(SignatureInvalid):
        release.unseal(sealed, signature, asked, HPKE, KEY.public_key())


def test_a_heartbeat_counts_only_by_its_link_key() -> None:
    beat = release.Heartbeat(handle=bytes(16), serial=0, nonce=bytes(32), fed=5, wanted=10)
    signature = release.sign_heartbeat(beat, LINK)
    assert release.open_heartbeat(beat.to_bytes(), signature, LINK.public_key()) == beat
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    with pytest.raises(SignatureInvalid):
        release.open_heartbeat(beat.to_bytes(), signature, other)


def test_no_repr_of_a_document_shows_what_opens_an_instance() -> None:
    bundle = release.Bundle(
        delegation=bytes(32), user_key=b"u" * 32, instance="ab" * 16, epoch=0, manifest_digest=bytes(32), lease=b"",
        link_certificate=b"", heartbeat_tokens=1, cache_salt=b"s" * 32, policy_digest=bytes(32), audit_head=b"",
        grant=GRANT.to_bytes(),
    )  # fmt: skip
    shown = repr(bundle) + str(bundle) + repr(GRANT) + str(GRANT)
    for secret in (b"u", b"s", b"k", b"v"):
        assert repr(secret * 32)[2:-1] not in shown
