"""One turn of a session as a client asks for it, checked before anything of it is used."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stip_enclave.config import Limits
from stip_enclave.sampling import Sampler, Sampling
from stip_protocol.errors import FrameInvalid, RequestInvalid
from stip_protocol.fields import ID_BYTES
from stip_protocol.wire import enclave_pb2


@dataclass(slots=True, eq=False)
class Turn:
    """A running turn."""

    sampler: Sampler
    stop_ids: frozenset[int] = field(repr=False)
    max_tokens: int
    began: float
    """Arrival, `time.perf_counter`."""
    drafts: int = 0
    """Ids guessed ahead a round trip, at most."""
    step: int = 0
    """Tokens sampled in this turn so far: the index of the next draw."""
    last: float | None = None
    """When the last token was sampled."""
    compute: float = 0.0
    """Seconds of model compute reported since then."""
    ended: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class TurnRequest:
    """A turn's new ids and how to go on from them."""

    ids: NDArray[np.uint32] = field(repr=False)
    turn: Turn

    @classmethod
    def read(cls, message: enclave_pb2.Turn, limits: Limits) -> TurnRequest:
        """Raises `FrameInvalid` (bytes, counts) or `RequestInvalid` (sampling), quoting no id."""
        wanted = message.sampling
        ids = _ids(message.ids, "turn ids", limits.ids_per_turn)
        stop_ids = _ids(wanted.stop_ids, "sampling stop_ids", limits.stop_ids)
        if wanted.max_tokens < 1:
            raise RequestInvalid.because("sampling max_tokens", 0, "at least 1")
        if wanted.drafts > limits.drafts:
            raise RequestInvalid.because("sampling drafts", wanted.drafts, f"0 to {limits.drafts}")
        sampling = Sampling(temperature=wanted.temperature, top_k=wanted.top_k, top_p=wanted.top_p, seed=wanted.seed)
        stops, began = frozenset(stop_ids.tolist()), time.perf_counter()
        return cls(ids, Turn(Sampler(sampling), stops, wanted.max_tokens, began, wanted.drafts))


def _ids(data: bytes, what: str, limit: int) -> NDArray[Any]:
    if len(data) % ID_BYTES or len(data) > limit * ID_BYTES:
        raise FrameInvalid.because(what, f"{len(data)} bytes", f"a multiple of {ID_BYTES}, at most {limit * ID_BYTES}")
    return np.frombuffer(data, "<u4")
