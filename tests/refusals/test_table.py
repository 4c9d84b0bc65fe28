"""The table itself: every row is told apart, and the page that people read is the table."""

from __future__ import annotations

from collections import Counter

from stip_protocol.errors import BY_CODE
from tests.refusals.document import PAGE, render
from tests.refusals.sections import SECTIONS

CASES = [case for section in SECTIONS for case in section.cases]
ELSEWHERE = frozenset(BY_CODE) - {case.code for case in CASES}
"""Codes without a row."""
NOT_THE_KEY_SERVICES = frozenset({
    "internal", "attestation_refused", "lease_refused", "architecture_unsupported", "checkpoint_invalid",
    "preset_refused", "unrepresentable", "integrity_violated", "manifest_mismatch", "sealed_part_invalid",
    "audit_log_forked", "channel_changed", "lease_malformed", "session_unknown", "tensor_invalid", "position_refused",
    "draining", "replica_lost", "deadline_exceeded", "cancelled",
})  # fmt: skip
"""Of protecting, serving and the transport, whose tests are beside their parts; and roots of the tree."""


def test_no_two_rows_have_one_name() -> None:
    assert [name for name, count in Counter(case.name for case in CASES).items() if count > 1] == []


def test_every_code_is_one_of_the_tree() -> None:
    assert {case.code for case in CASES} <= BY_CODE.keys()


def test_every_code_of_evidence_release_and_lease_has_a_row() -> None:
    assert ELSEWHERE <= NOT_THE_KEY_SERVICES


def test_the_page_is_the_table() -> None:
    assert PAGE.read_text() == render(), "run `python -m tests.refusals.document`"
