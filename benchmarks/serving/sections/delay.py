"""What a distance between enclave and gateway costs: each delay against the plain engine beside its caller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.protected import Streams
from benchmarks.samples import Order, Runner, Samples
from benchmarks.serving.bench import Bench, Draft, Scale
from benchmarks.serving.comparison import AGAIN, PLAIN, Against, cell
from benchmarks.serving.interleaving import Load, interleave, warm
from stip_server.engine import Form
from stip_stack.stack import Stack


@dataclass(frozen=True)
class Plan:
    presets: Mapping[str, tuple[str, ...]]
    """By model."""
    loads: tuple[Load, ...]
    delays: tuple[float, ...]
    """Milliseconds, one way."""


PLANS = {
    Scale.QUICK: Plan({"demo": ("paper",)}, (Load(2, 16, 8, 1),), (0, 10)),
    Scale.DEFAULT: Plan(
        {"gpt2": ("paper",), "llama": ("throughput",)}, (Load(1, 64, 24, 4), Load(16, 32, 28, 2)), (0, 10, 40)
    ),
    Scale.FULL: Plan(
        {"gpt2": ("paper", "hardened"), "llama": ("paper", "hardened", "throughput")},
        (Load(1, 128, 48, 6), Load(16, 64, 48, 4)),
        (0, 10, 40),
    ),
}


async def run(bench: Bench, draft: Draft) -> None:
    """Every model of the plan. The link goes through the delaying proxy at 0 ms, too."""
    plan = PLANS[bench.scale]
    for name, presets in plan.presets.items():
        if bench.budget.spent:
            draft.missing(f"{name}: no time was left")
            continue
        bed = bench.named(name)
        system = await bed.system(presets, plan.loads, link_delay_ms=0.0)
        plain = system.direct.arm(Form.TOP)
        arms: dict[str, Runner] = {PLAIN: plain, AGAIN: plain}
        varied = {f"{preset}, {delay:g} ms": (preset, delay) for preset in presets for delay in plan.delays}
        for arm, (preset, delay) in varied.items():
            arms[arm] = delayed(system.protected(preset), system.stack, delay)
        await warm(arms, Load(1, 16, 4, 1).orders(system.vocabulary, bench.seed)[0])
        for load in plan.loads:
            orders = load.orders(system.vocabulary, bench.seed)
            runs = await interleave(arms, orders, bench.budget, seed=bench.seed, say=bench.say)
            draft.cells(
                cell(
                    runs,
                    Against(arm, more={"arm": preset, "delay": delay / 1e3}),
                    bed.subject,
                    load,
                    seed=bench.seed,
                )
                for arm, (preset, delay) in varied.items()
            )


def delayed(streams: Streams, stack: Stack, milliseconds: float) -> Runner:
    """An arm whose link takes so long, one way."""

    async def run_delayed(order: Order) -> Samples:
        stack.delay_link(milliseconds)
        try:
            return await streams(order)
        finally:
            stack.delay_link(0.0)

    return run_delayed
