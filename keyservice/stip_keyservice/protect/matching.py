"""Finding the tensors of an architecture in a checkpoint, under whichever of their names and forms they lie there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

from stip_keyservice.protect.architecture import Architecture
from stip_keyservice.protect.folding import TORCH_DTYPE, Stored
from stip_protocol.errors import CheckpointInvalid


@dataclass(frozen=True)
class TensorHeader:
    """One stored tensor as its file announces it. `dtype` is a safetensors name: F64, F32, F16 or BF16."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def match(architecture: Architecture, headers: Mapping[str, TensorHeader]) -> tuple[dict[str, Stored], str]:
    """(where each tensor lies, the one dtype of all).

    A tensor lies under its own name or within one that `architecture.fused` describes, with the prefix of the
    causal class or, in a checkpoint of the base class, without. Tied tensors may be absent. Raises
    `CheckpointInvalid` for a tensor that is missing, unknown or stored twice, or has another shape
    or dtype.
    """
    bare = architecture.tables[0].tensor.removeprefix(architecture.prefix) in headers

    def stored_name(name: str) -> str:
        return name.removeprefix(architecture.prefix) if bare else name

    stacked = {
        member: (stored_name(fused), rows)
        for fused, members in architecture.fused.items()
        if stored_name(fused) in headers
        for member, rows in _rows(architecture, members)
    }
    found: dict[str, Stored] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in architecture.tensors.items():
        if stored_name(name) in headers and name in stacked:
            allowed = f"either this or {stacked[name][0]}, which holds it too"
            raise CheckpointInvalid.because(stored_name(name), "stored twice", allowed)
        if name not in stacked:
            place = Stored(stored_name(name), 0, shape[0])
            shapes[place.name] = shape
        else:
            fused, (start, stop) = stacked[name]
            place = Stored(fused, start, stop)
            shapes.setdefault(fused, ())
        if place.name in headers:
            found[name] = place
        elif name not in architecture.tied:
            raise CheckpointInvalid.because(place.name, "no such tensor", f"shape {list(shape)}")
    dropped = {stored_name(name) for name in architecture.dropped}
    if unknown := sorted(headers.keys() - shapes.keys() - dropped):
        raise CheckpointInvalid.because("tensor", unknown[0], f"the tensors of {architecture.causal_class}")
    stacks = {stored_name(fused): members for fused, members in architecture.fused.items()}
    for name, shape in shapes.items():
        if name in headers:
            _require_shape(headers[name], shape, architecture, stacks.get(name, ()))
    return found, _dtype([headers[name] for name in shapes if name in headers])


def _rows(architecture: Architecture, members: tuple[str, ...]) -> Iterator[tuple[str, tuple[int, int]]]:
    """The rows of each member in the stack of all."""
    ends = list(accumulate((architecture.tensors[member][0] for member in members), initial=0))
    yield from zip(members, pairwise(ends), strict=True)


def _require_shape(
    header: TensorHeader, shape: tuple[int, ...], architecture: Architecture, members: tuple[str, ...]
) -> None:
    """A stack is a matrix of all rows, or of three axes where it holds experts: one for each, its rows, a row.

    Other axes of the same size would be read too, as rows of other experts.
    """
    allowed = [shape]
    if members and not shape:
        rows = sum(architecture.tensors[name][0] for name in members)
        row = architecture.tensors[members[0]][1:]
        allowed = [
            (count, rows // count, *row)
            for experts in architecture.experts
            if members[0] in chain.from_iterable(experts.members)
            for count in (len(experts.members),)
        ]
        allowed.append((rows, *row))
    if header.shape not in allowed:
        raise CheckpointInvalid.because(f"{header.name} shape", list(header.shape), _either(allowed))


def _either(shapes: list[tuple[int, ...]]) -> str:
    return " or ".join(str(list(shape)) for shape in shapes)


def _dtype(headers: list[TensorHeader]) -> str:
    for header in headers:
        if header.dtype not in TORCH_DTYPE:
            raise CheckpointInvalid.because(f"{header.name} dtype", header.dtype, ", ".join(TORCH_DTYPE))
        if header.dtype != headers[0].dtype:
            allowed = f"{headers[0].dtype}, as the tensors before it"
            raise CheckpointInvalid.because(f"{header.name} dtype", header.dtype, allowed)
    return headers[0].dtype
