"""The plan of a protection: which tensors come out, and how one row block of each is computed.

`plan` reads a configuration and tensor headers only (no weights), refuses what it cannot protect before
anything is allocated, draws the keys, and returns a `Plan`. Whoever streams the checkpoint walks
`Plan.server` and `Plan.enclave` and asks `Plan.compute` for row blocks, in any order, from several threads.

The server part is a standard checkpoint: of the causal class where the head is on the server, of the base
class otherwise. The embedding that its class insists on is zeros (one row where nothing needs a vocabulary)
unless the server decodes alone, and so are learned positions; the enclave holds both, keyed, in true order.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from stip_keyservice.protect.architecture import Architecture, Linear, Norm, Port, Role, Table
from stip_keyservice.protect.families import expand
from stip_keyservice.protect.folding import (
    TORCH_DTYPE,
    Constant,
    Fold,
    Matrix,
    MatrixPart,
    Recipe,
    Stored,
    TensorSource,
    Vector,
    VectorPart,
    stored,
)
from stip_keyservice.protect.keyring import SpaceKey, draw_keys, folding_norms, key_at
from stip_keyservice.protect.matching import TensorHeader, match
from stip_keyservice.protect.presets import Preset
from stip_keyservice.protect.presets import preset as preset_named
from stip_keyservice.protect.refusals import require_safe
from stip_protocol.errors import Unrepresentable
from stip_protocol.keys import Centred, Identity, Key, Permutation
from stip_protocol.tensor import SAFETENSORS_DTYPE

EMBEDDING, POSITIONS, HEAD, HEAD_BIAS = "embedding", "positions", "head", "head_bias"
"""Tensors of the enclave part: [V, d] and [P, d] keyed rows; [V, d] in the residual's dual; [V]."""


@dataclass(frozen=True)
class Output:
    """One tensor of the server part or of the enclave part. `dtype` is a safetensors name."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Incidence:
    """One place where a key meets a tensor: `part` (a linear map, norm or table) of `tensor` on `space`."""

    tensor: str
    part: str
    space: str
    side: Literal["reads", "writes", "names"]
    """`names`: numbered things take each other's places: experts, the rows of a table."""


@dataclass(frozen=True)
class Plan:
    """What one protection produces. Holds keys: never log, pickle or keep it longer than the protection runs."""

    server: tuple[Output, ...]
    enclave: tuple[Output, ...]
    config: dict[str, Any]
    """The server's config.json: only fields the family knows, no token ids, no names."""
    generation_config: dict[str, Any]
    """The server's generation_config.json: no token ids."""
    family: str
    preset: str
    dtype: str
    """torch's name of the dtype of every tensor and of the rows on the wire."""
    residual_width: int
    vocabulary: int
    max_positions: int
    output: Literal["hidden", "top", "ids"]
    logit_cap: float | None
    """Final logits are cap·tanh(logits / cap)."""
    architecture: Architecture
    folded: frozenset[str]
    """Norms, by weight, whose γ and β lie in the matrices behind them."""
    stored: Mapping[str, Stored]
    """Where each plain tensor lies in the source, by its name in `architecture`; tied ones are absent where the
    source leaves them out."""
    keys: Mapping[str, SpaceKey] = field(repr=False)
    incidences: tuple[Incidence, ...] = field(repr=False)
    """Every place where a key that is not the identity meets a tensor."""
    _recipes: Mapping[Output, Recipe] = field(repr=False)

    def compute(self, output: Output, source: TensorSource, rows: slice) -> torch.Tensor:
        """Rows `rows` of `output`, contiguous, in its dtype.

        `rows` has start < stop within the first axis and step 1. Raises `CheckpointInvalid` where values are
        not finite once keyed, or where a head that should be tied differs from its table.
        """
        start, stop, step = rows.indices(output.shape[0])
        if step != 1 or start >= stop:
            raise ValueError(f"rows {rows} of {output.shape[0]}")
        return stored(self._recipes[output].rows(source, start, stop), output.dtype, output.name)

    def namesake(self, output: Output) -> Stored | None:
        """Where the plain tensor of that name lies; None for the enclave's, which have names of their own."""
        name = output.name
        return self.stored.get(name) or self.stored.get(self.architecture.prefix + name)

    def sources(self, output: Output) -> tuple[str, ...]:
        """Stored names of the tensors that `output` is computed from; empty for constants."""
        return self._recipes[output].sources


