"""The sampling of one step over all its sessions against one session at a time: `python -m benchmarks.sampling_step`.

Prints microseconds a step and the ratio. The two are taken in turns, the best of several rounds each: read ratios.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from stip_enclave.batches import Draw, pick_rows, pick_tops
from stip_enclave.sampling import Sampler, Sampling

SESSIONS = (1, 16, 64)
VOCABULARIES = (32_000, 50_257)
ROUNDS, SECONDS = 7, 0.02
"""Rounds a number is taken from, and their least length."""
SPREAD = 4.0
"""Standard deviation of the logits: the few largest then hold most of the mass, as in text."""
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "top-k 50": {"temperature": 0.8, "top_k": 50},
    "top-k 50, top-p 0.9": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "top-p 0.2": {"temperature": 1.0, "top_p": 0.2},
    "all": {"temperature": 1.0},
}


def main() -> None:
    print(f"{'V':>6} {'rows':>5} {'sessions':>8} {'sampling':>20} {'single µs':>10} {'step µs':>9} {'ratio':>6}")
    for vocabulary in VOCABULARIES:
        for form in ("top", "full"):
            for sessions in SESSIONS:
                for way, settings in WAYS.items():
                    if form == "top" and way == "all":
                        continue  # asks for the row
                    draws = [(Sampler(Sampling(seed=seed, **settings)), 9) for seed in range(sessions)]
                    single, step = _both(form, vocabulary, draws)
                    print(
                        f"{vocabulary:>6} {form:>5} {sessions:>8} {way:>20} {single:>10.0f} {step:>9.0f} "
                        f"{step / single:>6.2f}"
                    )


def _both(form: str, vocabulary: int, draws: list[Draw]) -> tuple[float, float]:
    """Microseconds a step, one by one and together."""
    logits = np.random.default_rng(vocabulary).normal(0, SPREAD, (len(draws), vocabulary)).astype(np.float32)
    rows = list(range(len(draws)))
    if form == "full":
        return _timed(
            lambda: [sampler.pick(logits[row], step) for row, (sampler, step) in enumerate(draws)],
            lambda: pick_rows(logits, rows, draws),
        )
    top = np.argsort(-logits, axis=1)[:, :64]
    values = np.take_along_axis(logits, top, axis=1)
    lse = np.log(np.exp(logits.astype(np.float64)).sum(axis=1))

    def single() -> list[Any]:
        return [
            sampler.pick_top(top[row], values[row], float(lse[row]), vocabulary, step)
            for row, (sampler, step) in enumerate(draws)
        ]

    return _timed(single, lambda: pick_tops(top, values, lse, vocabulary, draws))


def _timed(one: Callable[[], Any], other: Callable[[], Any]) -> tuple[float, float]:
    """The best of each in microseconds, in turns."""
    best = [float("inf"), float("inf")]
    for _ in range(ROUNDS):
        for at, work in enumerate((one, other)):
            count, began = 0, time.perf_counter()
            while (took := time.perf_counter() - began) < SECONDS:
                work()
                count += 1
            best[at] = min(best[at], took / count * 1e6)
    return best[0], best[1]


if __name__ == "__main__":
    main()
