"""Outputs to tokens: one reply frame at a time, for all the sessions it carries.

Runs in the link's reader: no task per session or token. What leaves for the replica is queued before what leaves
for the clients, so that the next step waits for nobody.

Drafted ids are verified by picking: the outputs behind them are sampled in order, each with the draw of its own step,
and one counts as long as the ids before it were picked as they were drafted. So a transcript is the same with and
without drafts, draw by draw. (Speculative decoding as published accepts at random, Leviathan et al.,
arXiv 2211.17192: the same distribution, other draws.)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from stip_enclave import outbox
from stip_enclave.batches import Draw, pick_rows, pick_tops
from stip_enclave.head import INLINE_WORK, Head
from stip_enclave.inbox import Delivery
from stip_enclave.outbox import Port
from stip_enclave.replies import Outputs
from stip_enclave.sampling import NeedsFullRow, Sampler
from stip_enclave.turns import Turn
from stip_protocol.errors import TensorInvalid
from stip_protocol.telemetry import Telemetry

INLINE_ENTRIES = 250_000
"""Logits weighed to draw from them that a delivery may have on the event loop: about a millisecond; more go to a
thread, as a large head does."""


class Owner(outbox.Owner, Protocol):
    """The session behind a port, as the decoder sees it."""

    def turn_for(self, port: Port) -> Turn | None:
        """The turn that awaits what came for `port`; None where none does any more: the owner has taken note."""

    def answered(self, turn: Turn, tokens: Sequence[int], compute: float) -> None:
        """Tokens [1 to the outputs wanted] sampled for `turn`, in order, and seconds of model compute."""

    def needs_row(self, turn: Turn, tokens: Sequence[int], compute: float) -> None:
        """As `answered`, maybe without a token, and the largest logits of the next one do not decide: its whole row
        does."""


@dataclass(slots=True, eq=False)
class _Asked:
    """What one port asked, and what was found so far."""

    owner: Owner
    turn: Turn
    row: int
    """Of its first output."""
    drafted: NDArray[np.uint32] = field(repr=False)
    tokens: list[int] = field(default_factory=list, repr=False)
    undecided: bool = False


class Decoder:
    """The head and the sampling of one instance."""

    def __init__(self, head: Head | None, true_ids: NDArray[np.int32] | None, telemetry: Telemetry) -> None:
        """`head` where it is in the enclave; where it is not, `true_ids` [V]: π_c, from permuted ids to true ones."""
        self._head, self._true_ids = head, true_ids
        self._head_time, self._sample_time = telemetry.stage("head"), telemetry.stage("sample")

    async def deliver(self, delivery: Delivery) -> None:
        """Sample the next tokens of every session in the delivery, and set their next rows off.

        A port has one output more than it has `drafted` ids; an answered recall is one output, a whole row.
        """
        outputs, asked = _asked(delivery)
        if outputs.form == "hidden" and asked:
            outputs = await self._logits(outputs)
            asked = _finite(outputs, asked)
        if not asked:
            return
        began = time.perf_counter()
        if _entries(outputs, asked) <= INLINE_ENTRIES:
            self._verify(outputs, asked, [one.turn.sampler for one in asked])
        else:
            # A sampler moves a counter. In a thread it is one of its own: its session may go on elsewhere meanwhile.
            own = [Sampler(one.turn.sampler.spec) for one in asked]
            await asyncio.to_thread(self._verify, outputs, asked, own)
        self._sample_time.observe(time.perf_counter() - began)
        for one in asked:
            tell = one.owner.needs_row if one.undecided else one.owner.answered
            tell(one.turn, one.tokens, delivery.compute)

    async def _logits(self, outputs: Outputs) -> Outputs:
        assert self._head is not None
        began = time.perf_counter()
        if self._head.work(len(outputs.rows)) <= INLINE_WORK:
            logits = self._head.logits(outputs.rows)
        else:
            logits = await asyncio.to_thread(self._head.logits, outputs.rows)
        self._head_time.observe(time.perf_counter() - began)
        return Outputs("logits", logits, None, None, frozenset())

    def _verify(self, outputs: Outputs, asked: list[_Asked], samplers: list[Sampler]) -> None:
        """Pick the first output of all, then the next of those whose pick was the drafted id, and so on."""
        left, depth = list(zip(asked, samplers, [one.turn.step for one in asked], strict=True)), 0
        while left:
            draws = [(sampler, step + depth) for _, sampler, step in left]
            picked = self._pick(outputs, [one.row + depth for one, _, _ in left], draws)
            agreed = []
            for each, token in zip(left, picked, strict=True):
                one = each[0]
                if isinstance(token, NeedsFullRow):
                    one.undecided = True
                    continue
                one.tokens.append(token)
                if depth < len(one.drafted) and token == one.drafted[depth]:
                    agreed.append(each)
            left, depth = agreed, depth + 1

    def _pick(self, outputs: Outputs, rows: list[int], draws: list[Draw]) -> Sequence[int | NeedsFullRow]:
        if outputs.form != "top":
            return pick_rows(outputs.rows, rows, draws, self._true_ids)
        assert self._true_ids is not None
        assert outputs.indices is not None
        assert outputs.log_sum_exp is not None
        ids = self._true_ids[outputs.indices[rows]]
        return pick_tops(ids, outputs.rows[rows], outputs.log_sum_exp[rows], self._true_ids.size, draws)


def _asked(delivery: Delivery) -> tuple[Outputs, list[_Asked]]:
    """What is still wanted of a delivery: its outputs without the others, and whose they are."""
    asked: list[_Asked] = []
    rows: list[int] = []
    row = 0
    for port in delivery.ports:
        drafted = port.drafted[:0] if delivery.outputs.form == "logits" else port.drafted
        count = len(drafted) + 1
        owner = cast(Owner, port.owner)
        if (turn := owner.turn_for(port)) is not None:
            asked.append(_Asked(owner, turn, len(rows), drafted))
            rows.extend(range(row, row + count))
        row += count
    return delivery.outputs.only(rows), asked


def _entries(outputs: Outputs, asked: list[_Asked]) -> int:
    """Logits that are weighed to pick the first output of each, at most: of whole rows, where not the largest wins."""
    if outputs.form == "top":
        return 0
    width: int = outputs.rows.shape[1]
    return width * sum(not one.turn.sampler.greedy for one in asked)


def _finite(logits: Outputs, asked: list[_Asked]) -> list[_Asked]:
    """Those whose logits are finite; the others fail. Finite hidden states may still overflow the head, and a NaN or
    an infinity shows in the maximum."""
    finite = np.isfinite(logits.rows.max(axis=1))
    if finite.all():
        return asked
    good = [one for one in asked if finite[one.row : one.row + len(one.drafted) + 1].all()]
    for one in asked:
        if one not in good:
            one.owner.failed(TensorInvalid("reply: a hidden state that overflows the head"))
    return good
