"""How the enclave is asked to sample, checked before anything is sent."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from stip_protocol.errors import RequestInvalid
from stip_protocol.fields import ID_BYTES, STOP_IDS
from stip_protocol.tensor import FRAME_LIMIT
from stip_protocol.wire import enclave_pb2

SEED_BITS = 64
MAX_TOKENS_LIMIT = 2**31 - 1
DRAFTS_LIMIT = 7


@dataclass(frozen=True, slots=True)
class Sampling:
    """One turn's sampling. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off.

    `drafts` tokens at most are guessed ahead a round trip, from repetition in the session's text; 0 is off. The answer
    is the same, sooner where the text repeats itself. The operator sees how many guesses were right, and so how
    repetitive the text is and where; guesses that were wrong count against the user's budget like other rows.

    The same seed gives the same draw at the same step; None draws a seed. Raises `RequestInvalid`.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_ids: tuple[int, ...] = field(default=(), repr=False)
    drafts: int = 0

    def __post_init__(self) -> None:
        for name, got, ok, allowed in (
            ("max_tokens", self.max_tokens, 1 <= self.max_tokens <= MAX_TOKENS_LIMIT, "1 or more"),
            ("temperature", self.temperature, math.isfinite(self.temperature) and self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k, 0 <= self.top_k < 2**31, "0 (off) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1 (off)"),
            ("seed", self.seed, self.seed is None or 0 <= self.seed < 2**SEED_BITS, f"0 to 2^{SEED_BITS} - 1"),
            ("drafts", self.drafts, 0 <= self.drafts <= DRAFTS_LIMIT, f"0 (off) to {DRAFTS_LIMIT}"),
            ("stop_ids", f"{len(self.stop_ids)} ids", len(self.stop_ids) <= STOP_IDS, f"{STOP_IDS}"),
        ):
            if not ok:
                raise RequestInvalid.because(name, got, allowed)
        if self.seed is None:
            object.__setattr__(self, "seed", secrets.randbits(SEED_BITS))

    def to_wire(self) -> enclave_pb2.Sampling:
        return enclave_pb2.Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed or 0,
            stop_ids=pack(self.stop_ids),
            max_tokens=self.max_tokens,
            drafts=self.drafts,
        )


def pack(ids: Iterable[int]) -> bytes:
    """Ids as uint32, little-endian."""
    return b"".join(id_.to_bytes(ID_BYTES, "little") for id_ in ids)


def require_ids(ids: Sequence[int], *, vocabulary: int, what: str) -> None:
    """Raise `RequestInvalid`, never quoting an id, unless `ids` are ids of this vocabulary that fit in one frame."""
    if not ids:
        raise RequestInvalid.because(what, "no id", "at least one")
    if len(ids) * ID_BYTES > FRAME_LIMIT:
        raise RequestInvalid.because(what, f"{len(ids)} ids", f"at most {FRAME_LIMIT // ID_BYTES}")
    if not all(type(id_) is int and 0 <= id_ < vocabulary for id_ in ids):
        raise RequestInvalid.because(what, "an id outside of the vocabulary", f"0 to {vocabulary - 1}")
