"""Heads of an audit log that were kept elsewhere: their file, and what two of them can never say."""

from __future__ import annotations

import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from stip_protocol.documents import Signed
from stip_protocol.errors import AuditLogForked, FrameInvalid, SignatureInvalid
from stip_protocol.heads import HEADS_LIMIT, Heads, open_head, require_one_log
from stip_protocol.release import AuditHead

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def head(sequence: int, at: int, fill: int | None = None) -> AuditHead:
    return AuditHead(sequence=sequence, hash=bytes([sequence % 251 if fill is None else fill]) * 32, at=at)


@given(st.lists(st.binary(min_size=1, max_size=400), max_size=20), st.binary(min_size=32, max_size=32))
def test_a_file_of_heads_reads_as_it_was_written(signed: list[bytes], service: bytes) -> None:
    heads = Heads(service, tuple(signed))
    assert Heads.from_json(heads.to_json()) == heads


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"service": "00" * 31, "heads": []},
        {"service": "AB" * 32, "heads": []},
        {"service": "ab" * 32, "heads": ["no base64!"]},
        {"service": "ab" * 32, "heads": [7]},
        {"service": "ab" * 32, "heads": [], "more": 1},
        {"service": "ab" * 32, "heads": ["AAAA"] * (HEADS_LIMIT + 1)},
        {"service": "ab" * 32, "heads": ["A" * 9000]},
        [],
    ],
)
def test_a_file_of_another_form_is_refused(document: object) -> None:
    with pytest.raises(FrameInvalid):
        Heads.from_json(json.dumps(document).encode())


def test_a_head_is_believed_under_the_services_key_alone() -> None:
    signed = Signed.sign(head(3, 100), KEY).to_bytes()
    assert open_head(signed, KEY.public_key()) == head(3, 100)
    with pytest.raises(SignatureInvalid):
        open_head(signed, Ed25519PrivateKey.generate().public_key())


@given(st.permutations(list(range(1, 12))))
def test_heads_of_one_log_contradict_each_other_in_no_order(order: list[int]) -> None:
    known: list[AuditHead] = []
    for sequence in order:
        require_one_log(known, head(sequence, 1000 + sequence))
        known.append(head(sequence, 1000 + sequence))


def test_one_entry_with_two_hashes_is_a_fork() -> None:
    with pytest.raises(AuditLogForked, match="entry 5 has two hashes"):
        require_one_log([head(4, 100), head(5, 101)], head(5, 101, fill=9))


def test_one_entry_at_two_times_is_a_fork() -> None:
    """The hash covers the entry with its time: a head that says another one is a lie about it."""
    with pytest.raises(AuditLogForked, match="entry 5 has two times"):
        require_one_log([head(5, 101)], head(5, 999))


def test_a_log_that_is_shorter_later_was_cut() -> None:
    require_one_log([head(9, 1000)], head(8, 1000))
    with pytest.raises(AuditLogForked, match="went back from entry 9 to 8"):
        require_one_log([head(9, 1000)], head(8, 1001))


def test_a_clock_that_was_set_back_by_an_operator_makes_no_later_entry_a_fork() -> None:
    require_one_log([head(9, 1000)], head(10, 400))
