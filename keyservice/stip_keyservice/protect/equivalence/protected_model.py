"""Running a source and a protected instance as enclave and server together would, for certificates and audits.

Both are streamed models: one layer at a time is in memory. Of the protected one, keyed rows come from the
sealed tables, the blocks run in transformers on the server part, and the head is the enclave's (its sealed
head, or π_c undone on the server's logits). Where the server holds everything, it runs on permuted ids.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypedDict

import torch

from stip_keyservice.protect.architecture import After
from stip_keyservice.protect.equivalence.streamed_model import (
    BLOCK_BYTES,
    Observe,
    Route,
    StreamedModel,
    multiply,
    unrouted,
)
from stip_keyservice.protect.equivalence.weights import Alter, Weights, as_stored
from stip_keyservice.protect.folding import TORCH_DTYPE, Stored
from stip_keyservice.protect.plan import EMBEDDING, HEAD, HEAD_BIAS, POSITIONS, Plan
from stip_keyservice.protect.storage.checkpoint import Checkpoint
from stip_protocol.errors import CheckpointInvalid, IntegrityError, SealedPartInvalid
from stip_protocol.keys import vocabulary_key
from stip_protocol.sealed import open_sealed


@dataclass(frozen=True)
class InstanceFiles:
    """Where an instance lies, and what opens it."""

    directory: Path
    instance: str
    epoch: int
    preset: str
    output: Literal["hidden", "top", "ids"]
    vocabulary: int
    part_key: bytes = field(repr=False)
    vocabulary_seed: bytes | None = field(repr=False)
    """Where the head is on the server."""

    def holds(self, name: str) -> bool:
        """Whether the enclave part has a tensor of that name."""
        return self._path(name).exists()

    def blocks(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows) of one tensor of the enclave part, in its stored dtype, from the first to the last.

        Only the end of the iteration proves that the file is whole. Raises `SealedPartInvalid`, also for a file
        that is not a safetensors file of this one tensor.
        """
        path = self._path(name)
        chunks = open_sealed(
            path, key=self.part_key, instance=self.instance, epoch=self.epoch, preset=self.preset, file=path.name
        )
        pending = bytearray(next(chunks))
        while len(pending) < (begin := 8 + int.from_bytes(pending[:8], "little")) and (chunk := next(chunks, None)):
            pending += chunk
        try:
            entry = json.loads(pending[8:begin])[name]
            dtype, shape = TORCH_DTYPE[entry["dtype"]], [int(length) for length in entry["shape"]]
        except (ValueError, KeyError, TypeError):
            raise SealedPartInvalid.because(f"{path.name} header", "another tensor", name) from None
        row = math.prod(shape[1:]) * dtype.itemsize
        start = 0
        for buffer in _joined(pending[begin:], chunks, row):
            yield start, torch.frombuffer(buffer, dtype=dtype).reshape(-1, *shape[1:])
            start += len(buffer) // row

    def _path(self, name: str) -> Path:
        return self.directory / "enclave" / f"{name}.sealed"


class PlainModel:
    """The source of a plan, computing in `dtype`."""

    def __init__(self, source: Checkpoint, planned: Plan, dtype: torch.dtype) -> None:
        """Raises `CheckpointInvalid` where the class of transformers and the checkpoint's tensors differ."""
        architecture = planned.architecture
        stored = {name: planned.stored[architecture.tied.get(name, name)] for name in architecture.tensors}
        weights = Weights(source, stored, architecture.fused, dtype, CheckpointInvalid, what="model")
        self._model = StreamedModel(
            source.directory,
            weights,
            class_name=architecture.causal_class,
            prefix=architecture.prefix,
            table=architecture.tables[0].tensor,
            stored=getattr(torch, planned.dtype),
            routers=[linear.weight.tensor for linear in architecture.linears if linear.after is After.ROUTING],
            **_final_norm(planned),
        )
        self.layers = self._model.layers
        self.layer_bytes = self._model.layer_bytes

    def logits(self, ids: torch.Tensor, observe: Observe, route: Route = unrouted) -> torch.Tensor:
        """[samples, length, vocabulary] logits of ids [samples, length]."""
        return self._model(observe, route, input_ids=ids)


def require_loadable(source: Checkpoint, planned: Plan) -> None:
    """Raise `CheckpointInvalid` where transformers cannot build the model of `planned` from the source's folder.

    Reads no tensor and allocates none, however large: for before the long work, not after it.
    """
    with torch.device("meta"):
        PlainModel(source, planned, getattr(torch, planned.dtype))


