"""Architectures as tables: which stored matrix joins which spaces.

Two ideas are kept apart: *storage* (`Slab`: where a matrix lies in a checkpoint) and *algebra* (`Space`,
`Port`, `Linear`, `Norm`, `Table`: what it joins). A family expands its configuration into an `Architecture`
with exact names and shapes, and slabs tile every stored tensor exactly once: nothing passes through unkeyed
because nobody thought of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

ELEMENTWISE = frozenset(
    {
        "gelu",
        "gelu_10",
        "gelu_accurate",
        "gelu_fast",
        "gelu_new",
        "gelu_python",
        "gelu_python_tanh",
        "gelu_pytorch_tanh",
        "hardswish",
        "laplace",
        "leaky_relu",
        "linear",
        "mish",
        "quick_gelu",
        "relu",
        "relu2",
        "relu6",
        "sigmoid",
        "silu",
        "sqrtsoftplus",
        "swish",
        "tanh",
    }
)
"""Activations of transformers.activations.ACT2FN that act on each value alone and have no parameters."""


class Layout(StrEnum):
    """What the coordinates of a space are."""

    FLAT = "flat"
    HEADS = "heads"
    """Attention heads; the group of the space is that of one head, and whole heads are permuted too."""
    INDEX = "index"
    """Numbered things (a vocabulary): permutations only."""
    PUBLIC = "public"
    """Never keyed (positions)."""


class Width(StrEnum):
    """The two widths of a heads space under grouped queries."""

    WIDE = "wide"
    """Query heads."""
    NARROW = "narrow"
    """Key-value heads."""


class Role(StrEnum):
    """Which form of a space's key K a port takes."""

    WHOLE = "whole"
    """K where the space is written, K⁻ᵀ where it is read."""
    DUAL = "dual"
    """K⁻ᵀ where written: keys against queries, whose product must stay."""
    PERMUTATION = "permutation"
    """The permutation part: a gate, which an activation follows."""


class After(StrEnum):
    """What happens to a linear map's output before anything linear reads it."""

    NOTHING = "nothing"
    ELEMENTWISE = "elementwise"
    ROTARY = "rotary"


class NormKind(StrEnum):
    RMS = "rms"
    LAYER = "layer"


@dataclass(frozen=True)
class Space:
    """Where vectors live. `size` is the wide width of a heads space."""

    name: str
    size: int
    layout: Layout = Layout.FLAT
    kv_heads: int = 1
    head_dim: int = 1
    structure: str = ""
    """Heads spaces of the same structure share one order of heads."""

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.size // (self.kv_heads * self.head_dim)

    def width(self, width: Width) -> int:
        return self.size if width is Width.WIDE else self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Port:
    """One side of a matrix: the space it joins, and how."""

    space: str
    role: Role = Role.WHOLE
    width: Width = Width.WIDE


@dataclass(frozen=True)
class Slab:
    """Part of a stored tensor, seen as [out, in] (or [out] for a bias): rows [start, stop) along `out`.

    `transposed`: stored as [in, out], as Conv1D does.
    """

    tensor: str
    start: int
    stop: int
    transposed: bool = False


@dataclass(frozen=True)
class Linear:
    """y = W·norm(x) + b, from the space `reads` to the space `writes`."""

    name: str
    weight: Slab
    bias: Slab | None
    reads: Port
    writes: Port
    norm: str | None = None
    """Weight name of the norm that stands between the space read and this map, whose γ and β fold into it."""
    after: After = After.NOTHING


@dataclass(frozen=True)
class Norm:
    """A normalisation of a space. Named by its weight."""

    weight: str
    bias: str | None
    space: str
    kind: NormKind
    unit: float = 1.0
    """Stored weight that means γ = 1 (0 where a model stores γ - 1)."""
    scales: bool = False
    """Whether γ scales the residual itself (post-norm), so that it cannot fold."""


@dataclass(frozen=True)
class Table:
    """Rows of a space by number: the embedding, learned positions. Held by the enclave, in true order."""

    name: str
    tensor: str
    index: str
    writes: str


@dataclass(frozen=True)
class Architecture:
    """One model as tables.

    Tensor names are those of the causal class; a checkpoint of the base class lacks `prefix`. `tensors`
    lists every tensor with its shape; those in `tied` (alias → table) may be absent, and `dropped` ones are
    legacy buffers without meaning. `config` holds the fields that the family knows: a server sees no others.
    Raises `ValueError` where the tables do not tile the tensors or join spaces of other sizes: a family's bug.
    """

    family: str
    prefix: str
    tensors: Mapping[str, tuple[int, ...]]
    spaces: Mapping[str, Space]
    norms: tuple[Norm, ...]
    linears: tuple[Linear, ...]
    tables: tuple[Table, ...]
    tied: Mapping[str, str]
    dropped: frozenset[str]
    entry: str
    """The space that the enclave's rows enter."""
    head: str
    """Name of the linear map that writes the logits."""
    max_positions: int
    base_class: str
    causal_class: str
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        covered: dict[str, list[tuple[int, int]]] = {}
        for linear in self.linears:
            self._check(linear)
            for slab in filter(None, (linear.weight, linear.bias)):
                covered.setdefault(slab.tensor, []).append((slab.start, slab.stop))
        for tensor, shape in self._vectors_and_tables():
            if self.tensors[tensor] != shape:
                raise ValueError(f"{tensor}: {self.tensors[tensor]} for {shape}")
            covered.setdefault(tensor, []).append((0, shape[0]))
        if covered.keys() != self.tensors.keys():
            raise ValueError(
                f"tensors without a slab, or slabs without a tensor: {covered.keys() ^ self.tensors.keys()}"
            )
        for tensor, ranges in covered.items():
            out = self._out(tensor, any(s.transposed for x in self.linears for s in [x.weight] if s.tensor == tensor))
            ends = [0, *(stop for _, stop in sorted(ranges))]
            if [start for start, _ in sorted(ranges)] != ends[:-1] or ends[-1] != out:
                raise ValueError(f"{tensor}: slabs {sorted(ranges)} do not tile {out} rows")

    def linear(self, name: str) -> Linear:
        return next(linear for linear in self.linears if linear.name == name)

    def norm(self, weight: str) -> Norm:
        return next(norm for norm in self.norms if norm.weight == weight)

    def width(self, port: Port) -> int:
        return self.spaces[port.space].width(port.width)

    @property
    def vocabulary(self) -> int:
        return self.width(self.linear(self.head).writes)

    def _vectors_and_tables(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for norm in self.norms:
            for tensor in filter(None, (norm.weight, norm.bias)):
                yield tensor, (self.spaces[norm.space].size,)
        for table in self.tables:
            yield table.tensor, (self.spaces[table.index].size, self.spaces[table.writes].size)

    def _out(self, tensor: str, transposed: bool) -> int:
        return self.tensors[tensor][1 if transposed else 0]

    def _check(self, linear: Linear) -> None:
        out, into = self.width(linear.writes), self.width(linear.reads)
        weight = linear.weight
        shape = self.tensors[weight.tensor]
        if weight.stop - weight.start != out or shape[0 if weight.transposed else 1] != into:
            raise ValueError(f"{linear.name}: [{out}, {into}] from {weight} of {shape}")
        if linear.bias and linear.bias.stop - linear.bias.start != out:
            raise ValueError(f"{linear.name}: bias of {out} from {linear.bias}")
        if linear.norm and self.norm(linear.norm).space != linear.reads.space:
            raise ValueError(f"{linear.name}: its norm is on another space than it reads")
