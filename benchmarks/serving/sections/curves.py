"""How the cost grows with vocabulary, width, depth, streams and context: small Llamas, one variable at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from benchmarks.models import Shape
from benchmarks.samples import Runner
from benchmarks.serving.bench import Bed, Bench, Draft, Scale, System
from benchmarks.serving.comparison import AGAIN, PLAIN, Against, cell, pace
from benchmarks.serving.interleaving import Load, interleave, warm
from benchmarks.serving.sections.tokens import PRESETS
from stip_server.engine import Form


@dataclass(frozen=True)
class Point:
    """One place on one curve."""

    axis: str
    at: int
    load: Load


@dataclass(frozen=True)
class Plan:
    """A middle, and the values that one variable at a time takes instead."""

    shape: Shape
    load: Load
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """By field of `Shape`."""
    loads: Mapping[str, tuple[Load, ...]] = field(default_factory=dict)
    """By field of `Load`; beside it only the tokens may differ."""

    def points(self) -> Iterator[tuple[Shape, list[Point]]]:
        """Shapes with what is measured of each. The middle lies on every curve and is measured once a curve of
        loads, and once for all curves of shapes."""
        middle = [Point(axis, getattr(self.shape, axis), self.load) for axis in self.shapes]
        middle += [Point(axis, getattr(load, axis), load) for axis, loads in self.loads.items() for load in loads]
        yield self.shape, middle
        for axis, values in self.shapes.items():
            for value in values:
                if value != getattr(self.shape, axis):
                    yield replace(self.shape, **{axis: value}), [Point(axis, value, self.load)]


_SHAPES = {"vocabulary": (2048, 8192, 32768, 131072), "width": (128, 256, 512, 1024), "depth": (2, 4, 8, 16)}


def _loads(middle: Load, streams: tuple[int, ...], prompts: tuple[int, ...]) -> dict[str, tuple[Load, ...]]:
    # Streams may be taken up one by one, each for one token of the others.
    return {
        "streams": tuple(replace(middle, streams=count, tokens=middle.tokens + count - 1) for count in streams),
        "prompt": tuple(replace(middle, prompt=length) for length in prompts),
    }


PLANS = {
    Scale.QUICK: Plan(
        Shape(512, 64, 1, 128), Load(1, 16, 8, 1), {"vocabulary": (512,)}, _loads(Load(1, 16, 8, 1), (1, 2), (16,))
    ),
    Scale.DEFAULT: Plan(
        Shape(), Load(1, 64, 32, 3), _SHAPES, _loads(Load(1, 64, 32, 3), (1, 4, 16, 64), (32, 128, 512, 1024))
    ),
    Scale.FULL: Plan(
        Shape(), Load(1, 64, 64, 8), _SHAPES, _loads(Load(1, 64, 64, 8), (1, 4, 16, 64), (32, 128, 512, 1024, 1900))
    ),
}


async def run(bench: Bench, draft: Draft) -> None:
    """Shape by shape."""
    for shape, points in PLANS[bench.scale].points():
        if bench.budget.spent:
            draft.missing(f"{', '.join(f'{each.axis} {each.at}' for each in points)}: no time was left")
            continue
        bed = bench.bed(shape.subject())
        system = await bed.system(PRESETS, [point.load for point in points])
        await _measure(bench, draft, bed, system, points)


async def _measure(bench: Bench, draft: Draft, bed: Bed, system: System, points: list[Point]) -> None:
    plain = system.direct.arm(Form.TOP)
    arms: dict[str, Runner] = {PLAIN: plain, AGAIN: plain}
    arms |= {preset: system.protected(preset) for preset in PRESETS}
    await warm(arms, points[0].load.orders(system.vocabulary, bench.seed)[0])
    for load in dict.fromkeys(point.load for point in points):
        orders = load.orders(system.vocabulary, bench.seed)
        runs = await interleave(arms, orders, bench.budget, seed=bench.seed, say=bench.say)
        # Tokens of a millisecond reach a client in bunches: means over a stream do not mind.
        draft.cells(
            cell(
                runs,
                Against(preset, more={"axis": point.axis, "at": point.at}),
                bed.subject,
                load,
                seed=bench.seed,
                token=pace,
            )
            for point in points
            if point.load == load
            for preset in PRESETS
        )
