"""What a certificate runs: seeded random sequences of ids, and given ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stip_protocol.errors import ConfigurationError

FILE_LIMIT = 16 << 20
"""Bytes of the largest file of ids."""
SEQUENCES_LIMIT = 4096
"""Sequences of the longest file of ids."""
RANDOM, GIVEN = "random", "given"


@dataclass(frozen=True)
class Batch:
    """Sequences that run together. They are padded on the right, where causal attention does not look."""

    ids: torch.Tensor
    """[samples, length] int64."""
    valid: torch.Tensor
    """[samples, length] bool: what is no padding."""
    given: torch.Tensor
    """[samples] bool."""


@dataclass(frozen=True)
class Inputs:
    """Sequences of ids, each [n], by where they come from."""

    random: tuple[torch.Tensor, ...]
    given: tuple[torch.Tensor, ...] = ()

    @classmethod
    def draw(cls, vocabulary: int, samples: int, length: int, seed: int, given: Sequence[torch.Tensor] = ()) -> Inputs:
        """`samples` uniform random sequences of `length` ids, and the given ones."""
        generator = torch.Generator().manual_seed(seed)
        return cls(tuple(torch.randint(vocabulary, (samples, length), generator=generator)), tuple(given))

    @property
    def positions(self) -> int:
        return sum(len(ids) for ids in (*self.random, *self.given))

    def batches(self, rows: int) -> list[Batch]:
        """All sequences, the longest first, in batches of at most `rows` positions (or one sequence)."""
        marked = [(ids, False) for ids in self.random] + [(ids, True) for ids in self.given]
        return [_padded(batch) for batch in _grouped(sorted(marked, key=lambda pair: -len(pair[0])), rows)]


def read_ids(path: Path, *, vocabulary: int, max_positions: int) -> tuple[torch.Tensor, ...]:
    """The sequences of a JSON list of lists of ids. Raises `ConfigurationError`, which quotes no id."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_LIMIT + 1)
    except OSError as error:
        raise ConfigurationError(f"ids {path}: {error.strerror}", field="ids") from None
    if len(data) > FILE_LIMIT:
        raise ConfigurationError.because("ids", "a larger file", f"at most {FILE_LIMIT} bytes")
    try:
        sequences = json.loads(data)
    except (ValueError, RecursionError):
        raise ConfigurationError.because("ids", "no JSON", "a JSON list of lists of token ids") from None
    if not isinstance(sequences, list) or not 1 <= len(sequences) <= SEQUENCES_LIMIT:
        got = f"{len(sequences)} sequences" if isinstance(sequences, list) else "no list"
        raise ConfigurationError.because("ids", got, f"a list of 1 to {SEQUENCES_LIMIT} lists of token ids")
    for number, ids in enumerate(sequences, 1):
        _check(ids, f"ids, sequence {number}", vocabulary, max_positions)
    return tuple(torch.tensor(ids, dtype=torch.int64) for ids in sequences)


def _check(ids: object, what: str, vocabulary: int, max_positions: int) -> None:
    if not isinstance(ids, list) or not 1 <= len(ids) <= max_positions:
        got = f"{len(ids)} ids" if isinstance(ids, list) else "no list"
        raise ConfigurationError.because(what, got, f"a list of 1 to {max_positions} ids")
    for position, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < vocabulary:
            raise ConfigurationError.because(
                f"{what}, position {position}", "no id of the model", f"0 to {vocabulary - 1}"
            )


def _grouped(pairs: Sequence[tuple[torch.Tensor, bool]], rows: int) -> Iterator[Sequence[tuple[torch.Tensor, bool]]]:
    start = 0
    while start < len(pairs):
        count = max(1, rows // len(pairs[start][0]))
        yield pairs[start : start + count]
        start += count


def _padded(batch: Sequence[tuple[torch.Tensor, bool]]) -> Batch:
    ids = torch.nn.utils.rnn.pad_sequence([ids for ids, _ in batch], batch_first=True)
    lengths = torch.tensor([len(ids) for ids, _ in batch])
    valid = torch.arange(ids.shape[1]) < lengths[:, None]
    return Batch(ids, valid, torch.tensor([given for _, given in batch]))
