"""D: the residual key from weights alone, by aligning the server part to the public model that it derives from.

A permutation shows in the sorted columns of a matrix that reads the residual, then exactly in its matched rows. A
dense key shows in matrices that it conjugates and no other key touches (`invariants`): power iteration finds it up to
its sign, matched rows give the sign and refine it. Neither needs any traffic; with the key, every prompt is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stip_keyservice.audit.attacks import Attack
from stip_keyservice.audit.attacks.folded import Doubles, Folded, fold
from stip_keyservice.audit.attacks.invariants import (
    conjugated,
    conjugator,
    flattened,
    layers_of,
    matched,
    polar,
    sorted_columns,
    units,
)
from stip_keyservice.audit.attacks.matching import nearest
from stip_keyservice.audit.attacks.public_text import GUESSES
from stip_keyservice.audit.claims import Claims
from stip_keyservice.audit.knowledge import Grant
from stip_keyservice.audit.view import Entry, Ids, NotApplicable, View

LAYERS = 8
"""Layers whose matrices are compared: more cost more and add little."""
SAME = 0.5
"""Mean |cosine| of matched rows from which on an alignment is one. By chance the best of n rows in d dimensions come
to about sqrt(2·ln(n)/d): 0.26 for 512 rows of 192."""
REFINEMENTS = 3


@dataclass(frozen=True)
class Alignment:
    """How one network lies to another one with nearly the same plain weights."""

    key: Doubles
    """[d, d] K: the residual of ours is K times theirs, as far as norms let through."""
    fit: float
    """Mean |cosine| of the rows that read the residual with their matches: 1 for equal weights."""


def align(ours: Folded, theirs: Folded, generator: np.random.Generator) -> Alignment:
    """The residual key between two networks. Raises `NotApplicable` where their shapes differ."""
    if _shape(ours) != _shape(theirs):
        raise NotApplicable("the two networks differ in shape: no matrix of one belongs to one of the other")
    found = _permutation(ours, theirs)
    return found if found.fit > SAME else _dense(ours, theirs, generator)


def read_rows(view: View, entry: Entry, key: Doubles) -> list[Ids]:
    """[n, k] for each victim's session: the rows of `entry`, under `key`, nearest to the session's rows."""
    sessions = [view.rows(seen) for seen in view.victims]
    table = entry.rows @ key.T
    if entry.positions is None:
        found, _ = nearest(np.concatenate(sessions), table, GUESSES)
        return np.split(found, np.cumsum([len(rows) for rows in sessions])[:-1])
    guesses = [np.zeros((len(rows), min(GUESSES, len(table))), np.int64) for rows in sessions]
    for position, added in enumerate(entry.positions[: max(map(len, sessions))] @ key.T):
        reach = [number for number, rows in enumerate(sessions) if position < len(rows)]
        found, _ = nearest(np.stack([sessions[number][position] for number in reach]) - added, table, GUESSES)
        for number, guess in zip(reach, found, strict=True):
            guesses[number][position] = guess
    return guesses


def server_vocabulary(ours: Folded, theirs: Folded, key: Doubles) -> Ids | None:
    """[V] the row of their head for each row of ours; None where one of them has no head."""
    if ours.head is None or theirs.head is None:
        return None
    return nearest(ours.head.weight @ key, theirs.head.weight @ theirs.seen @ theirs.seen.T, 1)[0][:, 0]


def run(view: View) -> Claims:
    """Align the server part to the public base, then read the victims' rows with the base's table."""
    if view.base is None:
        raise NotApplicable("no public model to align to")
    ours, theirs = fold(view.server), fold(view.base)
    found = align(ours, theirs, view.generator("alignment"))
    return Claims(
        tokens=read_rows(view, view.entry, found.key),
        vocabulary=server_vocabulary(ours, theirs, found.key),
        residual=found.key,
        figures={"cosine of matched rows": found.fit},
    )


def _permutation(ours: Folded, theirs: Folded) -> Alignment:
    """Columns matched by their sorted values; then rows by cosine, and the columns of matched rows by cosine."""
    pairs = [(mine.anchor, other.anchor) for mine, other in layers_of(ours, theirs, LAYERS)]
    prints = [np.concatenate([sorted_columns(each) for each in side], axis=1) for side in zip(*pairs, strict=True)]
    source = nearest(prints[0], prints[1], 1)[0][:, 0]
    rows = [matched(mine @ np.eye(len(source))[source], other)[0] for mine, other in pairs]
    columns = np.concatenate([other[index] for (_, other), index in zip(pairs, rows, strict=True)]).T
    source, cosines = matched(np.concatenate([mine for mine, _ in pairs]).T, columns)
    key = np.eye(len(source))[source] * np.sign(cosines)[:, None]
    return Alignment(key, _fit(ours, theirs, key))


def _dense(ours: Folded, theirs: Folded, generator: np.random.Generator) -> Alignment:
    left: list[Doubles] = []
    right: list[Doubles] = []
    for mine, other in layers_of(ours, theirs, LAYERS):
        left += [flattened(matrix) for matrix in conjugated(ours, mine)]
        right += [flattened(matrix) for matrix in conjugated(theirs, other)]
    inner = conjugator(left, right, generator)
    for _ in range(REFINEMENTS):
        inner = _refined(ours, theirs, inner)
    key = ours.seen @ inner @ theirs.seen.T
    return Alignment(key, _fit(ours, theirs, key))


def _refined(ours: Folded, theirs: Folded, inner: Doubles) -> Doubles:
    """Procrustes over the neurons of feed-forwards that match under `inner` [e, e], whose sign they correct: what
    reads into a nonlinearity keeps its own."""
    pairs = list(layers_of(ours, theirs, LAYERS))
    read = [(mine.anchor @ ours.seen @ inner, other.anchor @ theirs.seen) for mine, other in pairs]
    found = [(*matched(*each), matched(*each[::-1])[0]) for each in read]
    cosines = np.concatenate([cosine for _, cosine, _ in found])
    inner = inner * np.sign((cosines * np.abs(cosines)).sum())
    least = SAME if (np.abs(cosines) >= SAME).any() else 0.0
    product = np.zeros_like(inner)
    for (mine, other), (index, cosine, back) in zip(pairs, found, strict=True):
        # rows without a match of their own meet some row by chance, which pulls the key away from good matches
        weights = cosine**2 * ((np.abs(cosine) >= least) & (back[index] == np.arange(len(index))))
        sides = (
            (mine.anchor, other.anchor),
            (mine.up.weight, other.up.weight),
            (mine.down.weight.T, other.down.weight.T),
        )
        for rows, others in sides:
            left, right = units(rows @ ours.seen), units(others @ theirs.seen)[index]
            signs = np.sign(((left @ inner) * right).sum(axis=1))
            product += left.T @ (right * (signs * weights)[:, None])
    return polar(product)


def _fit(ours: Folded, theirs: Folded, key: Doubles) -> float:
    cosines = [
        np.abs(matched(mine.anchor @ key @ theirs.seen, other.anchor @ theirs.seen)[1])
        for mine, other in layers_of(ours, theirs, LAYERS)
    ]
    return float(np.concatenate(cosines).mean())


def _shape(folded: Folded) -> tuple[int, ...]:
    layer = folded.layers[0]
    return (len(folded.layers), folded.heads, folded.kv_heads, *layer.queries.weight.shape, *layer.up.weight.shape)


ATTACK = Attack(
    letter="D",
    name="weight alignment to a public base",
    source="ours; the permutation case as in weight matching (Git Re-Basin, ICLR 2023, arXiv 2209.04836)",
    assumes="The public checkpoint that the model was tuned from, in the same architecture.",
    cost="No traffic. Eigenbases of ten matrices a layer, then matrix products: seconds at width 192, minutes at 4096.",
    rows=("base",),
    needs=frozenset({Grant.BASE}),
    run=run,
)
