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


class Layout(StrEnum):
    """What the coordinates of a space are."""

    FLAT = "flat"
    HEADS = "heads"
    """Attention heads; the group of the space is that of one head, and whole heads are permuted too."""
    INDEX = "index"
    """Numbered things (a vocabulary, experts): permutations only."""
    PUBLIC = "public"
    """Never keyed (positions, a single gate)."""


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
    """The permutation part: a gate, which an activation follows, and a norm's γ."""


class After(StrEnum):
    """What happens to a map's output before anything linear reads it."""

    NOTHING = "nothing"
    ELEMENTWISE = "elementwise"
    HOMOGENEOUS = "homogeneous"
    """Elementwise, and a positive factor passes through: ReLU."""
    ROTARY = "rotary"
    ROUTING = "routing"
    """Softmax and the largest few: the router of experts."""


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
    """Part of a stored tensor, seen as [out, in] (or [out] for a bias): its rows along `out`, in the order of the
    space that they write.

    `ranges`: [start, stop) one after another; several where heads of queries, keys and values alternate.
    `transposed`: stored as [in, out], as Conv1D does.
    """

    tensor: str
    ranges: tuple[tuple[int, int], ...]
    transposed: bool = False

    @property
    def rows(self) -> int:
        return sum(stop - start for start, stop in self.ranges)


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
    """Whether γ scales what is passed on itself (post-norm, sandwich norm, QK-norm), so that it cannot fold."""
    gain: Port | None = None
    """Where γ has a key of its own: the norm of heads, whose γ all heads of a layer share."""
    after: After = After.NOTHING


@dataclass(frozen=True)
class Table:
    """Rows of a space by number: the embedding, learned positions. Held by the enclave, in true order."""

    name: str
    tensor: str
    index: str
    writes: str
    scale: float = 1.0
    """What the model multiplies a row by before it enters, rounded to float32 and then to the stored dtype."""
    start: int = 0
    """Row of the tensor that number 0 stands for; rows before it are never read."""


@dataclass(frozen=True)
class Experts:
    """The experts of one layer: `members[e]` are the tensors of expert e, in the same order for each.

    Under a permutation of `space`, which the router writes, the tensors of one expert take the names of another.
    """

    space: str
    members: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Architecture:
    """One model as tables.

    Tensor names are those of a checkpoint of the causal class on disk, per expert; a checkpoint of the base
    class lacks `prefix`. `tensors` lists every tensor with its shape; those in `tied` (alias → table) may be
    absent, and `dropped` ones are legacy buffers without meaning. `config` holds the fields that the family
    knows: a server sees no others. Raises `ValueError` where the tables do not tile the tensors or join spaces
    of other sizes: a family's bug.
    """

    family: str
    prefix: str
    tensors: Mapping[str, tuple[int, ...]]
    spaces: Mapping[str, Space]
    norms: tuple[Norm, ...]
    linears: tuple[Linear, ...]
    tables: tuple[Table, ...]
    """The token embedding first."""
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
    experts: tuple[Experts, ...] = ()
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Parameters that transformers holds in memory, and a checkpoint may store, under another name or as one
    stack: their rows (first axes flattened) are the rows of these tensors one after another."""
    logit_cap: float | None = None
    """Final logits are cap·tanh(logits / cap) (Gemma 2, arXiv 2408.00118)."""

    def __post_init__(self) -> None:
        covered: dict[str, list[tuple[int, int]]] = {}
        for linear in self.linears:
            self._check(linear)
            for slab in filter(None, (linear.weight, linear.bias)):
                covered.setdefault(slab.tensor, []).extend(slab.ranges)
        for tensor, shape in self._vectors_and_tables():
            if self.tensors[tensor] != shape:
                raise ValueError(f"{tensor}: {self.tensors[tensor]} for {shape}")
            covered.setdefault(tensor, []).append((0, shape[0]))
        if covered.keys() != self.tensors.keys():
            raise ValueError(
                f"tensors without a slab, or slabs without a tensor: {covered.keys() ^ self.tensors.keys()}"
            )
        transposed = {linear.weight.tensor for linear in self.linears if linear.weight.transposed}
        for tensor, ranges in covered.items():
            out = self.tensors[tensor][1 if tensor in transposed else 0]
            ends = [0, *(stop for _, stop in sorted(ranges))]
            if [start for start, _ in sorted(ranges)] != ends[:-1] or ends[-1] != out:
                raise ValueError(f"{tensor}: slabs {sorted(ranges)} do not tile {out} rows")
        through = {linear.norm for linear in self.linears}
        for norm in self.norms:
            if norm.scales is (norm.weight in through):
                raise ValueError(f"{norm.weight}: a norm either folds into matrices that read through it, or scales")
        for experts in self.experts:
            if len(experts.members) != self.spaces[experts.space].size:
                raise ValueError(f"{experts.space}: {len(experts.members)} experts")
            if len({tuple(self.tensors[name] for name in member) for member in experts.members}) != 1:
                raise ValueError(f"{experts.space}: experts of different shapes")

    def linear(self, name: str) -> Linear:
        return next(linear for linear in self.linears if linear.name == name)

    def norm(self, weight: str) -> Norm:
        return next(norm for norm in self.norms if norm.weight == weight)

    def width(self, port: Port) -> int:
        return self.spaces[port.space].width(port.width)

    @property
    def vocabulary(self) -> int:
        return self.width(self.linear(self.head).writes)

    @property
    def vocabulary_space(self) -> str:
        """The space that the head writes and the embedding is indexed by."""
        return self.linear(self.head).writes.space

    def _vectors_and_tables(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for norm in self.norms:
            space = self.spaces[norm.space]
            size = space.head_dim if space.layout is Layout.HEADS else space.size
            if (norm.gain is None) is (space.layout is Layout.HEADS):
                raise ValueError(f"{norm.weight}: a norm of heads, and no other, has a gain of its own")
            if norm.gain and (norm.kind is not NormKind.RMS or norm.bias or norm.after is not After.ROTARY):
                raise ValueError(
                    f"{norm.weight}: a norm of heads is an RMSNorm without a bias, before rotary positions"
                )
            for tensor in filter(None, (norm.weight, norm.bias)):
                yield tensor, (size,)
        for table in self.tables:
            yield table.tensor, (table.start + self.spaces[table.index].size, self.spaces[table.writes].size)

    def _check(self, linear: Linear) -> None:
        out, into = self.width(linear.writes), self.width(linear.reads)
        weight = linear.weight
        shape = self.tensors[weight.tensor]
        if weight.rows != out or shape[0 if weight.transposed else 1] != into:
            raise ValueError(f"{linear.name}: [{out}, {into}] from {weight} of {shape}")
        if linear.bias and linear.bias.rows != out:
            raise ValueError(f"{linear.name}: bias of {out} from {linear.bias}")
        if linear.norm and self.norm(linear.norm).space != linear.reads.space:
            raise ValueError(f"{linear.name}: its norm is on another space than it reads")
