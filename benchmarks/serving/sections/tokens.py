"""Time per token, time to first token and tokens a second, by model, preset and streams; and where the time goes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from benchmarks import hop
from benchmarks.samples import Runner
from benchmarks.serving.bench import HEAD_IN_ENCLAVE, Bed, Bench, Draft, Scale, System
from benchmarks.serving.comparison import AGAIN, BASE, PLAIN, Against, cell
from benchmarks.serving.interleaving import Load, interleave, warm
from benchmarks.serving.records import Stage, Stages
from stip_server.engine import Form
from stip_stack import latency

TOKEN_TARGETS = {1: 1.05, 16: 1.06}
"""Time per token over plain, by streams: the numbers STIP is built for."""
FIRST_TARGETS = {1: 1.05}
PRESETS = ("paper", "hardened")


@dataclass(frozen=True)
class Plan:
    loads: Mapping[str, tuple[Load, ...]]
    """By model."""
    hop_trips: int


_FEW = (Load(1, 128, 32, 6), Load(4, 128, 32, 4), Load(16, 64, 32, 3))
_MANY = Load(64, 32, 76, 2)
_FULL = (Load(1, 128, 64, 12), Load(4, 128, 64, 8), Load(16, 64, 64, 6), Load(64, 32, 96, 4))
PLANS = {
    Scale.QUICK: Plan({"demo": (Load(1, 16, 8, 1), Load(4, 16, 12, 1))}, 4),
    Scale.DEFAULT: Plan({"gpt2": _FEW, "llama": (*_FEW, _MANY)}, 64),
    Scale.FULL: Plan(dict.fromkeys(("gpt2", "gpt2-bf16", "llama-fp32", "llama"), _FULL), 64),
}


async def run(bench: Bench, draft: Draft) -> None:
    """Every model of the plan."""
    plan = PLANS[bench.scale]
    for name, loads in plan.loads.items():
        if bench.budget.spent:
            draft.missing(f"{name}: no time was left")
            continue
        bed = bench.named(name)
        system = await bed.system(PRESETS, loads)
        await compare(bench, draft, bed, system, loads)
        draft.stages(await stages(bed, system, plan.hop_trips))


async def compare(bench: Bench, draft: Draft, bed: Bed, system: System, loads: tuple[Load, ...]) -> None:
    """Both presets against the plain engine, load by load."""
    arms = plain_arms(system) | {preset: system.protected(preset) for preset in PRESETS}
    await warm(arms, Load(1, loads[0].prompt, 4, 1).orders(system.vocabulary, bench.seed)[0])
    for load in loads:
        if bench.budget.spent:
            draft.missing(f"{bed.subject.name}, {load.streams} streams: no time was left")
            continue
        orders = load.orders(system.vocabulary, bench.seed)
        runs = await interleave(arms, orders, bench.budget, seed=bench.seed, say=bench.say)
        draft.cells(cell(runs, against(preset, load), bed.subject, load, seed=bench.seed) for preset in PRESETS)


def plain_arms(system: System) -> dict[str, Runner]:
    top = system.direct.arm(Form.TOP)
    return {PLAIN: top, AGAIN: top, BASE: system.direct.arm(Form.HIDDEN)}


def against(preset: str, load: Load) -> Against:
    """A preset whose head is in the enclave is also held against the plain model without one."""
    base = BASE if HEAD_IN_ENCLAVE[preset] else None
    return Against(
        preset,
        base=base,
        token_target=TOKEN_TARGETS.get(load.streams),
        first_target=FIRST_TARGETS.get(load.streams),
    )


async def stages(bed: Bed, system: System, trips: int) -> Stages:
    """Of everything that ran so far, from the parts' own metrics."""
    stack = system.stack
    parts = {"enclave": "enclave", "gateway": "gateway", "server": "server-0-0"}
    rows = latency.table({part: stack.processes[name].metrics for part, name in parts.items()})
    found = await hop.measure(stack, system.published[PRESETS[0]], "server-0-0", blocks=8, trips=trips)
    return Stages(
        model=bed.subject.name,
        title=f"{bed.subject.title}, {bed.subject.dtype}",
        rows=[Stage(**{key: value for key, value in asdict(row).items() if value != math.inf}) for row in rows],
        hop_straight=found.straight,
        hop_through=found.through,
        hop_trips=found.trips,
    )
