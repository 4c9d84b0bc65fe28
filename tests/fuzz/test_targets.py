"""Every reader of untrusted bytes, tried for a moment: it accepts, or refuses by a stable code, and nothing else.

`make fuzz` tries the same targets for longer, guided by coverage. What either found stands in `FOUND`.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.target import ACCEPTED, MEMORY, Broken, Target, judge, judge_closely
from fuzz.targets import TARGETS
from stip_protocol import toml
from stip_protocol.errors import FrameInvalid, StipError

EXAMPLES = 75
HELD = 40
"""Bytes of the longest piece put into a seed."""


@dataclass(frozen=True)
class Edit:
    """One change of a seed: from the place that `at` (0 to 1) is, `removed` bytes give way to `put`."""

    at: float
    removed: int
    put: bytes

    def apply(self, data: bytes) -> bytes:
        start = int(self.at * len(data))
        return data[:start] + self.put + data[start + self.removed :]


INTERESTING = st.sampled_from(
    [b"\x00", b"\xff", b"\x7f", b"\x80", b"\xff" * 4, b"\xff" * 8, b"\x00" * 8, b"[", b"{", b'"', b"\n", b"1" * HELD]
)
EDITS = st.lists(
    st.builds(Edit, st.floats(0, 1), st.integers(0, 8), INTERESTING | st.binary(max_size=8)), min_size=1, max_size=4
)

FOUND = {
    "an integer of more digits than Python converts, in a policy": ("policy", b"a = " + b"1" * 5000),
    "an integer of more digits than Python converts, in a client's policy": ("evidence-policy", b"a = " + b"1" * 5000),
    "an integer of more digits than Python converts, in a configuration": ("configuration", b"a = " + b"1" * 5000),
    "a client's policy nested beyond Python's stack": ("evidence-policy", b"a = " + b"[" * 4000),
    "a configuration nested beyond Python's stack": ("configuration", b"a = " + b"{a=" * 1300),
}
"""What once broke the promise."""
HARD = {
    "CBOR nested beyond Python's stack": ("document", b"\x00" + b"\x81" * 4000),
    "CBOR that shares one value many times": ("document", b"\x00\xd8\x1c\x82\xd8\x1d\x00\xd8\x1d\x00"),
    "CBOR that announces eight exabytes": ("lease", b"\x5b\x7f" + b"\xff" * 7),
    "CBOR that announces a map without end": ("signed-document", b"\x02\xbb\x00" + b"\xff" * 7),
    "a quote that announces four gigabytes": ("sgx-quote", b"\x03\x00\x02\x00" + b"\xff" * 600),
    "JSON nested beyond Python's stack": ("collateral", b"[" * 20_000),
    "a bundle nested beyond Python's stack": ("collateral-bundle", b'{"a":' * 6_000),
    "an audit export with an endless number": ("audit-export", b'{"at":' + b"1" * 5000 + b"}\n"),
    "kept heads with a lone surrogate": ("audit-heads", b'{"service":"\\ud800","heads":["\\ud800"]}'),
    "a frame that announces more rows than there are": (
        "gateway-frames-up",
        b"\x08\x00\x12\x06\x0a\x04\x18\xff\xff\x7f",
    ),
}
"""What readers of these formats have fallen for elsewhere."""


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_reads_its_own_seeds(name: str) -> None:
    outcomes = [judge_closely(TARGETS[name], seed) for seed in TARGETS[name].seeds()]
    assert all(len(seed) <= TARGETS[name].longest for seed in TARGETS[name].seeds())
    # An answer of a PCCS is one of three, and read as all of them; documents are read as signed twice.
    if name not in ("pccs-answer", "signed-document"):
        assert ACCEPTED in outcomes


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_comes_is_accepted_or_refused_by_a_stable_code(name: str) -> None:
    target = TARGETS[name]
    seeds = target.seeds()

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(seeds), EDITS)
    def changed(seed: bytes, edits: list[Edit]) -> None:
        for edit in edits:
            seed = edit.apply(seed)
        judge(target, seed)

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=200))
    def arbitrary(data: bytes) -> None:
        judge(target, data)

    changed()
    arbitrary()


@pytest.mark.parametrize("case", FOUND | HARD)
def test_an_input_that_is_made_to_break_a_reader_is_refused(case: str) -> None:
    name, data = (FOUND | HARD)[case]
    assert judge_closely(TARGETS[name], data) != ACCEPTED


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"a = " + b"9" * 5000, "too many digits"),
        (b"a = " + b"[" * 5000, "nested too deep"),
        (b"a = '\xff'", "not UTF-8"),
        (b"a = ", "not TOML"),
    ],
)
def test_toml_is_wrong_in_one_way_and_quotes_nothing(data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why) as raised:
        toml.read(data)
    assert type(raised.value) is ValueError
    assert len(str(raised.value)) < 200


def _never_ends(data: bytes) -> None:
    while True:
        pass


def _wrong_code(data: bytes) -> None:
    class Other(FrameInvalid):
        """Has its parent's code."""

    raise Other("no code of its own")


def _no_code(data: bytes) -> None:
    raise StipError("what is it?")


def _repeats(data: bytes) -> None:
    raise FrameInvalid(data.decode() * 100)


def _crashes(data: bytes) -> None:
    raise KeyError("a table")


def _hoards(data: bytes) -> None:
    bytes(2 * MEMORY)


@pytest.mark.parametrize(
    ("read", "breach"),
    [(_wrong_code, Broken), (_no_code, Broken), (_repeats, Broken), (_crashes, KeyError), (_hoards, Broken),
     (_never_ends, Broken)],
    ids=["another's code", "no code", "its input in the message", "another exception", "too much memory", "no end"],
)  # fmt: skip
def test_a_broken_promise_is_found(read: object, breach: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzz.target.SECONDS", 0.2)
    with pytest.raises(breach):
        judge_closely(Target("broken", read, list), b"input " * 8)  # type: ignore[arg-type]
