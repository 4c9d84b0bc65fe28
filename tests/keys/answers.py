"""What keys come out of a fixed root: the cases of `known_answers.json`, and larger ones for other processes.

    python tests/keys/answers.py small > tests/keys/known_answers.json

writes the file again. It must never change: with other answers every instance would lose its vocabulary key, and a
protection could not be repeated from its root.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from stip_protocol.keys import (
    VOCABULARY_LABEL,
    Key,
    KeyStream,
    Monomial,
    derive,
    draw_centred_orthogonal,
    draw_monomial,
    draw_orthogonal,
    draw_pair_scalars,
    draw_pair_scales,
    draw_pair_signs,
    draw_permutation,
    draw_positive_monomial,
    draw_signed_permutation,
    vocabulary_key,
)

ROOT = bytes(range(32))
Case = Callable[[KeyStream], Any]


def _hex(values: Any) -> str:
    """Whole numbers as little-endian 64-bit, so that a sign or a rounded value could not hide."""
    return np.asarray(values, dtype="<i8").tobytes().hex()


def _digest(values: Any) -> str:
    return hashlib.sha256(np.asarray(values, dtype="<i8").tobytes()).hexdigest()


def _moves(key: Key) -> list[list[int]]:
    """An exact key's index and signs."""
    assert isinstance(key, Monomial)
    assert key.exact
    return [key.index.tolist(), key.scale.astype(int).tolist()]


def _vocabulary(size: int) -> Any:
    return vocabulary_key(derive(ROOT, VOCABULARY_LABEL), size).index


def _matrix(draw: Callable[[KeyStream, int], Key], size: int) -> Case:
    return lambda stream: draw(stream, size).matrix().tolist()


TABLES: Mapping[str, Mapping[str, Mapping[str, Case]]] = {
    "small": {
        "exact": {
            "bytes": lambda stream: stream.bytes(72).hex(),
            "integers below 10": lambda stream: _hex(stream.integers(10, 12)),
            "integers below 3 * 2^61": lambda stream: _hex(stream.integers(3 << 61, 12)),
            "uniforms * 2^53": lambda stream: _hex(stream.uniforms(4) * 2.0**53),
            "permutation of 1": lambda stream: _hex(draw_permutation(stream, 1).index),
            "permutation of 5": lambda stream: _hex(draw_permutation(stream, 5).index),
            "permutation of 24": lambda stream: _hex(draw_permutation(stream, 24).index),
            "vocabulary of 11": lambda _: _hex(_vocabulary(11)),
            "pair signs of 12": lambda stream: _hex(_moves(draw_pair_signs(stream, 12))),
            "signed permutation of 7": lambda stream: _hex(_moves(draw_signed_permutation(stream, 7))),
        },
        "dense": {
            "normals": lambda stream: stream.normals(5).tolist(),
            "monomial of 4": _matrix(draw_monomial, 4),
            "positive monomial of 4": _matrix(draw_positive_monomial, 4),
            "pair scales of 6": _matrix(draw_pair_scales, 6),
            "pair scalars of 4": _matrix(draw_pair_scalars, 4),
            "orthogonal of 4": _matrix(draw_orthogonal, 4),
            "centred orthogonal of 1": _matrix(draw_centred_orthogonal, 1),
            "centred orthogonal of 4": _matrix(draw_centred_orthogonal, 4),
        },
    },
    "large": {
        "exact": {
            "integers": lambda stream: _digest(stream.integers(3 << 61, 100_000)),
            "permutation": lambda stream: _digest(draw_permutation(stream, 100_000).index),
            "vocabulary": lambda _: _digest(_vocabulary(256_000)),
            "signed permutation": lambda stream: _digest(_moves(draw_signed_permutation(stream, 10_000))),
            "pair signs": lambda stream: _digest(_moves(draw_pair_signs(stream, 128))),
        },
        "dense": {
            "normals": lambda stream: stream.normals(1001).tolist(),
            "monomial": _matrix(draw_monomial, 64),
            "pair scalars": _matrix(draw_pair_scalars, 64),
            "orthogonal": _matrix(draw_orthogonal, 160),  # more than one block of LAPACK's QR
            "centred orthogonal": _matrix(draw_centred_orthogonal, 100),
        },
    },
}


def answers(table: str) -> dict[str, dict[str, Any]]:
    """Each case of `table` from its own stream, as JSON would give it back."""
    return {
        kind: {name: case(KeyStream(ROOT, name)) for name, case in cases.items()}
        for kind, cases in TABLES[table].items()
    }


if __name__ == "__main__":
    json.dump(answers(sys.argv[1]), sys.stdout, indent=1)
    sys.stdout.write("\n")
