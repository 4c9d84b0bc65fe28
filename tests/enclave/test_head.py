"""The head: the same logits however many rows come at once, in every dtype, and no second copy of its weights."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from stip_enclave.head import PACKED, Head
from stip_enclave.tables import NUMPY_DTYPE, SealedTensor

EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10, "float64": 2.0**-52}


class Buffer(bytearray):
    """Memory whose end can be noticed."""


def sealed(array: np.ndarray) -> SealedTensor:
    """A tensor behind a header of odd length, as it lies in its file."""
    plain = Buffer(b"\0" * (8 + 89 * array.itemsize) + array.tobytes())
    return SealedTensor(plain, np.frombuffer(plain, array.dtype, offset=len(plain) - array.nbytes).reshape(array.shape))


def drawn(dtype: str, *shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).normal(size=shape).astype(NUMPY_DTYPE[dtype])


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize(("vocabulary", "width"), [(101, 12), (3000, 257), (8000, 128)])
@pytest.mark.parametrize("biased", [False, True])
def test_logits_are_the_product_within_the_rounding_of_their_dtype(
    dtype: str, vocabulary: int, width: int, biased: bool
) -> None:
    weight, hidden = drawn(dtype, vocabulary, width), drawn(dtype, 5, width)
    bias = drawn(dtype, vocabulary) if biased else None
    logits = Head(sealed(weight), None if bias is None else sealed(bias), dtype).logits(hidden)
    exact = hidden.astype(np.float64) @ weight.astype(np.float64).T
    terms = np.abs(hidden.astype(np.float64)) @ np.abs(weight.astype(np.float64)).T
    if bias is not None:
        exact, terms = exact + bias.astype(np.float64), terms + np.abs(bias.astype(np.float64))
    # Sums run in float32 at least; the result is rounded once to the native dtype, twice where b is added behind.
    inner = EPSILON["float64" if dtype == "float64" else "float32"]
    bound = 2 * EPSILON[dtype] * np.abs(exact) + (width + 2) * inner * terms
    assert (np.abs(logits - exact) <= bound).all()
    native = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    assert np.array_equal(logits.astype(native).astype(logits.dtype), logits)


@pytest.mark.parametrize("dtype", [dtype for dtype in ("float32", "bfloat16") if PACKED[dtype]()])
@pytest.mark.parametrize(("vocabulary", "width"), [(101, 12), (3000, 257), (8000, 512)])
def test_a_row_comes_out_the_same_however_many_come_with_it(dtype: str, vocabulary: int, width: int) -> None:
    head, hidden = Head(sealed(drawn(dtype, vocabulary, width)), None, dtype), drawn(dtype, 64, width)
    together = head.logits(hidden)
    for count in (1, 2, 3, 8, 17):
        assert np.array_equal(head.logits(hidden[:count]), together[:count])
    assert np.array_equal(head.logits(hidden[40:41])[0], together[40])


@pytest.mark.parametrize("dtype", [dtype for dtype in PACKED if PACKED[dtype]()])
def test_weights_that_are_laid_out_anew_are_not_kept_twice(dtype: str) -> None:
    tensor: Any = sealed(drawn(dtype, 101, 12))
    gone = weakref.ref(tensor.plain)
    head = Head(tensor, None, dtype)
    del tensor
    gc.collect()
    assert gone() is None
    assert head.work(3) == 3 * 101 * 12


def test_half_precision_logits_are_those_of_torch_bit_by_bit() -> None:
    weight, hidden = drawn("bfloat16", 3000, 256), drawn("bfloat16", 9, 256)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.view(np.uint8).copy()).view(torch.bfloat16)

    expected = torch.nn.functional.linear(tensor(hidden), tensor(weight)).float().numpy()
    assert np.array_equal(Head(sealed(weight), None, "bfloat16").logits(hidden), expected)
