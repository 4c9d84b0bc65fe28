"""What an enclave does for a server that decodes alone: true ids to permuted ones, and back.

The operator sees a substitution cipher over the vocabulary (docs/protection.md); no table is in the enclave.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stip_protocol.errors import RequestInvalid
from stip_protocol.keys import vocabulary_key
from stip_protocol.wire import model_pb2


class Substitution:
    """π_c of one instance, both ways."""

    def __init__(self, seed: bytes, vocabulary: int) -> None:
        """`seed`: the grant's vocabulary seed."""
        key = vocabulary_key(seed, vocabulary)
        self.vocabulary = vocabulary
        self._true = key.index.astype(np.uint32)
        self._permuted = key.inverse.index.astype("<u4")

    def feed(
        self, slices: list[model_pb2.Slice], ids: NDArray[np.uint32], positions: NDArray[np.int64]
    ) -> model_pb2.Feed:
        """A frame of true ids [n]; positions are the server's to add."""
        return model_pb2.Feed(slices=slices, ids=self.permuted(ids))

    def permuted(self, ids: NDArray[Any]) -> bytes:
        """uint32 little-endian, of true ids [n]. Raises `RequestInvalid`."""
        self.require_ids(ids)
        permuted: bytes = self._permuted[ids].tobytes()
        return permuted

    def true(self, ids: NDArray[np.uint32]) -> list[int]:
        """True ids of permuted ones [n] that were checked to be in the vocabulary."""
        true: list[int] = self._true[ids].tolist()
        return true

    def require_ids(self, ids: NDArray[Any]) -> None:
        """Raise `RequestInvalid` unless every id is in the vocabulary."""
        require_ids(ids, self.vocabulary)


def require_ids(ids: NDArray[Any], vocabulary: int) -> None:
    """Raise `RequestInvalid` unless every id is in the vocabulary; which one is not, is not said."""
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise RequestInvalid.because("ids", "an id outside the vocabulary", f"0 to {vocabulary - 1}")
