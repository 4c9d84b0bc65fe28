"""What each part holds: memory, file descriptors and threads, when it has started and after a load."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from benchmarks.serving.bench import Bed, Bench, Draft, Scale, System
from benchmarks.serving.interleaving import Load, warm
from benchmarks.serving.records import Memory
from benchmarks.serving.sections.tokens import PRESETS
from stip_server.engine import Form
from stip_stack.footprint import Footprint

PLAIN_ENGINE = "plain engine"


@dataclass(frozen=True)
class Plan:
    subjects: tuple[str, ...]
    load: Load


PLANS = {
    Scale.QUICK: Plan(("demo",), Load(2, 16, 4, 1)),
    Scale.DEFAULT: Plan(("gpt2", "llama"), Load(16, 64, 24, 1)),
    Scale.FULL: Plan(("gpt2", "gpt2-bf16", "llama-fp32", "llama"), Load(16, 128, 64, 1)),
}


async def run(bench: Bench, draft: Draft) -> None:
    """Every model of the plan, one stack for both presets."""
    plan = PLANS[bench.scale]
    for name in plan.subjects:
        if bench.budget.spent:
            draft.missing(f"{name}: no time was left")
            continue
        bed = bench.named(name)
        await bench.rest()  # what ran before has touched memory
        system = await bed.system(PRESETS, [plan.load])
        one = Load(1, 16, 4, 1).orders(system.vocabulary, bench.seed)[0]
        many = plan.load.orders(system.vocabulary, bench.seed)[0]
        arms = {PLAIN_ENGINE: system.direct.arm(Form.TOP)}
        arms |= {preset: system.protected(preset) for preset in PRESETS}
        for state, order in (("after one stream", one), (f"after {plan.load.streams} streams", many)):
            bench.say(f"{name}: memory, {state}")
            await warm(arms, order)
            draft.memory(held(bed, system, state))


def held(bed: Bed, system: System, state: str) -> list[Memory]:
    """Of every process now, children included."""
    servers = {f"server-{number}-0": preset for number, preset in enumerate(PRESETS)}
    pids = {name: process.pid for name, process in system.stack.processes.items()}
    pids[PLAIN_ENGINE] = system.direct.pid
    names = {name: f"server, {servers[name]}" if name in servers else name for name in pids}
    return [
        Memory(model=bed.subject.name, state=state, part=names[name], **asdict(Footprint.of_tree(pid)))
        for name, pid in pids.items()
    ]
