"""The enclave's head against torch's linear over the same weights: `python -m benchmarks.head_step`.

Prints milliseconds a step and the ratio, on one thread. The two are taken in turns, the best of several rounds each:
read ratios.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import ml_dtypes
import numpy as np
import torch

from stip_enclave.head import Head
from stip_enclave.tables import SealedTensor

ROWS = (1, 4, 8, 16, 64)
SHAPES = ((50_257, 768), (32_000, 1024))
"""Vocabulary and width: GPT-2 124M, a 220M Llama."""
DTYPES = {"float32": np.dtype("<f4"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
ROUNDS = 5


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'V':>6} {'d':>5} {'dtype':>9} {'rows':>5} {'linear ms':>10} {'head ms':>8} {'ratio':>6}")
    for vocabulary, width in SHAPES:
        for dtype, number in DTYPES.items():
            generator = np.random.default_rng(width)
            plain = bytearray(generator.standard_normal((vocabulary, width), np.float32).astype(number).tobytes())
            weight = torch.frombuffer(plain, dtype=getattr(torch, dtype)).view(vocabulary, width)
            head = Head(SealedTensor(plain, np.frombuffer(plain, number).reshape(vocabulary, width)), None, dtype)
            for rows in ROWS:
                hidden = generator.standard_normal((rows, width), np.float32).astype(number)
                linear, own = _both(hidden, weight, head)
                print(
                    f"{vocabulary:>6} {width:>5} {dtype:>9} {rows:>5} {linear:>10.2f} {own:>8.2f} {own / linear:>6.2f}"
                )


def _both(hidden: np.ndarray, weight: torch.Tensor, head: Head) -> tuple[float, float]:
    """Milliseconds of torch's linear and of the head, both to float32 in NumPy."""
    tensor = torch.from_numpy(hidden.view(np.uint8).copy()).view(weight.dtype)

    def linear() -> None:
        with torch.inference_mode():
            torch.nn.functional.linear(tensor, weight).float().numpy()

    def timed(work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - began)

    rounds = [(timed(linear), timed(lambda: head.logits(hidden))) for _ in range(ROUNDS + 1)]
    return min(one for one, _ in rounds[1:]), min(other for _, other in rounds[1:])


if __name__ == "__main__":
    main()
