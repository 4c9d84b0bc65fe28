"""Key streams: cryptographic randomness that an instance's root secret determines, one stream a label.

A label's 32-byte seed is HKDF-SHA256 (RFC 5869) of the root; the seed keys a ChaCha20 keystream (RFC 8439,
zero nonce: a seed keys one stream only). Neither torch's nor NumPy's generators are used anywhere.

Integers, and so permutations, are exact and the same on any machine. Normals go through the platform's log
and cosine, and the matrices made of them through LAPACK: their last bits may differ between machines. That
does not matter: only `protect` draws them, once per instance, both sides of every product see the same
float64 matrix, and what is stored is rounded far above that difference. What other parties expand (the
vocabulary permutation) consists of integers.
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from stip_protocol.errors import ConfigurationError

SEED_BYTES = 32
"""Length of a root secret and of every seed derived from it."""
_SALT = b"stip/keys/v1"
_CHUNK = 1 << 20
"""Words drawn at a time where a draw needs several passes: bounds temporary memory to a few times 8 MiB."""


def derive(root: bytes, label: str) -> bytes:
    """The 32-byte seed of `label` under `root`: can be handed out without the root or any other label.

    Raises `ConfigurationError` where `root` is not 32 bytes or `label` is empty.
    """
    if len(root) != SEED_BYTES:
        raise ConfigurationError.because("root secret", f"{len(root)} bytes", f"{SEED_BYTES} bytes")
    if not label:
        raise ConfigurationError.because("key label", "an empty label", "a name")
    return HKDF(algorithm=SHA256(), length=SEED_BYTES, salt=_SALT, info=label.encode()).derive(root)


class KeyStream:
    """One label's stream. Draws advance it: the same draws in the same order give the same values."""

    def __init__(self, root: bytes, label: str) -> None:
        """`root` is a 32-byte secret: an instance's root, or a seed that `derive` gave."""
        self._keystream = Cipher(algorithms.ChaCha20(derive(root, label), bytes(16)), mode=None).encryptor()

    def __repr__(self) -> str:
        return "KeyStream()"

    def bytes(self, count: int) -> bytes:
        """The next `count` bytes."""
        return self._keystream.update(bytes(count))

    def words(self, count: int) -> NDArray[np.uint64]:
        """`count` uniform 64-bit words (little-endian in the stream)."""
        return np.frombuffer(self.bytes(8 * count), dtype="<u8").astype(np.uint64, copy=False)

    def integers(self, bound: int, count: int) -> NDArray[np.int64]:
        """`count` uniform integers in [0, bound), unbiased: words at or above the last multiple are rejected."""
        if not 1 <= bound <= 1 << 63:
            raise ConfigurationError.because("bound", bound, "1 .. 2^63")
        limit = (1 << 64) - (1 << 64) % bound
        accepted: list[NDArray[np.uint64]] = []
        missing = count
        while missing:
            words = self.words(missing)
            kept = words if limit == 1 << 64 else words[words < np.uint64(limit)]
            accepted.append(kept)
            missing -= kept.size
        drawn = np.concatenate(accepted) if accepted else np.empty(0, np.uint64)
        return (drawn % np.uint64(bound)).astype(np.int64)

    def uniforms(self, count: int) -> NDArray[np.float64]:
        """`count` uniform float64 in (0, 1]: multiples of 2⁻⁵³, never 0."""
        return ((self.words(count) >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53

    def normals(self, count: int) -> NDArray[np.float64]:
        """`count` standard normals in float64 (Box and Muller 1958)."""
        out = np.empty(count + count % 2)
        for start in range(0, out.size, 2 * _CHUNK):
            half = min(2 * _CHUNK, out.size - start) // 2
            radius = np.sqrt(-2.0 * np.log(self.uniforms(half)))
            angle = 2.0 * np.pi * self.uniforms(half)
            out[start : start + half] = radius * np.cos(angle)
            out[start + half : start + 2 * half] = radius * np.sin(angle)
        return out[:count]
