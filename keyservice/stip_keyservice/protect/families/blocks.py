"""The blocks that decoders are made of: attention, feed-forward, experts, each as rows of a draft.

Groups, keys and formulas know nothing of them: a block only says which stored matrix joins which spaces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from stip_keyservice.protect.architecture import (
    After,
    Experts,
    Layout,
    NormKind,
    Port,
    Role,
    Slab,
    Space,
    Width,
)
from stip_keyservice.protect.families.draft import Draft


@dataclass(frozen=True)
class Heads:
    """The shape of an attention: query heads, key-value heads, dimensions of a head, and how many of them rotate."""

    heads: int
    kv_heads: int
    width: int
    rotary: int = 0


@dataclass(frozen=True)
class Part:
    """A matrix and its bias inside stored tensors."""

    weight: Slab
    bias: Slab | None = None


@dataclass(frozen=True)
class Projection:
    """Queries, keys or values: in which tensors they lie, and the first row of each head there."""

    weight: str
    bias: str | None
    starts: Sequence[int]
    transposed: bool = False

    def part(self, first: int, last: int) -> Part:
        """Dimensions [first, last) of every head."""
        ranges = _joined((start + first, start + last) for start in self.starts)
        return Part(
            Slab(self.weight, ranges, self.transposed), Slab(self.bias, ranges) if self.bias is not None else None
        )


@dataclass(frozen=True)
class Gains:
    """QK-norm: the RMSNorms of query and key heads (module names), each with one weight for all heads."""

    queries: str
    keys: str
    unit: float = 1.0


def whole(module: str, rows: int, *, bias: bool = False) -> Part:
    """`module`.weight and, with `bias`, `module`.bias, all of them."""
    ranges = ((0, rows),)
    return Part(Slab(f"{module}.weight", ranges), Slab(f"{module}.bias", ranges) if bias else None)


def rows(tensor: str, start: int, stop: int) -> Part:
    """Rows [start, stop) of a fused matrix without a bias."""
    return Part(Slab(tensor, ((start, stop),)))


def projection(module: str, heads: int, width: int, *, bias: bool = False) -> Projection:
    """Heads one after another in a matrix of their own."""
    return Projection(f"{module}.weight", f"{module}.bias" if bias else None, range(0, heads * width, width))


def attention(
    draft: Draft,
    layer: str,
    shape: Heads,
    queries: Projection,
    keys: Projection,
    values: Projection,
    *,
    reads: Port,
    norm: str | None,
    gains: Gains | None = None,
) -> Port:
    """Queries, keys and values of one layer; what the output projection reads.

    Where rotary positions turn a part of each head only, that part and the rest are two spaces: they have other
    groups, and one order of heads.
    """

    def heads(name: str, width: int) -> Port:
        return draft.heads(
            Space(
                f"{layer}.{name}",
                shape.heads * width,
                Layout.HEADS,
                kv_heads=shape.kv_heads,
                head_dim=width,
                structure=f"{layer}.heads",
            )
        )

    for suffix, first, last, after in _turning(shape):
        space = heads(f"query_key{suffix}", last - first)
        for name, stored, writes in (
            (f"q{suffix}", queries, space),
            (f"k{suffix}", keys, replace(space, role=Role.DUAL, width=Width.NARROW)),
        ):
            part = stored.part(first, last)
            draft.linear(f"{layer}.{name}", part.weight, reads, writes, bias=part.bias, norm=norm, after=after)
        if gains:
            gain = draft.space(f"{layer}.query_key_gain", shape.width)
            for module, port in ((gains.queries, gain), (gains.keys, replace(gain, role=Role.DUAL))):
                draft.norm(module, space, NormKind.RMS, unit=gains.unit, scales=True, gain=port, after=after)
    attended = heads("value_output", shape.width)
    part = values.part(0, shape.width)
    draft.linear(f"{layer}.v", part.weight, reads, replace(attended, width=Width.NARROW), bias=part.bias, norm=norm)
    return attended


def gated_feed_forward(
    draft: Draft,
    layer: str,
    size: int,
    gate: Part,
    up: Part,
    down: Part,
    *,
    residual: Port,
    norm: str | None,
    activation: After,
) -> None:
    """down(f(gate(x)) ⊙ up(x)) (SwiGLU, GeGLU: Shazeer, arXiv 2002.05202). All three share one permutation; the
    paper (arXiv 2312.00025, §6.1) leaves it off the gate, which is not lossless."""
    hidden = draft.space(f"{layer}.feed_forward", size)
    for name, part, writes, after in (
        ("gate", gate, replace(hidden, role=Role.PERMUTATION), activation),
        ("up", up, hidden, After.NOTHING),
    ):
        draft.linear(f"{layer}.{name}", part.weight, residual, writes, bias=part.bias, norm=norm, after=after)
    draft.linear(f"{layer}.down", down.weight, hidden, residual, bias=down.bias)


def experts(
    draft: Draft,
    layer: str,
    count: int,
    size: int,
    *,
    router: str,
    modules: Callable[[int], tuple[str, str, str]],
    fused: tuple[str, str],
    residual: Port,
    norm: str | None,
    activation: After,
) -> None:
    """A router and `count` gated feed-forwards (Shazeer et al., arXiv 1701.06538).

    `modules(e)`: gate, up and down of expert e on disk. `fused`: what holds gates with ups, and downs, in memory.
    """
    space = draft.space(f"{layer}.experts", count, Layout.INDEX)
    draft.dense(f"{layer}.router", router, residual, space, norm=norm, after=After.ROUTING)
    names = [modules(expert) for expert in range(count)]
    for expert, (gate, up, down) in enumerate(names):
        gated_feed_forward(
            draft,
            f"{layer}.experts.{expert}",
            size,
            whole(gate, size),
            whole(up, size),
            whole(down, draft.width(residual)),
            residual=residual,
            norm=norm,
            activation=activation,
        )
    draft.experts(Experts(space.space, tuple(tuple(f"{name}.weight" for name in three) for three in names)))
    draft.fuse(fused[0], (f"{name}.weight" for gate, up, _ in names for name in (gate, up)))
    draft.fuse(fused[1], (f"{down}.weight" for _, _, down in names))


def _turning(shape: Heads) -> list[tuple[str, int, int, After]]:
    """(suffix, first, last, what follows) of the parts of a head."""
    if shape.rotary in (0, shape.width):
        return [("", 0, shape.width, After.ROTARY if shape.rotary else After.NOTHING)]
    return [("", 0, shape.rotary, After.ROTARY), ("_rest", shape.rotary, shape.width, After.NOTHING)]


def _joined(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ranges that touch, as one."""
    found = list(ranges)
    if all(before[1] == after[0] for before, after in pairwise(found)):
        return ((found[0][0], found[-1][1]),)
    return tuple(found)