def plan(
    config: Mapping[str, Any],
    headers: Mapping[str, TensorHeader],
    preset: str,
    root: bytes,
    *,
    accept_tied_head: bool = False,
    accept_token_cipher: bool = False,
    keys: Mapping[str, SpaceKey] | None = None,
    mutate: Incidence | None = None,
) -> Plan:
    """Plan the protection of a checkpoint under `preset` with the keys of the 32-byte instance secret `root`.

    `keys` replaces the drawn keys of some spaces, and `mutate` leaves the key out at one incidence: for tests
    and audits. Raises `ArchitectureUnsupported`, `CheckpointInvalid` (a field, a tensor, a shape, a dtype),
    `PresetRefused` or `Unrepresentable`.
    """
    chosen = preset_named(preset)
    architecture = expand(config)
    require_safe(chosen, architecture, accept_tied_head=accept_tied_head, accept_token_cipher=accept_token_cipher)
    found, dtype = match(architecture, headers)
    drawn = draw_keys(architecture, chosen, root)
    if keys and not keys.keys() <= drawn.keys():
        raise ValueError(f"keys of unknown spaces: {sorted(keys.keys() - drawn.keys())}")
    drawn |= keys or {}
    return _Builder(architecture, chosen, found, dtype, drawn, mutate).build()


