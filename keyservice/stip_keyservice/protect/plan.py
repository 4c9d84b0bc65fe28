"""The plan of a protection: which tensors come out, and how one row block of each is computed.

`plan` reads a configuration and tensor headers only (no weights), refuses what it cannot protect before
anything is allocated, draws the keys, and returns a `Plan`. Whoever streams the checkpoint walks
`Plan.server` and `Plan.enclave` and asks `Plan.compute` for row blocks, in any order.

The server part is a standard checkpoint: of the causal class where the head is on the server, of the base
class otherwise. The embedding that its class insists on is zeros (one row where nothing needs a vocabulary),
and so are learned positions; the enclave holds both, keyed, in true order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from stip_keyservice.protect.architecture import Architecture, Linear, Norm, Port
from stip_keyservice.protect.families import expand
from stip_keyservice.protect.folding import (
    TORCH_DTYPE,
    Constant,
    Fold,
    Matrix,
    MatrixPart,
    Recipe,
    TensorSource,
    Vector,
    VectorPart,
    stored,
)
from stip_keyservice.protect.keyring import SpaceKey, draw_keys, key_at
from stip_keyservice.protect.presets import Preset
from stip_keyservice.protect.presets import preset as preset_named
from stip_protocol.errors import CheckpointInvalid, PresetRefused, Unrepresentable
from stip_protocol.keys import Identity, Key
from stip_protocol.tensor import SAFETENSORS_DTYPE

EMBEDDING, POSITIONS, HEAD, HEAD_BIAS = "embedding", "positions", "head", "head_bias"
"""Tensors of the enclave part: [V, d] and [P, d] keyed rows; [V, d] in the residual's dual; [V]."""


@dataclass(frozen=True)
class TensorHeader:
    """One stored tensor as its file announces it. `dtype` is a safetensors name: F64, F32, F16 or BF16."""

    name: str
    dtype: str
    shape: tuple[int, ...]


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
    side: Literal["reads", "writes"]


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
    output: Literal["hidden", "top"]
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
    if chosen.head_on_server and architecture.tied and not accept_tied_head:
        raise PresetRefused(
            f"preset {preset}: a tied head puts the embedding's values on the server, where they reveal every"
            " token; allowed: the preset hardened, or accept_tied_head",
            field="preset",
        )
    names, dtype = _match(architecture, headers)
    drawn = draw_keys(architecture, chosen, root)
    if keys and not keys.keys() <= drawn.keys():
        raise ValueError(f"keys of unknown spaces: {sorted(keys.keys() - drawn.keys())}")
    drawn |= keys or {}
    return _Builder(architecture, chosen, names, dtype, drawn, mutate).build()


def _match(architecture: Architecture, headers: Mapping[str, TensorHeader]) -> tuple[dict[str, str], str]:
    """(stored name of each tensor that is present, the one dtype). Raises `CheckpointInvalid`."""
    bare = architecture.tables[0].tensor.removeprefix(architecture.prefix) in headers
    names = {name: name.removeprefix(architecture.prefix) if bare else name for name in architecture.tensors}
    dropped = {name.removeprefix(architecture.prefix) if bare else name for name in architecture.dropped}
    if unknown := sorted(headers.keys() - set(names.values()) - dropped):
        raise CheckpointInvalid.because("tensor", unknown[0], f"the tensors of {architecture.causal_class}")
    dtype: str | None = None
    for name, shape in architecture.tensors.items():
        header = headers.get(names[name])
        if header is None:
            if name not in architecture.tied:
                raise CheckpointInvalid.because(names[name], "no such tensor", f"shape {list(shape)}")
            del names[name]
            continue
        if header.shape != shape:
            raise CheckpointInvalid.because(f"{names[name]} shape", list(header.shape), list(shape))
        if header.dtype not in TORCH_DTYPE:
            raise CheckpointInvalid.because(f"{names[name]} dtype", header.dtype, ", ".join(TORCH_DTYPE))
        if header.dtype != (dtype := dtype or header.dtype):
            raise CheckpointInvalid.because(f"{names[name]} dtype", header.dtype, f"{dtype}, as the tensors before it")
    if dtype is None:
        raise CheckpointInvalid.because("tensors", "none", f"the tensors of {architecture.causal_class}")
    return names, dtype


