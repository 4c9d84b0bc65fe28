"""Drafted ids: the same transcripts with and without, from the same distribution, and what decides on whole rows."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import pytest

from stip_enclave import decode
from stip_enclave.drafting import propose
from stip_enclave.head import Head
from stip_enclave.outbox import Port
from stip_enclave.replies import Outputs
from stip_enclave.sampling import Sampler, Sampling
from stip_enclave.tables import SealedTensor
from stip_enclave.turns import Turn
from stip_protocol.errors import StipError
from stip_protocol.telemetry import Telemetry

WIDTH = 16
Guess = Callable[[np.ndarray, int], np.ndarray]


class Model:
    """A language whose next id depends on the last two: it repeats itself, and now and then it does not."""

    def __init__(self, vocabulary: int = 97, *, spread: float = 1.0) -> None:
        generator = np.random.default_rng(3)
        self.vocabulary = vocabulary
        self.weight = (spread * generator.normal(size=(vocabulary, WIDTH))).astype(np.float32)
        self.true_ids = generator.permutation(vocabulary).astype(np.int32)
        self._head = self.head()
        self._hidden: dict[tuple[int, ...], np.ndarray] = {}
        self._logits: dict[tuple[int, ...], np.ndarray] = {}

    def hidden(self, history: Sequence[int]) -> np.ndarray:
        last = tuple(history[-2:])
        if last not in self._hidden:
            self._hidden[last] = np.random.default_rng(last).normal(size=WIDTH).astype(np.float32)
        return self._hidden[last]

    def head(self) -> Head:
        plain = bytearray(self.weight.tobytes())
        return Head(SealedTensor(plain, np.frombuffer(plain, np.float32).reshape(self.weight.shape)), None, "float32")

    def logits(self, histories: list[list[int]]) -> np.ndarray:
        """[n, V], row by row."""
        for history in histories:
            if (last := tuple(history[-2:])) not in self._logits:
                self._logits[last] = self._head.logits(self.hidden(history)[None])[0]
        return np.stack([self._logits[tuple(history[-2:])] for history in histories])

    def generate(self, history: list[int], count: int, sampling: Sampling) -> list[int]:
        """The plain answer, id by id."""
        sampler, sequence = Sampler(sampling), list(history)
        for step in range(count):
            sequence.append(sampler.pick(self.logits([sequence])[0], step))
        return sequence[len(history) :]


@dataclass(eq=False)
class Scripted:
    """The session behind a port: keeps its history, and takes note of what it is told."""

    model: Model
    history: list[int]
    sampling: Sampling
    drafts: int
    count: int
    guess: Guess = propose
    said: list[int] = field(default_factory=list)
    recalls: int = 0
    trips: int = 0
    away: bool = False
    failure: StipError | None = None
    compute: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.turn = Turn(Sampler(self.sampling), frozenset(), self.count, 0.0, self.drafts)
        self.port = Port(b"", self, "", asyncio.get_running_loop().create_future())
        self.recalling = False

    @property
    def done(self) -> bool:
        return len(self.said) >= self.count or self.failure is not None or self.away

    def ask(self, form: str) -> list[list[int]]:
        """The sequences whose next ids are asked for now: one, or one more than was drafted."""
        sequence = self.history + self.said
        self.trips += 1
        if form == "logits":
            return [sequence]
        self.port.drafted = self.guess(np.array(sequence, np.uint32), self.drafts)
        drafted = self.port.drafted.tolist()
        return [sequence + drafted[:depth] for depth in range(len(drafted) + 1)]

    def turn_for(self, port: Port) -> Turn | None:
        assert port is self.port
        return None if self.away else self.turn

    def answered(self, turn: Turn, tokens: Sequence[int], compute: float) -> None:
        assert turn is self.turn
        assert 1 <= len(tokens) <= (1 if self.recalling else len(self.port.drafted) + 1)
        self._take(tokens, compute)
        self.recalling = False

    def needs_row(self, turn: Turn, tokens: Sequence[int], compute: float) -> None:
        assert not self.recalling
        self._take(tokens, compute)
        self.recalls, self.recalling = self.recalls + 1, True

    def failed(self, error: StipError) -> None:
        self.failure = error

    def _take(self, tokens: Sequence[int], compute: float) -> None:
        self.said += tokens
        self.turn.step += len(tokens)
        self.compute.append(compute)


def outputs_of(model: Model, form: str, histories: list[list[int]]) -> Outputs:
    if form == "hidden":
        return Outputs("hidden", np.stack([model.hidden(one) for one in histories]), None, None, frozenset())
    logits = model.logits(histories)[:, model.true_ids]
    if form == "logits":
        return Outputs("logits", logits, None, None, frozenset())
    top = np.argsort(-logits, axis=1)[:, :64]
    lse = np.log(np.exp(logits.astype(np.float64)).sum(axis=1))
    return Outputs("top", np.take_along_axis(logits, top, axis=1), top, lse, frozenset())


def decoder_of(model: Model, form: str) -> decode.Decoder:
    telemetry = Telemetry("enclave", simulated=True)
    if form == "hidden":
        return decode.Decoder(model.head(), None, telemetry)
    return decode.Decoder(None, model.true_ids, telemetry)


async def run(form: str, owners: list[Scripted]) -> None:
    """All to their ends, one delivery a step for all of them, and one for the rows they recall."""
    model = owners[0].model
    decoder = decoder_of(model, form)
    while asking := [one for one in owners if not one.done]:
        for kind in (form, "logits"):
            now = [one for one in asking if one.recalling == (kind == "logits") and not one.done]
            if now:
                histories = [history for one in now for history in one.ask(kind)]
                ports = tuple(one.port for one in now)
                await decoder.deliver(decode.Delivery(ports, outputs_of(model, kind, histories), 0.25, 0.0))


WAYS = [
    Sampling(),
    Sampling(temperature=0.4, seed=11),
    Sampling(temperature=1.0, top_p=0.6, seed=2**64 - 1),
    Sampling(temperature=0.8, top_k=5, seed=13),
    Sampling(temperature=0.8, top_k=40, top_p=0.9, seed=14),
]


@pytest.mark.parametrize("form", ["hidden", "top"])
@pytest.mark.parametrize("drafts", [1, 3, 7])
async def test_transcripts_are_the_same_with_and_without_drafts(form: str, drafts: int) -> None:
    model = Model(spread=2.0)
    plain = [model.generate([5, 6, number], 60, way) for number, way in enumerate(WAYS)]
    for wanted in (0, drafts):
        owners = [Scripted(model, [5, 6, number], way, wanted, 60) for number, way in enumerate(WAYS)]
        await run(form, owners)
        assert [one.said[:60] for one in owners] == plain
        if wanted:
            # The greedy one comes round and repeats itself: nearly every draft is right there.
            assert owners[0].trips < 60 / min(drafts, 2) + 20
        else:
            assert all(one.trips == 60 + one.recalls for one in owners)


@pytest.mark.parametrize("form", ["hidden", "top"])
async def test_guesses_that_are_always_wrong_change_nothing(form: str) -> None:
    model = Model()
    rightly = model.generate([1, 2], 30, WAYS[1])
    owner = Scripted(model, [1, 2], WAYS[1], 4, 30, lambda history, most: np.full(most, 96, np.uint32))
    await run(form, [owner])
    assert 96 not in rightly
    assert owner.said == rightly
    assert owner.trips == 30 + owner.recalls


@pytest.mark.parametrize("form", ["hidden", "top"])
async def test_guesses_that_are_always_right_give_one_more_a_trip(form: str) -> None:
    model, way = Model(), Sampling(temperature=0.7, top_k=20, seed=3)
    rightly = model.generate([1, 2], 40, way)
    owner = Scripted(
        model, [1, 2], way, 3, 40,
        lambda history, most: np.array(rightly[len(history) - 2 :][:most], np.uint32),
    )  # fmt: skip
    await run(form, [owner])
    assert owner.said == rightly
    assert owner.trips == 10


async def test_a_row_that_does_not_decide_keeps_what_was_accepted_before_it() -> None:
    model, way = Model(spread=0.2), Sampling(temperature=1.0, top_p=0.85, seed=5)
    rightly = model.generate([1, 2], 40, way)
    told: list[int] = []

    class Noting(Scripted):
        def needs_row(self, turn: Turn, tokens: Sequence[int], compute: float) -> None:
            told.append(len(tokens))
            super().needs_row(turn, tokens, compute)

    owner = Noting(
        model, [1, 2], way, 5, 40, lambda history, most: np.array(rightly[len(history) - 2 :][:most], np.uint32)
    )
    await run("top", [owner])
    assert owner.said[:40] == rightly
    assert 0 in told
    assert max(told) >= 1
    assert set(owner.compute) == {0.25}


@pytest.mark.parametrize("form", ["hidden", "top"])
async def test_sessions_of_one_delivery_with_different_drafts_do_not_mix(form: str) -> None:
    model = Model(spread=2.0)
    owners = [
        Scripted(model, [7, number], Sampling(temperature=0.5 * (number % 3), top_k=9, seed=number), number % 8, 20)
        for number in range(24)
    ]
    for number in (3, 11):
        owners[number].away = True
    asked = [owner.ask(form) for owner in owners]
    outputs = outputs_of(model, form, [history for histories in asked for history in histories])
    await decoder_of(model, form).deliver(decode.Delivery(tuple(one.port for one in owners), outputs, 0.25, 0.0))
    for owner in owners:
        plain = model.generate(owner.history, 20, owner.sampling)
        assert owner.said == ([] if owner.away else plain[: len(owner.said)])
        assert owner.away or owner.said or owner.recalling


@pytest.mark.parametrize("form", ["hidden", "top"])
async def test_large_draws_in_a_thread_are_those_of_the_event_loop(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "INLINE_ENTRIES", 0)
    model, sampling = Model(), Sampling(temperature=1.1, seed=8)
    one = Scripted(model, [5, 6, 7], sampling, 3, 30)
    await run(form, [one])
    assert one.said[:30] == model.generate([5, 6, 7], 30, sampling)
    # What an answer elsewhere would draw with meanwhile has not been moved.
    assert one.turn.sampler._counter == 0


async def test_a_delivery_that_nobody_awaits_any_more_is_dropped() -> None:
    model = Model()
    owner = Scripted(model, [1, 2], Sampling(), 3, 5)
    owner.away = True
    outputs = outputs_of(model, "hidden", owner.ask("hidden"))
    await decoder_of(model, "hidden").deliver(decode.Delivery((owner.port,), outputs, 0.25, 0.0))
    assert (owner.said, owner.failure) == ([], None)


async def test_a_hidden_state_that_overflows_the_head_fails_its_session_alone() -> None:
    model = Model()
    owners = [Scripted(model, [1, number], Sampling(), 2, 5, lambda history, most: history[:most]) for number in (3, 4)]
    outputs = outputs_of(model, "hidden", [history for one in owners for history in one.ask("hidden")])
    outputs.rows[4] = 3e38  # behind the second one's first draft
    ports = tuple(one.port for one in owners)
    await decoder_of(model, "hidden").deliver(decode.Delivery(ports, outputs, 0.25, 0.0))
    assert owners[0].failure is None
    assert owners[0].said[:1] == model.generate([1, 3], 1, Sampling())
    assert owners[1].failure is not None
    assert owners[1].failure.code == "tensor_invalid"
    assert owners[1].said == []


# -- the distribution ------------------------------------------------------------------------------------------------

SEEDS = 6000
DRAFT = (2, 3)


def chi_square(model: Model, pairs: list[tuple[int, int]]) -> tuple[float, float]:
    """Of pairs of first ids against the model's own law, and the value that one in a million exceeds (Wilson and
    Hilferty, 1931)."""
    seen = dict.fromkeys(product(range(model.vocabulary), repeat=2), 0)
    for pair in pairs:
        seen[pair] += 1

    def law(history: list[int]) -> np.ndarray:
        weights = np.exp(model.logits([history])[0].astype(np.float64))
        return weights / weights.sum()

    first = law([0, 1])
    second = [law([0, 1, one]) for one in range(model.vocabulary)]
    expected = {(one, two): len(pairs) * first[one] * second[one][two] for one, two in seen}
    assert min(expected.values()) > 5
    statistic = sum((seen[pair] - expected[pair]) ** 2 / expected[pair] for pair in seen)
    freedom = len(seen) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3
    return float(statistic), bound


async def test_drafted_text_is_drawn_from_the_models_own_distribution() -> None:
    model = Model(5, spread=0.15)
    owners: list[Any] = [
        Scripted(
            model, [0, 1], Sampling(temperature=1.0, seed=seed), 2, 2,
            lambda history, most: np.array(DRAFT[len(history) - 2 :], np.uint32),
        )
        for seed in range(SEEDS)
    ]  # fmt: skip
    await run("hidden", owners)
    statistic, bound = chi_square(model, [(one.said[0], one.said[1]) for one in owners])
    assert statistic < bound


def lenient(model: Model, seed: int) -> tuple[int, int]:
    """Keeps a drafted id where it is likely enough, as some serving systems do ("typical acceptance")."""
    sampler = Sampler(Sampling(temperature=1.0, seed=seed))
    logits = model.logits([[0, 1]])[0].astype(np.float64)
    likely = np.exp(logits[DRAFT[0]]) / np.exp(logits).sum() > 0.1
    first = DRAFT[0] if likely and seed % 2 else sampler.pick(logits, 0)
    return first, sampler.pick(model.logits([[0, 1, first]])[0], 1)


def one_draw(model: Model, seed: int) -> tuple[int, int]:
    """Verifies all rows of a trip with the draw of the first."""
    sampler = Sampler(Sampling(temperature=1.0, seed=seed))
    first = sampler.pick(model.logits([[0, 1]])[0], 0)
    return first, sampler.pick(model.logits([[0, 1, first]])[0], 0 if first == DRAFT[0] else 1)


@pytest.mark.parametrize("wrong", [lenient, one_draw])
def test_the_test_of_the_distribution_tells_a_wrong_verifier(wrong: Callable[[Model, int], tuple[int, int]]) -> None:
    model = Model(5, spread=0.15)
    statistic, bound = chi_square(model, [wrong(model, seed) for seed in range(SEEDS)])
    assert statistic > bound
