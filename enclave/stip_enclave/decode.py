"""Outputs to tokens: one reply frame at a time, for all the sessions it carries.

Runs in the link's reader: no task per session or token. What leaves for the replica is queued before what leaves
for the clients, so that the next step waits for nobody.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stip_enclave.head import INLINE_WORK, Head
from stip_enclave.link import Delivery
from stip_enclave.replies import Outputs
from stip_enclave.sampling import NeedsFullRow
from stip_enclave.session import Session
from stip_enclave.turns import Turn
from stip_protocol.errors import TensorInvalid
from stip_protocol.telemetry import Telemetry


class Decoder:
    """The head and the sampling of one instance."""

    def __init__(self, head: Head | None, true_ids: NDArray[np.int32] | None, telemetry: Telemetry) -> None:
        """`head` where it is in the enclave; where it is not, `true_ids` [V]: π_c, from permuted ids to true ones."""
        self._head, self._true_ids = head, true_ids
        self._head_time, self._sample_time = telemetry.stage("head"), telemetry.stage("sample")

    async def deliver(self, delivery: Delivery) -> None:
        """Sample the next token of every session in the delivery, and set their next rows off."""
        asking: list[tuple[Session, Turn]] = []
        rows: list[int] = []
        for row, port in enumerate(delivery.ports):
            session = port.owner
            assert isinstance(session, Session)
            turn = session.asking
            assert turn is not None
            if turn.ended:
                session.answered(turn, None, delivery.compute)
            else:
                asking.append((session, turn))
                rows.append(row)
        if not asking:
            return
        outputs = delivery.outputs.only(rows)
        if outputs.form == "hidden":
            outputs = await self._logits(outputs)
            # Finite hidden states may still overflow the head. A NaN or an infinity shows in the maximum.
            for row in np.flatnonzero(~np.isfinite(outputs.rows.max(axis=1))).tolist():
                asking[row][0].failed(TensorInvalid("reply: a hidden state that overflows the head"))
            kept = [row for row, (session, _) in enumerate(asking) if not session.ended]
            asking, outputs = [asking[row] for row in kept], outputs.only(kept)
        began = time.perf_counter()
        picked = self._pick(outputs, [turn for _, turn in asking])
        self._sample_time.observe(time.perf_counter() - began)
        for (session, turn), token in zip(asking, picked, strict=True):
            if isinstance(token, NeedsFullRow):
                session.needs_row(turn, delivery.compute)
            else:
                session.answered(turn, token, delivery.compute)

    async def _logits(self, outputs: Outputs) -> Outputs:
        assert self._head is not None
        began = time.perf_counter()
        if self._head.work(len(outputs.rows)) <= INLINE_WORK:
            logits = self._head.logits(outputs.rows)
        else:
            logits = await asyncio.to_thread(self._head.logits, outputs.rows)
        self._head_time.observe(time.perf_counter() - began)
        return Outputs("logits", logits, None, None, frozenset())

    def _pick(self, outputs: Outputs, turns: list[Turn]) -> list[int | NeedsFullRow]:
        if outputs.form == "top":
            return [self._pick_top(outputs, row, turn) for row, turn in enumerate(turns)]
        logits: NDArray[Any] = outputs.rows
        if self._true_ids is None and all(turn.sampler.greedy for turn in turns):
            # NumPy's argmax takes the first of equals, which is the smallest true id.
            return [int(token) for token in logits.argmax(axis=1)]
        return [turn.sampler.pick(logits[row], turn.step, self._true_ids) for row, turn in enumerate(turns)]

    def _pick_top(self, outputs: Outputs, row: int, turn: Turn) -> int | NeedsFullRow:
        assert self._true_ids is not None
        assert outputs.indices is not None
        assert outputs.log_sum_exp is not None
        return turn.sampler.pick_top(
            self._true_ids[outputs.indices[row]],
            outputs.rows[row],
            float(outputs.log_sum_exp[row]),
            self._true_ids.size,
            turn.step,
        )
