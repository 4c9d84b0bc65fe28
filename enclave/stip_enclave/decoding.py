"""What a session and its way of decoding see of each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from stip_enclave.history import History
from stip_enclave.lease import Holder
from stip_enclave.travel import Travel
from stip_enclave.turns import Turn


class TokenStream(Holder, Protocol):
    """A session, as its way of decoding sees it."""

    history: History
    turn: Turn | None
    """The running one."""
    paused: bool
    """Whether the client has to read before more is sampled for it."""
    max_positions: int

    @property
    def room(self) -> int:
        """Steps that the client may still be behind."""

    def measure(self, turn: Turn, tokens: int, compute: float) -> None:
        """An answer with so many tokens came, `compute` seconds of the model behind it."""

    def accept(self, tokens: Sequence[int]) -> None:
        """Sampled ids of the running turn, in order: they become part of the history and steps for the client, up to
        what ends the turn; what lies behind is dropped."""

    def stop(self) -> None:
        """The running turn came upon a stop id."""

    def tell(self) -> None:
        """Hand the steps of what was accepted to the client."""


class Decoding(Protocol):
    """A way of decoding, as its session sees it: `Stepwise` or `Alone`."""

    travel: Travel

    @property
    def goes_on(self) -> bool:
        """Whether a turn without ids has something to go on from."""

    def begin(self) -> None:
        """A turn has begun; its ids are in the history."""

    def advance(self) -> None:
        """Something that was waited for may be there."""

    def cancelled(self) -> None:
        """The running turn has ended by its client's wish."""
