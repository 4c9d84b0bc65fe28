"""From hidden states to what sessions get: rows, the largest logits, or the row that the engine picks from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from stip_protocol.errors import TensorInvalid
from stip_server.engine import TOP_COUNT, Form, Hidden, Logits, Top
from stip_server.engines.transfer import Transfer


class Piece(Protocol):
    """One session's part of a step, as far as computing it goes (`scheduler.Work` is one)."""

    @property
    def slot(self) -> int: ...
    @property
    def position(self) -> int:
        """Of the first row."""
        ...

    @property
    def count(self) -> int: ...
    @property
    def rows(self) -> Sequence[memoryview]:
        """`count` rows in the model's dtype or, of `Form.IDS`, uint32 ids."""
        ...

    @property
    def form(self) -> Form: ...
    @property
    def outputs(self) -> int:
        """How many of the last rows are answered."""
        ...


@dataclass(frozen=True)
class LogitsRow:
    """The full row behind an output, where it was computed."""

    batch: torch.Tensor = field(repr=False)
    index: int

    def alone(self) -> LogitsRow:
        """The row in memory of its own."""
        return self if len(self.batch) == 1 else LogitsRow(self.batch[self.index : self.index + 1].clone(), 0)

    def read(self) -> Logits:
        """The row as it is sent."""
        return Logits(_bytes(self.batch[self.index].cpu()))


@dataclass(frozen=True)
class Result:
    """What one session got from a step: outputs, an error that ends it, or nothing yet."""

    out: Hidden | Top | None = None
    """All outputs of the step, one after the other."""
    logits: tuple[LogitsRow, ...] = ()
    """Of `Form.TOP` one row an output; of `Form.IDS` the last one's."""
    error: TensorInvalid | None = None


@dataclass(frozen=True)
class Answer:
    """What was computed for the sessions of one form."""

    due: list[int]
    """Their places in the step's work."""
    counts: list[int]
    """Outputs of each."""
    parts: tuple[torch.Tensor, ...] = field(repr=False)
    """What is sent or looked at, [outputs, ...] each."""
    logits: torch.Tensor | None = field(default=None, repr=False)
    """[outputs, vocabulary], which stay where they are."""


class Outputs:
    """Answers the rows of a step. `head` maps hidden states to logits, which leave it as cap · tanh(x / cap) where
    there is a `cap`."""

    def __init__(self, head: nn.Module | None, cap: float | None, transfer: Transfer) -> None:
        self._head, self._cap, self._transfer = head, cap, transfer
        self._forms = {
            Form.HIDDEN: (self._hidden, _hidden_results),
            Form.TOP: (self._top, _top_results),
            Form.IDS: (self._ids, _ids_results),
        }

    def results(self, work: Sequence[Piece], hidden: torch.Tensor, starts: Sequence[int]) -> list[Result]:
        """One result a piece. `hidden` [rows, d] holds the first row of each piece at its start."""
        finite = torch.isfinite(hidden).all(dim=-1)
        # Also for rows that are not finite: what is computed must not depend on what this process alone has seen,
        # because others may hold parts of the same head (see `parallel`).
        answers = {form: a for form in self._forms if (a := self._answer(form, work, hidden, starts)) is not None}
        copies = iter(self._transfer.down([finite, *(part for a in answers.values() for part in a.parts)]))
        good = next(copies).tolist()
        results = [Result()] * len(work)
        for form, answer in answers.items():
            parts = [next(copies) for _ in answer.parts]
            for i, result in zip(answer.due, self._forms[form][1](answer, parts), strict=True):
                results[i] = result
        return [
            result if all(good[start : start + w.count]) else Result(error=_overflow())
            for w, start, result in zip(work, starts, results, strict=True)
        ]

    def _answer(self, form: Form, work: Sequence[Piece], hidden: torch.Tensor, starts: Sequence[int]) -> Answer | None:
        due = [i for i, w in enumerate(work) if w.outputs and w.form is form]
        if not due:
            return None
        counts = [1 if form is Form.IDS else work[i].outputs for i in due]
        ends = [starts[i] + work[i].count for i in due]
        chosen = [row for end, count in zip(ends, counts, strict=True) for row in range(end - count, end)]
        if chosen != list(range(len(hidden))):
            hidden = hidden[self._transfer.up(torch.tensor(chosen))]
        parts, logits = self._forms[form][0](hidden)
        return Answer(due, counts, parts, logits)

    def _hidden(self, hidden: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        return (hidden,), None

    def _top(self, hidden: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        logits = self._logits(hidden)
        values, indices = torch.topk(logits, min(TOP_COUNT, logits.shape[-1]))
        wide = logits if logits.dtype is torch.float64 else logits.float()
        return (indices.to(torch.int32), values, torch.logsumexp(wide, dim=-1).float()), logits

    def _ids(self, hidden: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        logits = self._logits(hidden)
        # Finite where the log-sum-exp is, and twenty times as fast.
        return (logits.amax(dim=-1),), logits

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self._head is not None
        logits: torch.Tensor = self._head(hidden)
        if self._cap is not None:
            logits = soft_capped(logits, self._cap)
        return logits


def _hidden_results(answer: Answer, parts: list[torch.Tensor]) -> list[Result]:
    return [Result(Hidden(piece)) for piece in _cut(parts[0], answer.counts)]


def _top_results(answer: Answer, parts: list[torch.Tensor]) -> list[Result]:
    indices, _, sums = parts
    good, count, logits = torch.isfinite(sums).tolist(), indices.shape[-1], answer.logits
    assert logits is not None
    results = []
    pieces = [_cut(part, answer.counts) for part in parts]
    for start, outputs, i, v, s in zip(_starts(answer.counts), answer.counts, *pieces, strict=True):
        rows = tuple(LogitsRow(logits, row) for row in range(start, start + outputs))
        whole = all(good[start : start + outputs])
        results.append(Result(Top(count, i, v, s), rows) if whole else Result(error=_overflow()))
    return results


def _ids_results(answer: Answer, parts: list[torch.Tensor]) -> list[Result]:
    logits = answer.logits
    assert logits is not None
    return [
        Result(logits=(LogitsRow(logits, row),)) if good else Result(error=_overflow())
        for row, good in enumerate(torch.isfinite(parts[0]).tolist())
    ]


def _overflow() -> TensorInvalid:
    return TensorInvalid.because("hidden state", "a value that is not finite", "rows in the model's range")


def _bytes(tensor: torch.Tensor) -> bytes:
    """Row-major bytes in native dtype."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _starts(counts: list[int]) -> list[int]:
    return [0, *itertools.accumulate(counts[:-1])]


def _cut(tensor: torch.Tensor, counts: list[int]) -> list[bytes]:
    """The bytes of `counts` rows each."""
    data = _bytes(tensor)
    size = len(data) // len(tensor)
    return [data[start * size : (start + count) * size] for start, count in zip(_starts(counts), counts, strict=True)]


def soft_capped(numbers: torch.Tensor, cap: float) -> torch.Tensor:
    """cap · tanh(x / cap), in the order and dtype in which transformers computes it."""
    return torch.tanh(numbers / cap) * cap
