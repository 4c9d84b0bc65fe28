from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stip_protocol.attestation import freshness
from stip_protocol.attestation.policy import EvidencePolicy
from stip_protocol.attestation.verifier import verify
from stip_protocol.errors import EvidenceMalformed, FrameInvalid, ReportDataMismatch
from stip_stack.tee import SimulatedPlatform

KEY = b"k" * 32


@pytest.fixture
def answered(platform: SimulatedPlatform, measurement: bytes, now: int) -> Callable[[bytes, bytes], freshness.Answer]:
    provider = platform.provider(measurement, clock=lambda: now)
    return lambda nonce, key: freshness.answer(provider, nonce, key)


def test_an_answer_over_this_nonce_and_key_verifies(
    answered: Callable[[bytes, bytes], freshness.Answer], policy: Callable[..., EvidencePolicy], now: int
) -> None:
    nonce = freshness.new_nonce()
    answer = answered(nonce, KEY)
    wanted = freshness.check(answer.claims, nonce=nonce, tls_key=KEY)
    assert verify(answer.evidence, policy(), report_data=wanted, now=now).simulated


def test_a_replayed_answer_is_refused(answered: Callable[[bytes, bytes], freshness.Answer]) -> None:
    answer = answered(freshness.new_nonce(), KEY)
    with pytest.raises(ReportDataMismatch, match="nonce"):
        freshness.check(answer.claims, nonce=freshness.new_nonce(), tls_key=KEY)


def test_an_answer_relayed_from_another_channel_is_refused(
    answered: Callable[[bytes, bytes], freshness.Answer],
) -> None:
    nonce = freshness.new_nonce()
    with pytest.raises(ReportDataMismatch, match="TLS key"):
        freshness.check(answered(nonce, b"o" * 32).claims, nonce=nonce, tls_key=KEY)


def test_claims_with_a_quote_over_other_claims_are_refused(
    answered: Callable[[bytes, bytes], freshness.Answer], policy: Callable[..., EvidencePolicy], now: int
) -> None:
    nonce = freshness.new_nonce()
    stale = answered(freshness.new_nonce(), KEY)
    wanted = freshness.check(freshness.claims(nonce, KEY), nonce=nonce, tls_key=KEY)
    with pytest.raises(ReportDataMismatch):
        verify(stale.evidence, policy(), report_data=wanted, now=now)


def test_every_flipped_bit_of_the_claims_is_refused(
    answered: Callable[[bytes, bytes], freshness.Answer], policy: Callable[..., EvidencePolicy], now: int
) -> None:
    nonce = freshness.new_nonce()
    answer = answered(nonce, KEY)

    def judge(claims: bytes) -> None:
        wanted = freshness.check(claims, nonce=nonce, tls_key=KEY)
        verify(answer.evidence, policy(), report_data=wanted, now=now)

    judge(answer.claims)
    for bit in range(8 * len(answer.claims)):
        flipped = bytearray(answer.claims)
        flipped[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises((EvidenceMalformed, ReportDataMismatch)):
            judge(bytes(flipped))


@pytest.mark.parametrize("nonce", [b"", b"n" * 31, b"n" * 64])
def test_a_nonce_of_another_length_is_refused_before_anything_is_quoted(
    answered: Callable[[bytes, bytes], freshness.Answer], nonce: bytes
) -> None:
    with pytest.raises(FrameInvalid):
        answered(nonce, KEY)


@given(st.binary(max_size=300))
def test_arbitrary_claims_give_a_refusal_and_nothing_else(data: bytes) -> None:
    with pytest.raises(EvidenceMalformed):
        freshness.check(data, nonce=bytes(32), tls_key=KEY)
