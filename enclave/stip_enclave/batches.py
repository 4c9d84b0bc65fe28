"""The picks of one step over all its sessions: the same ids as `sampling.Sampler` gives one by one, bit by bit.

What costs a fixed price a call is done for all rows together. What reads a whole row stays row by row: it is bound by
that row's memory, and a second row beside it would only push the first out of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stip_enclave.sampling import FULL_ROW, LSE_SLACK, Ids, Logits, NeedsFullRow, Sampler, candidates

Draw = tuple[Sampler, int]
"""Under which sampler, at which step."""
FEW = 8
"""Rows below which they are picked one by one: measured, `benchmarks/sampling_step.py`."""


def pick_rows(logits: Logits, rows: Sequence[int], draws: Sequence[Draw], ids: Ids | None = None) -> list[int]:
    """As `Sampler.pick`: the id of each draw from its row of whole rows [n, V]; `ids` [V] as there."""
    if ids is None and len(rows) == len(logits) and all(sampler.greedy for sampler, _ in draws):
        # NumPy's argmax takes the first of equals, which is the smallest true id.
        found: list[int] = logits.argmax(axis=1)[list(rows)].tolist()
        return found
    kept = [at for at, (sampler, _) in enumerate(draws) if _keeps(sampler, logits.shape[1])]
    if len(kept) < FEW:
        kept = []
    together = dict(
        zip(kept, _pick_kept(logits, [rows[at] for at in kept], [draws[at] for at in kept], ids), strict=True)
    )
    return [
        together[at] if at in together else sampler.pick(logits[row], step, ids)
        for at, (row, (sampler, step)) in enumerate(zip(rows, draws, strict=True))
    ]


def pick_tops(
    ids: Ids, values: Logits, log_sum_exp: NDArray[np.float64], vocabulary: int, draws: Sequence[Draw]
) -> list[int | NeedsFullRow]:
    """As `Sampler.pick_top`: the id of each draw from the largest logits of its row, or `FULL_ROW`.

    `ids`: true ids [n, w]; `values` [n, w]: descending; `log_sum_exp` [n].
    """
    width = values.shape[1]
    if len(draws) < FEW or width == vocabulary:
        return [
            sampler.pick_top(ids[row], values[row], float(log_sum_exp[row]), vocabulary, step)
            for row, (sampler, step) in enumerate(draws)
        ]
    if all(sampler.greedy for sampler, _ in draws):
        return _likeliest(ids, values)
    specs = _Specs.of(draws)
    ids, values = _ordered(ids, values)
    last = values[:, -1]
    kept = np.where(specs.greedy, 1, specs.top_k)
    # A tie with the last of them may go on outside, with smaller ids.
    border = values[np.arange(len(draws)), np.clip(kept, 1, width) - 1]
    cut = (kept > 0) & (kept <= width) & (border != last)
    open_ended = (kept == 0) & specs.nucleus & (specs.temperature == 1.0)
    count = np.where(cut, kept, (values > last[:, None]).sum(axis=1))
    mass = _masses(values, specs)
    whole = mass[np.arange(len(draws)), count - 1]
    slack = LSE_SLACK * (8.0 + np.abs(log_sum_exp))
    with np.errstate(over="ignore", invalid="ignore"):  # of rows that a bound does not concern
        total = np.exp(log_sum_exp - values[:, 0].astype(np.float64))
        least, most = np.where(cut, whole, total * (1.0 - slack)), np.where(cut, whole, total * (1.0 + slack))
    at = _place(mass, np.where(cut | open_ended, count, 0), least, most, cut, specs)
    at = np.where(specs.greedy & cut, 0, at)
    found = ids[np.arange(len(draws)), at].tolist()
    return [token if place >= 0 else FULL_ROW for place, token in zip(at.tolist(), found, strict=True)]


def _likeliest(ids: Ids, values: Logits) -> list[int | NeedsFullRow]:
    """The smallest id of the largest value of each row; it may lie outside where all are as large."""
    tied = values == values[:, :1]
    found = np.where(tied, ids, np.iinfo(ids.dtype).max).min(axis=1).tolist()
    return [FULL_ROW if flat else token for flat, token in zip(tied[:, -1].tolist(), found, strict=True)]


@dataclass(frozen=True, slots=True, eq=False)
class _Specs:
    """The settings of several draws, [n] each."""

    greedy: NDArray[np.bool_]
    nucleus: NDArray[np.bool_]
    temperature: NDArray[np.float64]
    """1 where greedy."""
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float64]
    uniform: NDArray[np.float64] = field(repr=False)
    """Drawn; 0 where greedy."""

    @classmethod
    def of(cls, draws: Sequence[Draw]) -> _Specs:
        samplers = [sampler for sampler, _ in draws]
        return cls(
            np.array([sampler.greedy for sampler in samplers]),
            np.array([sampler.nucleus for sampler in samplers]),
            np.array([sampler.spec.temperature or 1.0 for sampler in samplers]),
            np.array([sampler.spec.top_k for sampler in samplers], np.int64),
            np.array([sampler.spec.top_p for sampler in samplers]),
            np.array([0.0 if sampler.greedy else sampler.uniform(step) for sampler, step in draws]),
        )


def _keeps(sampler: Sampler, size: int) -> bool:
    """Whether a sampler draws from the largest few of a row alone."""
    return not sampler.greedy and 0 < sampler.spec.top_k < size


def _pick_kept(logits: Logits, rows: Sequence[int], draws: Sequence[Draw], ids: Ids | None) -> list[int]:
    """Picks of samplers that keep the largest `top_k` of a row."""
    if not rows:
        return []
    specs = _Specs.of(draws)
    found = [candidates(logits[row], sampler.spec.top_k) for row, (sampler, _) in zip(rows, draws, strict=True)]
    width = max(columns.size for columns in found)
    # Behind the candidates of a row: less than any of them.
    columns = np.zeros((len(rows), width), np.intp)
    values = np.full((len(rows), width), -np.inf, logits.dtype)
    for line, (row, own) in enumerate(zip(rows, found, strict=True)):
        columns[line, : own.size] = own
        values[line, : own.size] = logits[row][own]
    tokens, values = _ordered(columns if ids is None else ids[columns], values)
    lines = np.arange(len(rows))
    mass = _masses(values, specs)
    total = mass[lines, specs.top_k - 1]
    at = _place(mass, specs.top_k, total, total, np.ones(len(rows), np.bool_), specs)
    chosen: list[int] = tokens[lines, at].tolist()
    return chosen


def _ordered(ids: Ids, values: Logits) -> tuple[Ids, Logits]:
    """Each row by descending value, then by true id."""
    order = np.lexsort((ids, -values), axis=-1)
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(values, order, axis=1)


def _masses(values: Logits, specs: _Specs) -> NDArray[np.float64]:
    """Cumulated weights exp((x - max) / temperature) of descending rows [n, w], in float64."""
    scaled = values.astype(np.float64)
    with np.errstate(over="ignore", under="ignore"):
        scaled -= scaled[:, :1].copy()
        scaled /= specs.temperature[:, None]
        np.exp(scaled, out=scaled)
    return np.cumsum(scaled, axis=1, out=scaled)


def _place(
    mass: NDArray[np.float64],
    count: NDArray[np.int64],
    least: NDArray[np.float64],
    most: NDArray[np.float64],
    whole: NDArray[np.bool_],
    specs: _Specs,
) -> NDArray[np.int64]:
    """As `Sampler._place`, for the first `count` [n] of rows [n, w]: -1 where it gives None.

    The masses ascend, so that counting those below a bound is what a search for it gives.
    """
    lines, columns = np.arange(len(mass)), np.arange(mass.shape[1])
    inside = columns < count[:, None]

    def below(bound: NDArray[np.float64], compare: Any) -> NDArray[np.int64]:
        counted: NDArray[np.int64] = (compare(mass, bound[:, None]) & inside).sum(axis=1)
        return counted

    end = count - 1
    reached, latest = below(specs.top_p * least, np.less), below(specs.top_p * most, np.less)
    told = (count > 0) & (~specs.nucleus | ((reached == latest) & (whole | (reached <= end))))
    end = np.where(specs.nucleus, np.minimum(end, reached), end)
    drawn = np.where(specs.nucleus, mass[lines, end], least)
    inside = columns <= end[:, None]
    found = below(specs.uniform * drawn, np.less_equal)
    told &= (found <= end) | whole | specs.nucleus
    return np.where(told, np.minimum(found, end), -1)
