"""Key streams and draws a second time, in plain Python from the standards: no NumPy, no `cryptography`, no LAPACK.

What both agree on is fixed by RFC 5869, RFC 8439 and arithmetic, not by a machine or a version of a library.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import struct
from collections.abc import Iterator
from itertools import count

SALT = b"stip/keys/v1"
MASK = 0xFFFFFFFF
Matrix = list[list[float]]


def hkdf_sha256(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """RFC 5869 §2.2-2.3 for one block of output."""
    extracted = hmac.new(salt, secret, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()


def chacha20_block(key: bytes, counter: int) -> bytes:
    """RFC 8439 §2.3 with a zero nonce."""
    state = [*struct.unpack("<4I", b"expand 32-byte k"), *struct.unpack("<8I", key), counter, 0, 0, 0]
    work = list(state)
    columns = [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)]
    diagonals = [(0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)]
    for a, b, c, d in (columns + diagonals) * 10:
        for x, y, z, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            work[x] = (work[x] + work[y]) & MASK
            mixed = work[z] ^ work[x]
            work[z] = (mixed << turn | mixed >> (32 - turn)) & MASK
    return struct.pack("<16I", *((a + b) & MASK for a, b in zip(work, state, strict=True)))


class Reference:
    """One label's stream, as `KeyStream` promises it."""

    def __init__(self, root: bytes, label: str) -> None:
        seed = hkdf_sha256(root, SALT, label.encode())
        self._words = self._expand(seed)

    @staticmethod
    def _expand(seed: bytes) -> Iterator[int]:
        for counter in count():
            yield from struct.unpack("<8Q", chacha20_block(seed, counter))

    def words(self, number: int) -> list[int]:
        return [next(self._words) for _ in range(number)]

    def integers(self, bound: int, number: int) -> list[int]:
        accepted: list[int] = []
        while len(accepted) < number:
            (word,) = self.words(1)
            if word < 2**64 // bound * bound:
                accepted.append(word % bound)
        return accepted

    def uniforms(self, number: int) -> list[float]:
        return [((word >> 11) + 1) / 2**53 for word in self.words(number)]

    def normals(self, number: int) -> list[float]:
        half = (number + 1) // 2
        radius = [math.sqrt(-2 * math.log(u)) for u in self.uniforms(half)]
        angle = [2 * math.pi * u for u in self.uniforms(half)]
        cosines = [r * math.cos(a) for r, a in zip(radius, angle, strict=True)]
        return (cosines + [r * math.sin(a) for r, a in zip(radius, angle, strict=True)])[:number]

    def order(self, size: int) -> list[int]:
        while True:
            words = self.words(size)
            if len(set(words)) == size:
                return sorted(range(size), key=words.__getitem__)

    def signs(self, number: int) -> list[float]:
        return [(1.0, -1.0)[bit] for bit in self.integers(2, number)]

    def scales(self, number: int) -> list[float]:
        return [2 ** (2 * u - 1) for u in self.uniforms(number)]

    def haar(self, size: int) -> Matrix:
        """Gram-Schmidt twice over: the one QR whose R has a positive diagonal."""
        normals = self.normals(size * size)
        columns: Matrix = []
        for j in range(size):
            column = normals[j::size]
            for _ in range(2):
                for other in columns:
                    along = math.fsum(a * b for a, b in zip(other, column, strict=True))
                    column = [b - along * a for a, b in zip(other, column, strict=True)]
            length = math.sqrt(math.fsum(a * a for a in column))
            columns.append([a / length for a in column])
        return [list(row) for row in zip(*columns, strict=True)]

    def centred(self, size: int) -> Matrix:
        """H·diag(0, Q)·H, H entry by entry: rows 1/√n, then δ - 1/√n·1/(√n - 1) below (Householder of e₁ and 1/√n)."""
        inner = self.haar(size - 1)
        first = 1 / math.sqrt(size)
        below = first / (math.sqrt(size) - 1)
        reflection = [[first] * size] + [[first] + [(i == j) - below for j in range(1, size)] for i in range(1, size)]
        middle = [[0.0] * size] + [[0.0, *row] for row in inner]
        return product(product(reflection, middle), reflection)


def product(a: Matrix, b: Matrix) -> Matrix:
    return [
        [math.fsum(x * y for x, y in zip(row, column, strict=True)) for column in zip(*b, strict=True)] for row in a
    ]


def monomial(order: list[int], scale: list[float]) -> Matrix:
    return [
        [factor * (column == place) for column in range(len(order))] for place, factor in zip(order, scale, strict=True)
    ]
