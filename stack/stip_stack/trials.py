"""Turns put to a running stack, and the plain model that their answers are held against."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import stip
from stip_enclave.sampling import Sampler, Sampling
from stip_stack.reference import PlainModel
from stip_stack.workspace import Published

MARGIN = 4.0
"""The protected model's largest error may be this many times what its certificate measured on a few positions."""
TRIES = 512
"""Random errors within the bound that are tried before an id counts as wrong."""

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.7, "seed": 11},
    "top-k": {"temperature": 1.3, "top_k": 7, "seed": 2**63 + 5},
    "top-p": {"temperature": 1.0, "top_p": 0.8, "seed": 3},
    "top-p and top-k, hot": {"temperature": 1.5, "top_k": 40, "top_p": 0.95, "seed": 4},
    "top-p beyond 64 candidates": {"temperature": 3.0, "top_p": 0.99, "seed": 5},
}
"""Ways to sample that between them need the largest logits alone, their log-sum-exp, and the whole row."""


@dataclass
class Answer:
    """The ids that came, and why no more did."""

    ids: list[int] = field(repr=False)
    finish: stip.FinishReason | None


@dataclass
class Job:
    """One turn: what is asked, after what was said before it in the session."""

    ids: list[int] = field(repr=False)
    max_tokens: int = 24
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = field(default=(), repr=False)
    before: list[int] = field(default_factory=list, repr=False)
    """Everything that the session holds already, prompts and answers."""
    until: int | None = None
    """Cancel when so many tokens have come."""

    def sampler(self) -> Sampler:
        """The enclave's own, with the float32 values that the wire carries."""
        temperature, top_p = float(np.float32(self.temperature)), float(np.float32(self.top_p))
        return Sampler(Sampling(temperature, self.top_k, top_p, self.seed))

    async def run(self, session: stip.AsyncSession, *, heard: Callable[[], None] = lambda: None) -> Answer:
        """Ask it; `heard` is called at every token. Raises what the session raises."""
        stream = session.generate(
            self.ids,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            stop_ids=self.stop_ids,
        )
        ids: list[int] = []
        async for chunk in stream:
            if chunk.id is not None:
                ids.append(chunk.id)
                heard()
            if len(ids) == self.until:
                await session.cancel()  # what is on its way still comes, and is part of the session
        return Answer(ids, session.last.finish_reason if session.last else None)


@dataclass
class Served:
    """One instance, its plain model, and the profile of a user who may use it."""

    name: str
    published: Published
    plain: PlainModel
    profile: Path

    @property
    def relative_error(self) -> float:
        """The largest difference that the certificate measured, relative to the logits' spread."""
        error = self.published.manifest.certificate["relative_largest"]
        assert isinstance(error, float)
        return error

    def prompt(self, seed: int, length: int) -> list[int]:
        """Random ids of this model, without the first few, which may be special."""
        return [int(id_) for id_ in np.random.default_rng(seed).integers(3, self.plain.vocabulary, length)]

    def mixed(self, count: int, *, seed: int) -> list[Job]:
        """Turns of different lengths under all kinds of sampling."""
        kinds = list(SAMPLINGS.values())
        return [
            Job(
                self.prompt(seed + number, 1 + (number * 13) % 97),
                max_tokens=4 + (number * 7) % 29,
                **{**kinds[number % len(kinds)], "seed": seed + number},
            )
            for number in range(count)
        ]

    def require_plain(self, job: Job, answer: Answer) -> None:
        """Raise `AssertionError` unless every id of an answer is the plain model's, after the same ids.

        Where one differs, rounding must decide: the plain model's logits, moved by no more than the protected
        model's error, give the id that came. For greedy turns that is plain's top-two gap below the bound.
        """
        sequence = job.before + job.ids
        rows = self.plain.logits(sequence + answer.ids)[len(sequence) - 1 :]
        sampler = job.sampler()
        for step, chosen in enumerate(answer.ids):
            if chosen in job.stop_ids:
                raise AssertionError(f"{self.name}: step {step} of {job} is a stop id")
            if chosen != sampler.pick(rows[step], step) and not self._rounding(rows[step], sampler, step, chosen):
                raise AssertionError(f"{self.name}: step {step} of {job} is not the plain model's")
        end = len(answer.ids)
        if answer.finish is stip.FinishReason.STOP and sampler.pick(rows[end], end) not in job.stop_ids:
            raise AssertionError(f"{self.name}: {job} stopped where the plain model does not")
        if answer.finish is stip.FinishReason.LENGTH and end != job.max_tokens:
            raise AssertionError(f"{self.name}: {job} ended after {end} tokens")

    def _rounding(self, row: NDArray[np.float32], sampler: Sampler, step: int, chosen: int) -> bool:
        error = MARGIN * self.relative_error * float(row.std())
        generator = np.random.default_rng(step)
        moved = (row.astype(np.float64) + generator.uniform(-error, error, row.shape) for _ in range(TRIES))
        return any(sampler.pick(each, step) == chosen for each in moved)


async def concurrently(connection: stip.AsyncConnection, jobs: Sequence[Job], *, streams: int = 16) -> list[Answer]:
    """Run jobs in so many sessions at once, one session each: whenever one leaves, the next joins."""
    waiting = list(enumerate(jobs))
    answers: dict[int, Answer] = {}

    async def stream() -> None:
        while waiting:
            number, job = waiting.pop(0)
            async with await connection.session() as session:
                answers[number] = await job.run(session)

    async with asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(stream())
    return [answers[number] for number in range(len(jobs))]
