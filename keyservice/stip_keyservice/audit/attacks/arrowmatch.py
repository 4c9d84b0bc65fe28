"""F: ArrowMatch, "Game of Arrows" (USENIX Security 2025): weight vectors keep their directions under obfuscation.

As published, a row of an obfuscated matrix belongs to the row of the public one with the largest |cosine|. Keys of
the residual turn every row, so that it finds nothing on the matrices as they are. Behind the residual key that
alignment (D) finds, rows match again: exactly in feed-forwards, and in heads once each head's own key, solved by
Procrustes, is taken off.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from stip_keyservice.audit.attacks import Attack
from stip_keyservice.audit.attacks.alignment import align, server_vocabulary
from stip_keyservice.audit.attacks.folded import Doubles, Folded, Layer, Linear, fold, unfold
from stip_keyservice.audit.attacks.invariants import matched, polar, unit_pairs, units
from stip_keyservice.audit.attacks.stolen import HeadedCopy, ServerCopy, Tabulated
from stip_keyservice.audit.claims import Claims, Stolen
from stip_keyservice.audit.knowledge import Grant
from stip_keyservice.audit.network import CompleteModel
from stip_keyservice.audit.view import Ids, NotApplicable, View

Bools = NDArray[np.bool_]
SAME = 0.9
"""|cosine| from which on two rows are one, moved a little."""
KINDS = ("queries", "keys", "values", "output", "gate", "up", "down")


def run(view: View) -> Claims:
    """Match rows before and behind the key; put models together from what matched."""
    if view.base is None:
        raise NotApplicable("no public model to match rows with")
    ours, theirs = fold(view.server), fold(view.base)
    found = align(ours, theirs, view.generator("alignment"))
    plain = replace(ours, layers=tuple(_opened(layer, found.key) for layer in ours.layers))
    pairs = [_compare(theirs, mine, other) for mine, other in zip(plain.layers, theirs.layers, strict=True)]
    merged = replace(plain, layers=tuple(pair.merged for pair in pairs))
    order = server_vocabulary(ours, theirs, found.key)
    return Claims(
        stolen=(
            ("the server's weights between the base's tables", _behind(view, ours, theirs, found.key, order)),
            ("the base's weights where rows match", CompleteModel(unfold(merged, view.base))),
        ),
        figures=dict(_figures(ours, theirs, pairs)),
    )


@dataclass(frozen=True)
class _Pair:
    """One layer of the server's beside the base's, both in the base's coordinates."""

    merged: Layer
    shares: dict[str, float]
    """By what it is of: shares of rows that match, and of what could be taken from the base whole."""


def _compare(shape: Folded, mine: Layer, other: Layer) -> _Pair:
    shares: dict[str, float] = {}
    heads: dict[str, tuple[Ids, Doubles]] = {}
    neurons: dict[str, tuple[Ids, Doubles]] = {}
    ours, theirs = dict(_vectors(mine)), dict(_vectors(other))
    for kind, count in (
        ("queries", shape.heads),
        ("keys", shape.kv_heads),
        ("values", shape.kv_heads),
        ("output", shape.heads),
    ):
        turns = shape.names.rotary and kind in ("queries", "keys")
        left, right = (unit_pairs(side[kind], count) if turns else side[kind] for side in (ours, theirs))
        heads[kind] = _matched_heads(left, right, count)
        shares[kind] = float((heads[kind][1] >= SAME).mean())
    for kind in [each for each in ours if each not in heads]:
        neurons[kind] = matched(ours[kind], theirs[kind])
        shares[kind] = float((np.abs(neurons[kind][1]) >= SAME).mean())
    merged, whole_groups = _merged_heads(shape, mine, other, heads)
    merged, whole_neurons = _merged_neurons(merged, other, neurons)
    return _Pair(merged, {**shares, "groups of heads": whole_groups, "neurons": whole_neurons})


def _matched_heads(ours: Doubles, theirs: Doubles, count: int) -> tuple[Ids, Doubles]:
    """For each of `count` heads (rows [count·w, d]) the other's head [count] that spans most of the same, and the
    cosines [count, w] of their rows once an orthogonal map of the head is taken off."""
    left, right = (side.reshape(count, -1, side.shape[1]) for side in (ours, theirs))
    products = np.einsum("hwd,gvd->hgwv", left, right, optimize=True)
    overlaps = np.linalg.svd(products, compute_uv=False).sum(axis=2)
    lengths = np.linalg.norm(right, axis=(1, 2))
    index = (overlaps / np.where(lengths > 0, lengths, 1.0)).argmax(axis=1)
    cosines = [
        (units(polar(products[head, best]).T @ left[head]) * units(right[best])).sum(axis=1)
        for head, best in enumerate(index)
    ]
    return index.astype(np.int64), np.stack(cosines)


