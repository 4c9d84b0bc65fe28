"""Writing an architecture down: spaces, maps and norms in the order of the model; shapes follow from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from stip_keyservice.protect.architecture import (
    After,
    Architecture,
    Experts,
    Layout,
    Linear,
    Norm,
    NormKind,
    Port,
    Slab,
    Space,
    Table,
)


class Draft:
    """One model's tables while a family fills them in. Ports are handed around by name of their space."""

    def __init__(self) -> None:
        self._spaces: dict[str, Space] = {}
        self._norms: list[Norm] = []
        self._linears: list[Linear] = []
        self._tables: list[Table] = []
        self._experts: list[Experts] = []
        self._fused: dict[str, tuple[str, ...]] = {}
        self._dropped: list[str] = []

    def space(self, name: str, size: int, layout: Layout = Layout.FLAT) -> Port:
        """A space of one width."""
        return self.heads(Space(name, size, layout))

    def heads(self, space: Space) -> Port:
        """A space as it is given."""
        self._spaces[space.name] = space
        return Port(space.name)

    def norm(self, module: str, space: Port, kind: NormKind, *, bias: bool = False, **facts: Any) -> str:
        """The norm `module`.weight (and .bias) of a space; `facts` are those of `Norm`. Its name."""
        norm = Norm(f"{module}.weight", f"{module}.bias" if bias else None, space.space, kind, **facts)
        self._norms.append(norm)
        return norm.weight

    def linear(
        self,
        name: str,
        weight: Slab,
        reads: Port,
        writes: Port,
        *,
        bias: Slab | None = None,
        norm: str | None = None,
        after: After = After.NOTHING,
    ) -> None:
        """A linear map, whose weight may be a part of a stored tensor."""
        self._linears.append(Linear(name, weight, bias, reads, writes, norm, after))

    def dense(
        self,
        name: str,
        module: str,
        reads: Port,
        writes: Port,
        *,
        bias: bool = False,
        norm: str | None = None,
        after: After = After.NOTHING,
        transposed: bool = False,
    ) -> None:
        """A linear map that is one stored matrix, `module`.weight, and one vector, `module`.bias."""
        whole = ((0, self.width(writes)),)
        self.linear(
            name,
            Slab(f"{module}.weight", whole, transposed),
            reads,
            writes,
            bias=Slab(f"{module}.bias", whole) if bias else None,
            norm=norm,
            after=after,
        )

    def table(self, table: Table) -> None:
        """A table of rows by number."""
        self._tables.append(table)

    def experts(self, experts: Experts) -> None:
        """The experts of one layer."""
        self._experts.append(experts)

    def fuse(self, parameter: str, tensors: Iterable[str]) -> None:
        """`parameter` holds the rows of `tensors` one after another in memory."""
        self._fused[parameter] = tuple(tensors)

    def drop(self, *tensors: str) -> None:
        """Legacy buffers without meaning."""
        self._dropped += tensors

    def finish(self, *, config: Mapping[str, Any], **facts: Any) -> Architecture:
        """The architecture; `facts` are those of `Architecture` that are not drafted here. Raises `ValueError`."""
        return Architecture(
            tensors=self._shapes(),
            spaces=self._spaces,
            norms=tuple(self._norms),
            linears=tuple(self._linears),
            tables=tuple(self._tables),
            dropped=frozenset(self._dropped),
            experts=tuple(self._experts),
            fused=self._fused,
            config=config,
            **facts,
        )

    def width(self, port: Port) -> int:
        """Dimensions that a port joins."""
        return self._spaces[port.space].width(port.width)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """As large as the slabs reach; `Architecture` checks that they leave no hole."""
        shapes: dict[str, tuple[int, ...]] = {}
        for table in self._tables:
            rows = table.start + self._spaces[table.index].size
            shapes[table.tensor] = (rows, self._spaces[table.writes].size)
        ends: dict[str, int] = {}
        for slab in (slab for linear in self._linears for slab in (linear.weight, linear.bias) if slab):
            ends[slab.tensor] = max(ends.get(slab.tensor, 0), *(stop for _, stop in slab.ranges))
        for linear in self._linears:
            out, into = ends[linear.weight.tensor], self.width(linear.reads)
            shapes[linear.weight.tensor] = (into, out) if linear.weight.transposed else (out, into)
            if linear.bias:
                shapes[linear.bias.tensor] = (ends[linear.bias.tensor],)
        for norm in self._norms:
            space = self._spaces[norm.space]
            size = space.head_dim if space.layout is Layout.HEADS else space.size
            shapes |= {tensor: (size,) for tensor in (norm.weight, norm.bias) if tensor}
        return shapes
