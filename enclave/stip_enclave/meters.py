"""What sessions measure."""

from __future__ import annotations

import time
from dataclasses import dataclass

from prometheus_client import Counter, Histogram

from stip_enclave.turns import Turn
from stip_protocol.telemetry import ADDED_LATENCY, TIME_BETWEEN_TOKENS, TIME_TO_FIRST_TOKEN, TOKENS, Telemetry


@dataclass(frozen=True, slots=True)
class Meters:
    """The histograms and counters of all sessions."""

    telemetry: Telemetry
    first: Histogram
    between: Histogram
    added: Histogram
    prompt: Counter
    generated: Counter

    @classmethod
    def of(cls, telemetry: Telemetry) -> Meters:
        tokens = telemetry.counter(TOKENS)
        return cls(
            telemetry,
            telemetry.histogram(TIME_TO_FIRST_TOKEN),
            telemetry.histogram(TIME_BETWEEN_TOKENS),
            telemetry.histogram(ADDED_LATENCY),
            tokens.labels(direction="prompt"),
            tokens.labels(direction="generated"),
        )

    def answered(self, turn: Turn, tokens: int, compute: float) -> None:
        """One answer with `tokens` tokens, `compute` seconds of the model behind it. Where it gave several, each has
        its share of the gap; where it gave none yet, its compute counts for the next."""
        turn.compute += compute
        if not tokens:
            return
        now = time.perf_counter()
        if turn.last is None:
            self.first.observe(now - turn.began)
        else:
            gap, computed = (now - turn.last) / tokens, turn.compute / tokens
            for _ in range(tokens):
                self.between.observe(gap)
                self.added.observe(max(0.0, gap - computed))
        turn.last, turn.compute = now, 0.0