def _merged_heads(
    shape: Folded, mine: Layer, other: Layer, heads: dict[str, tuple[Ids, Doubles]]
) -> tuple[Layer, float]:
    """`mine` with the base's heads, where a key-value head and all query heads that share it match; that share."""
    size = shape.heads // shape.kv_heads
    (queries, _), (keys, _), (values, _), (output, _) = (heads[kind] for kind in KINDS[:4])
    alike = {kind: found.mean(axis=1) >= SAME for kind, (_, found) in heads.items()}
    narrow = alike["keys"] & alike["values"] & (keys == values)
    wide = alike["queries"] & alike["output"] & (queries == output) & (queries // size == np.repeat(values, size))
    distinct = np.array([len(set(group)) == size for group in queries.reshape(-1, size)])
    taken = narrow & distinct & wide.reshape(-1, size).all(axis=1)
    all_heads = np.repeat(taken, size)
    merged = replace(
        mine,
        queries=_rows_of(mine.queries, other.queries, queries, all_heads),
        keys=_rows_of(mine.keys, other.keys, keys, taken),
        values=_rows_of(mine.values, other.values, values, taken),
        output=_columns_of(mine.output, other.output, output, all_heads),
    )
    return merged, float(taken.mean())


def _merged_neurons(mine: Layer, other: Layer, found: dict[str, tuple[Ids, Doubles]]) -> tuple[Layer, float]:
    """`mine` with the base's neurons, where all rows of one match those of one neuron of the base; that share."""
    indices = np.stack([index for index, _ in found.values()])
    alike = np.stack([np.abs(cosine) >= SAME for _, cosine in found.values()])
    index, taken = indices[0], alike.all(axis=0) & (indices == indices[0]).all(axis=0)
    merged = replace(
        mine,
        gate=_rows_of(mine.gate, other.gate, index, taken) if mine.gate and other.gate else None,
        up=_rows_of(mine.up, other.up, index, taken),
        down=_columns_of(mine.down, other.down, index, taken),
    )
    return merged, float(taken.mean())


def _rows_of(mine: Linear, other: Linear, index: Ids, taken: Bools) -> Linear:
    return Linear(_blocks_of(mine.weight, other.weight, index, taken), _blocks_of(mine.bias, other.bias, index, taken))


def _columns_of(mine: Linear, other: Linear, index: Ids, taken: Bools) -> Linear:
    """What is added to the residual whole stays the server's."""
    return Linear(_blocks_of(mine.weight.T, other.weight.T, index, taken).T, mine.bias)


def _blocks_of(mine: Doubles, other: Doubles, index: Ids, taken: Bools) -> Doubles:
    """`mine` [n, ...] in len(index) equal blocks, those of `taken` replaced by the `index`-th of `other`."""
    count = len(index)
    chosen: Doubles = np.where(taken[:, None], other.reshape(count, -1)[index], mine.reshape(count, -1))
    return chosen.reshape(mine.shape)


def _opened(layer: Layer, key: Doubles) -> Layer:
    """A layer of ours with the residual key taken off."""

    def read(linear: Linear) -> Linear:
        return Linear(linear.weight @ key, linear.bias)

    def written(linear: Linear) -> Linear:
        return Linear(key.T @ linear.weight, key.T @ linear.bias)

    return Layer(
        read(layer.queries),
        read(layer.keys),
        read(layer.values),
        written(layer.output),
        read(layer.gate) if layer.gate else None,
        read(layer.up),
        written(layer.down),
    )


def _vectors(layer: Layer) -> Iterator[tuple[str, Doubles]]:
    """Each matrix as vectors of the residual: rows of what reads it, columns of what writes it."""
    yield "queries", layer.queries.weight
    yield "keys", layer.keys.weight
    yield "values", layer.values.weight
    yield "output", layer.output.weight.T
    if layer.gate:
        yield "gate", layer.gate.weight
    yield "up", layer.up.weight
    yield "down", layer.down.weight.T


def _behind(view: View, ours: Folded, theirs: Folded, key: Doubles, order: Ids | None) -> Stolen:
    """The server part as it is, fed with the base's rows under the key; behind it its own head in true order, or the
    base's head under the key."""
    entry = view.entry
    positions = None if entry.positions is None else (entry.positions @ key.T).astype(np.float32)
    table = Tabulated((entry.rows @ key.T).astype(np.float32), positions, np.ones(len(entry.rows), bool))
    if order is not None:
        permuted = np.arange(len(order))
        permuted[order] = np.arange(len(order))
        return ServerCopy(view.server, table, permuted)
    assert theirs.head is not None
    weight = theirs.head.weight @ key.T / ours.gain
    head = torch.nn.Linear(*weight.shape[::-1])
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(theirs.head.bias - weight @ ours.offset))
    return HeadedCopy(view.server, table, head)


def _figures(ours: Folded, theirs: Folded, pairs: list[_Pair]) -> Iterator[tuple[str, float]]:
    layers = list(zip(ours.layers, theirs.layers, strict=True))
    for kind, _ in _vectors(layers[0][0]):
        as_stored = [
            np.abs(matched(dict(_vectors(mine))[kind], dict(_vectors(other))[kind])[1]) >= SAME
            for mine, other in layers
        ]
        yield f"{kind}: rows matched as they are", float(np.mean(as_stored))
    for what in pairs[0].shares:
        where = "rows matched behind the key" if what in KINDS else "taken from the base"
        yield f"{what}: {where}", float(np.mean([pair.shares[what] for pair in pairs]))


ATTACK = Attack(
    letter="F",
    name="ArrowMatch",
    source="Game of Arrows, USENIX Security 2025; behind the key of alignment (D): ours",
    assumes="The public checkpoint that the model was tuned from, in the same architecture.",
    cost="As alignment, and one product of every matrix with the base's. No traffic, no fine-tuning.",
    rows=("base",),
    needs=frozenset({Grant.BASE}),
    run=run,
)