class ProtectedModel:
    """A protected instance of a plan, computing in `dtype`; its logits are in true order.

    `alter` is applied to whatever is read, of both parts.
    """

    def __init__(self, files: InstanceFiles, planned: Plan, dtype: torch.dtype, alter: Alter = as_stored) -> None:
        """Raises `IntegrityError` where a part lacks tensors, has unknown ones, or the parts disagree."""
        self._files = files
        self._plan = planned
        self._dtype = dtype
        self._alter = alter
        self._tables = {output.name: output for output in planned.enclave}
        for name in self._tables:
            if not files.holds(name):
                raise IntegrityError.because("enclave part", f"no {name}", "every tensor of the plan")
        self._order: torch.Tensor | None = None
        if files.output != "hidden":
            if files.vocabulary_seed is None:
                raise IntegrityError.because("vocabulary seed", "none", "one, where the head is on the server")
            inverse = vocabulary_key(files.vocabulary_seed, files.vocabulary).inverse
            self._order = torch.from_numpy(inverse.index.copy())
        architecture = planned.architecture
        self._model = StreamedModel(
            files.directory / "server",
            self._weights(_server_part(files.directory / "server", planned)),
            class_name=architecture.base_class if files.output == "hidden" else architecture.causal_class,
            prefix=architecture.prefix,
            table=architecture.tables[0].tensor,
            stored=getattr(torch, planned.dtype),
            **_final_norm(planned),
        )

    def logits(self, ids: torch.Tensor, observe: Observe) -> torch.Tensor:
        """[samples, length, vocabulary] logits of ids [samples, length]."""
        with torch.inference_mode():
            if self._files.output == "ids" and self._order is not None:
                return self._true(self._model(observe, unrouted, input_ids=self._order[ids]))
            rows = self._rows(EMBEDDING, ids)
            if POSITIONS in self._tables:
                rows = rows + self._rows(POSITIONS, torch.arange(ids.shape[1]))
            result = self._model(observe, unrouted, inputs_embeds=rows)
            return self._head(result) if self._order is None else self._true(result)

    def _true(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits in true order, in place: a copy of all would be as large again."""
        for position in logits.view(-1, logits.shape[-1]):
            position.copy_(position[self._order])
        return logits

    def _weights(self, server: Checkpoint) -> Weights:
        architecture = self._plan.architecture
        whole = {output.name for output in self._plan.server}
        bare = not any(name.startswith(architecture.prefix) for name in whole)
        stored = {
            (architecture.prefix + output.name if bare else output.name): Stored(output.name, 0, output.shape[0])
            for output in self._plan.server
        }
        return Weights(server, stored, architecture.fused, self._dtype, IntegrityError, self._alter, "server part")

    def _blocks(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows) of a tensor of the enclave part. Raises `IntegrityError` where it has another shape."""
        expected, reached = self._tables[name].shape, 0
        for start, rows in self._files.blocks(name):
            reached = start + len(rows)
            if reached > expected[0] or rows.shape[1:] != expected[1:]:
                raise IntegrityError.because(f"enclave part, shape of {name}", "another", list(expected))
            rows = rows.to(self._dtype)
            self._alter(f"{name}/{start}", rows)
            yield start, rows
        if reached != expected[0]:
            raise IntegrityError.because(f"enclave part, rows of {name}", reached, expected[0])

    def _rows(self, table: str, index: torch.Tensor) -> torch.Tensor:
        """Rows of a keyed table, [*index.shape, d]."""
        asked, places = torch.unique(index, return_inverse=True)
        found = torch.empty((len(asked), self._tables[table].shape[1]), dtype=self._dtype)
        for start, rows in self._blocks(table):
            here = (asked >= start) & (asked < start + len(rows))
            found[here] = rows[asked[here] - start]
        return found[places]

    def _head(self, states: torch.Tensor) -> torch.Tensor:
        logits = states.new_empty((*states.shape[:-1], self._files.vocabulary))
        for start, rows in self._blocks(HEAD):
            multiply(states, rows, logits[..., start : start + len(rows)])
        if HEAD_BIAS in self._tables:
            for start, bias in self._blocks(HEAD_BIAS):
                logits[..., start : start + len(bias)] += bias
        if (cap := self._plan.logit_cap) is not None:
            logits.div_(cap).tanh_().mul_(cap)
        return logits


class _FinalNorm(TypedDict):
    final_norm: str | None
    unit: float | None


def _final_norm(planned: Plan) -> _FinalNorm:
    """The norm before the head. Where it folds into the head, what is observed after it is without scale and shift."""
    architecture = planned.architecture
    norm = architecture.linear(architecture.head).norm
    return {"final_norm": norm, "unit": architecture.norm(norm).unit if norm in planned.folded else None}


def _server_part(directory: Path, planned: Plan) -> Checkpoint:
    """The server part, whose tensors are those of the plan, by name, shape and dtype. Raises `IntegrityError`."""
    try:
        server = Checkpoint.open(directory)
    except CheckpointInvalid as error:
        raise IntegrityError(f"server part, {error.message}", field=error.field) from None
    expected = {output.name: (output.dtype, output.shape) for output in planned.server}
    found = {name: (header.dtype, header.shape) for name, header in server.headers.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise IntegrityError.because(
                f"server part, tensor {name}", _described(found.get(name)), _described(expected.get(name))
            )
    return server


def _described(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return "none" if tensor is None else f"{tensor[0]} {list(tensor[1])}"


def _joined(first: bytearray, chunks: Iterator[bytes], row: int) -> Iterator[bytearray]:
    """The bytes of `first` and `chunks` in buffers of whole rows, of about `BLOCK_BYTES`."""
    parts: list[bytes | bytearray] = [first]
    size = len(first)
    for chunk in chunks:
        parts.append(chunk)
        size += len(chunk)
        if size >= max(BLOCK_BYTES, row):
            buffer = bytearray().join(parts)
            rest = buffer[size - size % row :]
            del buffer[size - size % row :]
            yield buffer
            parts, size = [rest], len(rest)
    if size:
        yield bytearray().join(parts)
