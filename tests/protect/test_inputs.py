"""What is run: drawn, read and batched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stip_keyservice.protect.equivalence.inputs import FILE_LIMIT, SEQUENCES_LIMIT, Inputs, read_ids
from stip_protocol.errors import ConfigurationError

LENGTHS = st.lists(st.integers(1, 20), max_size=12)


@given(LENGTHS, LENGTHS, st.integers(1, 50))
def test_batches_hold_every_sequence_once_and_no_more_rows_than_allowed(
    random: list[int], provided: list[int], rows: int
) -> None:
    def sequences(lengths: list[int], first: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.full((length,), first + number) for number, length in enumerate(lengths))

    inputs = Inputs(sequences(random, 1), sequences(provided, 1000))
    seen: list[tuple[int, int]] = []
    for batch in inputs.batches(rows):
        assert batch.ids.shape == batch.valid.shape
        assert batch.ids.numel() <= rows or len(batch.ids) == 1
        for ids, valid, is_given in zip(batch.ids, batch.valid, batch.given, strict=True):
            kept = ids[valid]
            assert (kept == kept[0]).all()
            assert bool(is_given) == (int(kept[0]) >= 1000)
            seen.append((int(kept[0]), len(kept)))
    marked = [*enumerate(random, 1), *enumerate(provided, 1000)]
    assert sorted(seen) == marked
    assert inputs.positions == sum(random) + sum(provided)


def test_a_seed_gives_the_same_sequences_again() -> None:
    first, again, other = (Inputs.draw(50, 3, 8, seed).random for seed in (1, 1, 2))
    assert torch.equal(torch.stack(first), torch.stack(again))
    assert not torch.equal(torch.stack(first), torch.stack(other))


def test_a_file_of_ids_is_read(tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("[[0, 9], [4]]")
    found = read_ids(tmp_path / "ids", vocabulary=10, max_positions=2)
    assert [ids.tolist() for ids in found] == [[0, 9], [4]]
    assert all(ids.dtype == torch.int64 for ids in found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[1], ", "ids: got no JSON"),
        ("[" * 100_000, "ids: got no JSON"),
        ('{"a": 1}', "ids: got no list"),
        ("[]", f"ids: got 0 sequences, allowed: a list of 1 to {SEQUENCES_LIMIT}"),
        (json.dumps([[1]] * (SEQUENCES_LIMIT + 1)), f"ids: got {SEQUENCES_LIMIT + 1} sequences"),
        ("[[1], 2]", "ids, sequence 2: got no list"),
        ("[[]]", "ids, sequence 1: got 0 ids, allowed: a list of 1 to 3 ids"),
        ("[[1, 1, 1, 1]]", "ids, sequence 1: got 4 ids"),
        ("[[1, 10]]", "ids, sequence 1, position 1: got no id of the model, allowed: 0 to 9"),
        ("[[-1]]", "ids, sequence 1, position 0"),
        ("[[1.0]]", "ids, sequence 1, position 0"),
        ("[[true]]", "ids, sequence 1, position 0"),
        ('[["7"]]', "ids, sequence 1, position 0"),
        (" " * (FILE_LIMIT + 1), "ids: got a larger file"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_file_that_is_no_list_of_lists_of_ids_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "ids").write_text(content)
    with pytest.raises(ConfigurationError) as raised:
        read_ids(tmp_path / "ids", vocabulary=10, max_positions=3)
    assert raised.value.message.startswith(message)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ids").write_bytes(b"[[1\xff]]")
    with pytest.raises(ConfigurationError, match="ids: got no JSON"):
        read_ids(tmp_path / "ids", vocabulary=10, max_positions=3)
