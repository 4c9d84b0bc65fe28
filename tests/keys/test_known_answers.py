"""The same keys from the same root: as committed, as the standards say, and in processes with other arithmetic."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .answers import ROOT, TABLES, answers
from .reference import SALT, Matrix, Reference, chacha20_block, hkdf_sha256, monomial

HERE = Path(__file__).parent
KNOWN: dict[str, dict[str, Any]] = json.loads((HERE / "known_answers.json").read_text())
TOLERANCE = 1e-12
"""Of dense keys, absolute; entries are at most 4. Other arithmetic moved those of 2,048 dimensions by 4e-15."""


def close(a: Any, b: Any) -> bool:
    return bool(np.allclose(a, b, rtol=0, atol=TOLERANCE))


def test_the_known_answers_are_those_of_the_cases() -> None:
    cases = {kind: set(cases) for kind, cases in TABLES["small"].items()}
    assert cases == {kind: set(values) for kind, values in KNOWN.items()} == {"exact": set(EXACT), "dense": set(DENSE)}


@pytest.mark.parametrize("name", KNOWN["exact"])
def test_integers_signs_and_permutations_are_as_committed_to_the_byte(name: str) -> None:
    assert answers("small")["exact"][name] == KNOWN["exact"][name]


@pytest.mark.parametrize("name", KNOWN["dense"])
def test_dense_keys_are_as_committed(name: str) -> None:
    assert close(answers("small")["dense"][name], KNOWN["dense"][name])


def test_the_reference_is_chacha20() -> None:
    """RFC 8439, appendix A.1, vectors 1 and 2."""
    assert chacha20_block(bytes(32), 0).hex().startswith("76b8e0ada0f13d90405d6ae55386bd28")
    assert chacha20_block(bytes(32), 1).hex().startswith("9f07e7be5551387a98ba977c732d080d")


def words(values: list[int]) -> str:
    return struct.pack(f"<{len(values)}q", *values).hex()


def paired(signs: list[float]) -> list[int]:
    return [*range(2 * len(signs)), *(int(sign) for sign in signs * 2)]


def signed(stream: Reference, size: int) -> list[int]:
    return stream.order(size) + [int(sign) for sign in stream.signs(size)]


EXACT: dict[str, Callable[[Reference], str]] = {
    "bytes": lambda stream: struct.pack("<9Q", *stream.words(9)).hex(),
    "integers below 10": lambda stream: words(stream.integers(10, 12)),
    "integers below 3 * 2^61": lambda stream: words(stream.integers(3 << 61, 12)),
    "uniforms * 2^53": lambda stream: words([int(u * 2**53) for u in stream.uniforms(4)]),
    "permutation of 1": lambda stream: words(stream.order(1)),
    "permutation of 5": lambda stream: words(stream.order(5)),
    "permutation of 24": lambda stream: words(stream.order(24)),
    "vocabulary of 11": lambda _: words(Reference(hkdf_sha256(ROOT, SALT, b"space/vocabulary"), "key").order(11)),
    "pair signs of 12": lambda stream: words(paired(stream.signs(6))),
    "signed permutation of 7": lambda stream: words(signed(stream, 7)),
}


def scaled(stream: Reference, size: int) -> list[float]:
    return [sign * scale for sign, scale in zip(stream.signs(size), stream.scales(size), strict=True)]


def turns(stream: Reference, half: int) -> Matrix:
    scale, angle = stream.scales(half), [2 * np.pi * u for u in stream.uniforms(half)]
    matrix = np.zeros((2 * half, 2 * half))
    for j in range(half):
        cosine, sine = scale[j] * np.cos(angle[j]), scale[j] * np.sin(angle[j])
        matrix[np.ix_([j, j + half], [j, j + half])] = [[cosine, -sine], [sine, cosine]]
    return [list(row) for row in matrix]


DENSE: dict[str, Callable[[Reference], list[float] | Matrix]] = {
    "normals": lambda stream: stream.normals(5),
    "monomial of 4": lambda stream: monomial(stream.order(4), scaled(stream, 4)),
    "positive monomial of 4": lambda stream: monomial(stream.order(4), stream.scales(4)),
    "pair scales of 6": lambda stream: monomial([*range(6)], scaled(stream, 3) * 2),
    "pair scalars of 4": lambda stream: turns(stream, 2),
    "orthogonal of 4": lambda stream: stream.haar(4),
    "centred orthogonal of 1": lambda _: [[0.0]],
    "centred orthogonal of 4": lambda stream: stream.centred(4),
}


@pytest.mark.parametrize("name", EXACT)
def test_the_standards_give_the_committed_integers(name: str) -> None:
    assert EXACT[name](Reference(ROOT, name)) == KNOWN["exact"][name]


@pytest.mark.parametrize("name", DENSE)
def test_plain_arithmetic_gives_the_committed_dense_keys(name: str) -> None:
    assert close(DENSE[name](Reference(ROOT, name)), KNOWN["dense"][name])


NUMPY_EXTENSIONS = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
"""What this NumPy uses of this processor beyond what it needs: without it, other logarithms, cosines and sorts run."""
ARITHMETIC = {
    "one thread": {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    "two threads": {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"},
    "OpenBLAS for SSE3": {"OPENBLAS_CORETYPE": "Prescott"},
    "OpenBLAS for AVX2": {"OPENBLAS_CORETYPE": "Haswell"},
    "NumPy without extensions": {"NPY_DISABLE_CPU_FEATURES": " ".join(NUMPY_EXTENSIONS)},
    "other hashes": {"PYTHONHASHSEED": "12345"},
}


def answers_of_a_process(settings: dict[str, str]) -> dict[str, dict[str, Any]]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("OMP", "OPENBLAS", "NPY"))}
    finished = subprocess.run(
        [sys.executable, str(HERE / "answers.py"), "large"], env=plain | settings, capture_output=True, check=True
    )
    drawn: dict[str, dict[str, Any]] = json.loads(finished.stdout)
    return drawn


@pytest.fixture(scope="module")
def here() -> dict[str, dict[str, Any]]:
    return answers("large")


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_processes_with_other_arithmetic_draw_the_same_keys(arithmetic: str, here: dict[str, dict[str, Any]]) -> None:
    drawn = answers_of_a_process(ARITHMETIC[arithmetic])
    assert drawn["exact"] == here["exact"]
    assert {name for name, values in here["dense"].items() if not close(drawn["dense"][name], values)} == set()