class _Builder:
    """Turns tables and keys into outputs with recipes, and notes every incidence on the way."""

    def __init__(
        self,
        architecture: Architecture,
        preset: Preset,
        found: Mapping[str, Stored],
        dtype: str,
        keys: Mapping[str, SpaceKey],
        mutate: Incidence | None,
    ) -> None:
        self._architecture = architecture
        self._preset = preset
        self._stored = found
        self._dtype = dtype
        self._keys = keys
        self._mutate = mutate
        self._norms = {norm.weight: norm for norm in architecture.norms}
        self._folding = folding_norms(architecture, preset)
        self._absorbing = set(_absorbing(architecture, preset, self._folding))
        self._incidences: list[Incidence] = []
        self._server: dict[Output, Recipe] = {}
        self._enclave: dict[Output, Recipe] = {}

    def build(self) -> Plan:
        architecture, preset = self._architecture, self._preset
        names = dict(self._expert_names())
        for table in architecture.tables:
            self._table(table)
        for norm in architecture.norms:
            self._norm(norm)
        self._linears(names)
        self._head()
        return Plan(
            server=self._in_order(self._server),
            enclave=tuple(self._enclave),
            config=dict(architecture.config)
            | {
                "architectures": [architecture.causal_class if preset.head_on_server else architecture.base_class],
                "vocab_size": self._server_rows,
                "dtype": SAFETENSORS_DTYPE[self._dtype],
                "tie_word_embeddings": False,
                **_NO_IDS,
            },
            generation_config=dict(_NO_IDS),
            family=architecture.family,
            preset=preset.name,
            dtype=SAFETENSORS_DTYPE[self._dtype],
            residual_width=architecture.spaces[architecture.entry].size,
            vocabulary=architecture.vocabulary,
            max_positions=architecture.max_positions,
            output=preset.output,
            logit_cap=architecture.logit_cap,
            architecture=architecture,
            folded=self._folding,
            stored=self._stored,
            keys=self._keys,
            incidences=tuple(self._incidences),
            _recipes=self._server | self._enclave,
        )

    def _in_order(self, outputs: Collection[Output]) -> tuple[Output, ...]:
        """As the architecture names tensors: an order that no key has a part in."""
        places = {self._server_name(name): place for place, name in enumerate(self._architecture.tensors)}
        return tuple(sorted(outputs, key=lambda output: places[output.name]))

    @property
    def _server_rows(self) -> int:
        """Rows of the server's embedding."""
        return self._architecture.vocabulary if self._preset.head_on_server else 1

    def _expert_names(self) -> Iterator[tuple[str, str]]:
        """(tensor, the name it takes) where experts are permuted: slot j holds expert `index[j]`."""
        for experts in self._architecture.experts:
            key = self._key(experts.members[0][0], experts.space, Port(experts.space), "names")
            if isinstance(key, Permutation):
                for slot, expert in enumerate(key.index):
                    yield from zip(experts.members[expert], experts.members[slot], strict=True)

    def _table(self, table: Table) -> None:
        """A table: its rows are vectors of the space. The enclave's is in true order and scaled already."""
        architecture = self._architecture
        size, width = architecture.spaces[table.index].size, architecture.spaces[table.writes].size
        whole = self._stored[table.tensor]
        rows = Stored(whole.name, whole.start + table.start, whole.stop)
        writes = self._key(table.tensor, table.name, Port(table.writes), "writes")
        name = self._server_name(table.tensor)
        if self._preset.table_on_server:
            order = self._key(table.tensor, table.name, Port(table.index), "names")
            part = MatrixPart(rows, ((0, size),), transposed=False, writes=order, reads=writes)
            self._put(self._server, name, (size, width), Matrix((part,)))
            return
        # What the model would multiply a row by, as its own dtype rounds it.
        scale = float(torch.tensor(table.scale, dtype=torch.float32).to(TORCH_DTYPE[self._dtype]))
        part = MatrixPart(rows, ((0, size),), transposed=False, writes=Identity(size), reads=writes, scale=scale)
        self._put(self._enclave, table.name, (size, width), Matrix((part,)))
        of_ids = table.index == architecture.vocabulary_space
        shape = (self._server_rows if of_ids else table.start + size, width)
        self._put(self._server, name, shape, Constant(0.0, shape))

    def _norm(self, norm: Norm) -> None:
        architecture = self._architecture
        shape = architecture.tensors[norm.weight]
        folded = norm.weight in self._folding
        beta = _absorbing_level(shape[0]) if norm.weight in self._absorbing else 0.0
        gain = norm.gain or Port(norm.space, Role.PERMUTATION)
        for tensor, constant, port, shift in (
            (norm.weight, norm.unit, gain, 1.0 - norm.unit),
            (norm.bias, beta, Port(norm.space), 0.0),
        ):
            if tensor is None:
                continue
            if folded:
                recipe: Recipe = Constant(constant, shape)
            else:
                key = self._key(tensor, norm.weight, port, "writes")
                recipe = Vector((VectorPart(self._stored[tensor], ((0, shape[0]),), key, shift=shift),))
            self._put(self._server, self._server_name(tensor), shape, recipe)

    def _linears(self, names: Mapping[str, str]) -> None:
        matrices: dict[str, list[MatrixPart]] = {}
        vectors: dict[str, list[VectorPart]] = {}
        for linear in self._architecture.linears:
            if linear.name == self._architecture.head:
                continue
            part = self._linear_part(linear)
            matrices.setdefault(linear.weight.tensor, []).append(part)
            if linear.bias:
                key = self._key(linear.bias.tensor, linear.name, linear.writes, "writes")
                vectors.setdefault(linear.bias.tensor, []).append(
                    VectorPart(self._stored[linear.bias.tensor], linear.bias.ranges, key, part)
                )
        recipes: dict[str, Recipe] = {tensor: Matrix(tuple(parts)) for tensor, parts in matrices.items()}
        recipes |= {tensor: Vector(tuple(parts)) for tensor, parts in vectors.items()}
        for tensor, recipe in recipes.items():
            name = self._server_name(names.get(tensor, tensor))
            self._put(self._server, name, self._architecture.tensors[tensor], recipe)

    def _head(self) -> None:
        architecture = self._architecture
        head = architecture.linear(architecture.head)
        part, shape = self._linear_part(head), architecture.tensors[head.weight.tensor]
        if self._preset.head_on_server:
            if head.bias:
                raise Unrepresentable.because("head bias", "a bias", "none where the head is on the server")
            self._put(self._server, self._server_name(head.weight.tensor), shape, Matrix((part,)))
            return
        self._put(self._enclave, HEAD, shape, Matrix((part,)))
        bias = self._stored[head.bias.tensor] if head.bias else None
        if bias or (part.fold and part.fold.bias):
            vector = VectorPart(bias, ((0, shape[0]),), part.writes, part)
            self._put(self._enclave, HEAD_BIAS, shape[:1], Vector((vector,)))

    def _linear_part(self, linear: Linear) -> MatrixPart:
        slab, tied = linear.weight, self._architecture.tied
        reads = self._key(slab.tensor, linear.name, linear.reads, "reads").dual
        return MatrixPart(
            tensor=self._stored[tied.get(slab.tensor, slab.tensor)],
            ranges=slab.ranges,
            transposed=slab.transposed,
            writes=self._key(slab.tensor, linear.name, linear.writes, "writes"),
            reads=reads,
            fold=self._fold(linear),
            alias=self._stored.get(slab.tensor) if slab.tensor in tied else None,
        )

    def _fold(self, linear: Linear) -> Fold | None:
        if linear.norm not in self._folding:
            return None
        norm = self._norms[linear.norm]
        absorbs = linear.bias is None and linear.norm in self._absorbing
        if absorbs and (linear.weight.transposed or not isinstance(key_at(self._keys, linear.reads), Centred)):
            # A matrix that leaves out the all-ones direction has room for W·β there; no other has.
            raise Unrepresentable.because(
                f"bias of {linear.name}",
                "none",
                "a bias, which the β of the norm before it folds into; or the preset paper",
            )
        bias = self._stored[norm.bias] if norm.bias else None
        level = _absorbing_level(self._architecture.width(linear.reads)) if absorbs else 0.0
        return Fold(self._stored[norm.weight], bias, 1.0 - norm.unit, level)

    def _key(self, tensor: str, part: str, port: Port, side: Literal["reads", "writes", "names"]) -> Key:
        key = key_at(self._keys, port)
        if key.identity:
            return key
        incidence = Incidence(tensor, part, port.space, side)
        self._incidences.append(incidence)
        return Identity(key.size) if incidence == self._mutate else key

    def _server_name(self, tensor: str) -> str:
        return tensor if self._preset.head_on_server else tensor.removeprefix(self._architecture.prefix)

    def _put(self, part: dict[Output, Recipe], name: str, shape: tuple[int, ...], recipe: Recipe) -> None:
        part[Output(name, self._dtype, shape)] = recipe


def _absorbing_level(width: int) -> float:
    """The c of a norm that holds c·1 for its β: the power of two next to width^(-1/4).

    A large c costs the digits of the normalised row that it is added to, a small one those of the matrix, whose
    entries grow by (W·β)/(c·width).
    """
    return float(2.0 ** -round(math.log2(width) / 4))


def _absorbing(architecture: Architecture, preset: Preset, folding: Collection[str]) -> Iterator[str]:
    """Norms whose β a matrix of the server without a bias takes up."""
    shifting = {norm.weight for norm in architecture.norms if norm.bias and norm.weight in folding}
    for linear in architecture.linears:
        on_server = preset.head_on_server or linear.name != architecture.head
        if linear.norm in shifting and linear.bias is None and on_server:
            yield linear.norm


_NO_IDS: dict[str, None] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""Token ids would place the vocabulary; null keeps a class's defaults out as well."""
