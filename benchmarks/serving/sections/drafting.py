"""What guessing ahead saves over a link with a delay: drafts on against drafts off, on a text that repeats itself and
on one that does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.samples import Runner
from benchmarks.serving.bench import Bench, Draft, Scale
from benchmarks.serving.comparison import Against, cell, pace
from benchmarks.serving.interleaving import Load, interleave, warm
from benchmarks.serving.sections.delay import delayed

DRAFTS = 7
OFF, AGAIN = "no drafts", "no drafts again"


@dataclass(frozen=True)
class Text:
    """A kind of text: how its prompt and its answer come about."""

    name: str
    repeating: int | None
    sampling: Mapping[str, Any]


TEXTS = (
    # A model with random weights, asked for its likeliest token, soon repeats itself.
    Text("repetitive", 8, {}),
    # Sampled from such a model almost every token is new: nothing can be guessed.
    Text("random", None, {"temperature": 1.0, "seed": 1}),
)


@dataclass(frozen=True)
class Plan:
    subject: str
    load: Load
    delays: tuple[float, ...]
    """Milliseconds, one way."""


PLANS = {
    Scale.QUICK: Plan("demo", Load(1, 32, 16, 1), (0, 10)),
    Scale.DEFAULT: Plan("gpt2", Load(1, 64, 48, 3), (0, 10, 50)),
    Scale.FULL: Plan("gpt2", Load(1, 128, 96, 6), (0, 10, 50)),
}


async def run(bench: Bench, draft: Draft) -> None:
    """Text by text, delay by delay. Times are means over a stream: drafts that were right come together."""
    plan = PLANS[bench.scale]
    bed = bench.named(plan.subject)
    system = await bed.system(("paper",), [plan.load], link_delay_ms=0.0)
    for text in TEXTS:
        load = Load(plan.load.streams, plan.load.prompt, plan.load.tokens, plan.load.rounds, text.repeating)
        orders = load.orders(system.vocabulary, bench.seed)
        off = system.protected("paper", **text.sampling)
        on = system.protected("paper", drafts=DRAFTS, **text.sampling)
        for delay in plan.delays:
            if bench.budget.spent:
                draft.missing(f"{text.name} text at {delay:g} ms: no time was left")
                continue
            arms: dict[str, Runner] = {
                OFF: delayed(off, system.stack, delay),
                AGAIN: delayed(off, system.stack, delay),
                text.name: delayed(on, system.stack, delay),
            }
            await warm(arms, Load(1, 16, 4, 1).orders(system.vocabulary, bench.seed)[0])
            runs = await interleave(arms, orders, bench.budget, seed=bench.seed, say=bench.say)
            against = Against(text.name, plain=OFF, again=AGAIN, more={"delay": delay / 1e3})
            draft.cells([cell(runs, against, bed.subject, load, seed=bench.seed, token=pace)])