class _Builder:
    """Turns tables and keys into outputs with recipes, and notes every incidence on the way."""

    def __init__(
        self,
        architecture: Architecture,
        preset: Preset,
        names: Mapping[str, str],
        dtype: str,
        keys: Mapping[str, SpaceKey],
        mutate: Incidence | None,
    ) -> None:
        self._architecture = architecture
        self._preset = preset
        self._names = names
        self._dtype = dtype
        self._keys = keys
        self._mutate = mutate
        self._incidences: list[Incidence] = []
        self._server: dict[Output, Recipe] = {}
        self._enclave: dict[Output, Recipe] = {}

    def build(self) -> Plan:
        architecture, preset = self._architecture, self._preset
        rows = architecture.vocabulary if preset.head_on_server else 1
        for table in architecture.tables:
            shape = architecture.tensors[table.tensor]
            part = self._matrix_part(table.tensor, table.name, Port(table.writes), shape[0])
            self._put(self._enclave, table.name, shape, Matrix((part,)))
            shape = (rows if table.index == architecture.linear(architecture.head).writes.space else shape[0], shape[1])
            self._put(self._server, self._server_name(table.tensor), shape, Constant(0.0, shape))
        for norm in architecture.norms:
            self._norm(norm)
        self._linears()
        self._head()
        return Plan(
            server=tuple(self._server),
            enclave=tuple(self._enclave),
            config=dict(architecture.config)
            | {
                "architectures": [architecture.causal_class if preset.head_on_server else architecture.base_class],
                "vocab_size": rows,
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
            keys=self._keys,
            incidences=tuple(self._incidences),
            _recipes=self._server | self._enclave,
        )

    def _norm(self, norm: Norm) -> None:
        shape = (self._architecture.spaces[norm.space].size,)
        for tensor, constant in ((norm.weight, norm.unit), (norm.bias, 0.0)):
            if tensor is None:
                continue
            if self._preset.folds:
                recipe: Recipe = Constant(constant, shape)
            else:
                key = self._key(tensor, norm.weight, Port(norm.space), "writes")
                recipe = Vector((VectorPart(self._names[tensor], 0, shape[0], key),))
            self._put(self._server, self._server_name(tensor), shape, recipe)

    def _linears(self) -> None:
        matrices: dict[str, list[MatrixPart]] = {}
        vectors: dict[str, list[VectorPart]] = {}
        for linear in sorted(self._architecture.linears, key=lambda linear: linear.weight.start):
            if linear.name == self._architecture.head:
                continue
            part = self._linear_part(linear)
            matrices.setdefault(linear.weight.tensor, []).append(part)
            if linear.bias:
                key = self._key(linear.bias.tensor, linear.name, linear.writes, "writes")
                vectors.setdefault(linear.bias.tensor, []).append(
                    VectorPart(self._names[linear.bias.tensor], linear.bias.start, linear.bias.stop, key, part)
                )
            elif part.fold and part.fold.bias:
                raise Unrepresentable.because(f"{linear.name} bias", "no bias", "a bias that the norm's β folds into")
        for tensor, matrix in matrices.items():
            self._put(
                self._server, self._server_name(tensor), self._architecture.tensors[tensor], Matrix(tuple(matrix))
            )
        for tensor, vector in vectors.items():
            self._put(
                self._server, self._server_name(tensor), self._architecture.tensors[tensor], Vector(tuple(vector))
            )

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
        bias = self._names[head.bias.tensor] if head.bias else None
        if bias or (part.fold and part.fold.bias):
            vector = VectorPart(bias, 0, shape[0], part.writes, part)
            self._put(self._enclave, HEAD_BIAS, shape[:1], Vector((vector,)))

    def _linear_part(self, linear: Linear) -> MatrixPart:
        slab = linear.weight
        alias = self._names.get(slab.tensor) if slab.tensor in self._architecture.tied else None
        fold = None
        if linear.norm and self._preset.folds:
            norm = self._architecture.norm(linear.norm)
            fold = Fold(self._names[norm.weight], self._names[norm.bias] if norm.bias else None, 1.0 - norm.unit)
        return MatrixPart(
            tensor=self._names[self._architecture.tied.get(slab.tensor, slab.tensor)],
            start=slab.start,
            stop=slab.stop,
            transposed=slab.transposed,
            writes=self._key(slab.tensor, linear.name, linear.writes, "writes"),
            reads=self._key(slab.tensor, linear.name, linear.reads, "reads").dual,
            fold=fold,
            alias=alias,
        )

    def _matrix_part(self, tensor: str, part: str, writes: Port, rows: int) -> MatrixPart:
        """A table: its rows are vectors of the space, its index stays in true order."""
        key = self._key(tensor, part, writes, "writes")
        return MatrixPart(self._names[tensor], 0, rows, transposed=False, writes=Identity(rows), reads=key)

    def _key(self, tensor: str, part: str, port: Port, side: Literal["reads", "writes"]) -> Key:
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


_NO_IDS: dict[str, None] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""Token ids would place the vocabulary; null keeps a class's defaults out as well."""
