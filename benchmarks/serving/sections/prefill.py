"""Time to first token of one stream, after 128 and after 1,024 tokens of prompt."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.serving.bench import Bench, Draft, Scale
from benchmarks.serving.interleaving import Load
from benchmarks.serving.sections import tokens


@dataclass(frozen=True)
class Plan:
    subjects: tuple[str, ...]
    loads: tuple[Load, ...]


PLANS = {
    Scale.QUICK: Plan(("demo",), (Load(1, 16, 4, 1), Load(1, 64, 4, 1))),
    Scale.DEFAULT: Plan(("gpt2", "llama"), (Load(1, 128, 4, 16), Load(1, 1016, 4, 4))),
    Scale.FULL: Plan(("gpt2", "gpt2-bf16", "llama-fp32", "llama"), (Load(1, 128, 4, 32), Load(1, 1016, 8, 8))),
}
"""GPT-2 has 1,024 positions: 1,016 of prompt leave room for an answer."""


async def run(bench: Bench, draft: Draft) -> None:
    """Every model of the plan."""
    plan = PLANS[bench.scale]
    for name in plan.subjects:
        if bench.budget.spent:
            draft.missing(f"{name}: no time was left")
            continue
        bed = bench.named(name)
        system = await bed.system(tokens.PRESETS, plan.loads)
        await tokens.compare(bench, draft, bed, system, plan.loads)
