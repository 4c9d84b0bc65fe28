"""Norm and Gram matching: an orthogonal key keeps the length of every row and the inner product of every two.

Candidates of a row are the tokens of its length. Rows are fixed one after another, each to a token whose inner products
with the tokens fixed before are those that are seen, in a beam of hypotheses. The best one gives the key by
Procrustes, the key reads every row, and what it reads improves the key.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stip_keyservice.audit.attacks import Attack
from stip_keyservice.audit.attacks.decoding import Reading, drifts, noise, read
from stip_keyservice.audit.attacks.matching import Alignment, Doubles, align, nearest
from stip_keyservice.audit.attacks.public_text import GUESSES, PublicText
from stip_keyservice.audit.attacks.sightings import Sightings
from stip_keyservice.audit.claims import Claims, Point
from stip_keyservice.audit.view import Ids, View

ROWS = 64
"""Distinct rows tried for the beam: a sample."""
FIXED = 24
"""Rows that a hypothesis fixes; with 8 the rest followed in every case seen."""
BEAM = 256
LIMIT = 4.0
"""Standard deviations that a length or an inner product may be off."""
ROUNDING = 1e-6
"""What a float32 row's length and inner products may be off, over the lengths."""
ROUNDS = 4
"""Times that the key is taken anew from the rows it explains."""
SAMPLE = 3
"""Distinct rows by which the key is sought, over the dimensions: three for each."""


@dataclass(frozen=True)
class _Candidates:
    """A row to be fixed, and the tokens it may be."""

    row: int
    keyed: Doubles
    """[d]."""
    tokens: Ids
    """[c]."""
    plain: Doubles
    """[c, d] their plain rows."""
    scores: Doubles
    """[c] squared deviations of length, in standard deviations."""


@dataclass(frozen=True)
class _Measure:
    """How far what is seen may be from what a drifted table says."""

    deviation: float
    """Of an entry of the table."""
    width: int

    def lengths(self, keyed: Doubles, plain: Doubles) -> Doubles:
        """[c] deviations of the squared length of `keyed` [d] from those of `plain` [c, d]."""
        square = keyed @ keyed
        # drift makes a row longer by d·s² on average
        gaps = np.einsum("cd,cd->c", plain, plain) - self.width * self.deviation**2 - square
        scale = np.sqrt(4 * square + 2 * self.width * self.deviation**2) * self.deviation + ROUNDING * square
        return np.asarray(gaps / scale)

    def products(self, seen: float, first: Doubles, second: Doubles, products: Doubles) -> Doubles:
        """Deviations of the inner product `seen`, of keyed `first` and `second` [d], from `products` of plain rows."""
        squares = first @ first, second @ second
        scale = self.deviation * np.sqrt(sum(squares) + self.width * self.deviation**2)
        return np.asarray((products - seen) / (scale + ROUNDING * np.sqrt(squares[0] * squares[1])))


def _candidates(view: View, sightings: Sightings, measure: _Measure, anchor: _Candidates | None) -> list[_Candidates]:
    """Of a sample of rows, those with the fewest candidates first."""
    rows = view.generator("gram order").permutation(len(sightings.rows))[:ROWS]
    found = []
    for row in rows:
        keyed, table = sightings.rows[row].astype(np.float64), sightings.table(view, int(sightings.positions[row]))
        deviations = measure.lengths(keyed, table)
        near = np.abs(deviations) <= LIMIT
        if anchor is not None:
            if (keyed == anchor.keyed).all():
                continue
            seen = float(keyed @ anchor.keyed)
            near &= np.abs(measure.products(seen, keyed, anchor.keyed, table @ anchor.plain[0])) <= LIMIT
        tokens = np.flatnonzero(near)
        if len(tokens):
            found.append(_Candidates(int(row), keyed, tokens, table[tokens], deviations[tokens] ** 2))
    return sorted(found, key=lambda each: (len(each.tokens), each.row))


def _search(
    candidates: list[_Candidates], measure: _Measure, anchor: _Candidates | None
) -> list[tuple[_Candidates, int]]:
    """Rows and the candidate of each, in the hypothesis that fits best."""
    fixed = [] if anchor is None else [anchor]
    chosen, scores = np.zeros((1, len(fixed)), np.int64), np.zeros(1)
    for each in candidates:
        if len(fixed) == FIXED:
            break
        totals = scores[:, None] + each.scores[None, :]
        possible = np.ones(totals.shape, np.bool_)
        for column, other in enumerate(fixed):
            products = other.plain[chosen[:, column]] @ each.plain.T
            deviations = measure.products(float(other.keyed @ each.keyed), other.keyed, each.keyed, products)
            possible &= np.abs(deviations) <= LIMIT
            totals += deviations**2
        hypotheses, picks = np.nonzero(possible)
        if not len(hypotheses):
            continue  # no hypothesis has a token for this row: its own drift is larger than most
        best = np.argsort(totals[hypotheses, picks], kind="stable")[:BEAM]
        hypotheses, picks = hypotheses[best], picks[best]
        chosen = np.column_stack([chosen[hypotheses], picks])
        scores = totals[hypotheses, picks]
        fixed.append(each)
    return list(zip(fixed, (int(pick) for pick in chosen[0]), strict=True))


def _refined(view: View, sightings: Sightings, alignment: Alignment, drift: float) -> tuple[Alignment, Reading]:
    """The key from the rows that it explains, again and again."""
    reading = read(view, sightings, alignment, drift)
    for _ in range(ROUNDS):
        if not reading.believed:
            break
        plain, keyed = [], []
        for position, rows in sightings.places(view):
            good = rows[reading.explained[rows]]
            plain.append(sightings.table(view, position)[reading.guesses[good, 0]])
            keyed.append(sightings.rows[good].astype(np.float64))
        alignment = align(np.concatenate(plain), np.concatenate(keyed))
        reading = read(view, sightings, alignment, drift)
    return alignment, reading


def _anchor(view: View, sightings: Sightings, public: PublicText) -> _Candidates | None:
    """The row that every session begins with, where everybody knows which token texts begin with."""
    row, token = sightings.beginning, public.first
    if row is None or token is None or view.entry.rows.shape[1] != sightings.rows.shape[1]:
        return None
    table = sightings.table(view, int(sightings.positions[row]))
    return _Candidates(row, sightings.rows[row].astype(np.float64), np.array([token]), table[[token]], np.zeros(1))


def _solve(view: View, sightings: Sightings, anchor: _Candidates | None) -> tuple[Alignment, Reading] | None:
    """The key and what it reads; None where no hypothesis explains the rows."""
    width = sightings.rows.shape[1]
    sample = sightings.sample(view.generator("gram rows"), SAMPLE * width)
    for drift in drifts(view.entry, width):
        measure = _Measure(noise(view.entry, drift), width)
        fixed = _search(_candidates(view, sample, measure, anchor), measure, anchor)
        if len(fixed) > 1:
            plain = np.stack([each.plain[pick] for each, pick in fixed])
            alignment = align(plain, np.stack([each.keyed for each, _ in fixed]))
            alignment, reading = _refined(view, sample, alignment, drift)
            if reading.believed:
                return alignment, read(view, sightings, alignment, drift)
    return None


def _by_length(view: View, sightings: Sightings) -> Ids:
    """[m, k] the tokens of the nearest length."""
    count = min(GUESSES, view.vocabulary)
    guesses = np.zeros((len(sightings.rows), count), np.int64)
    for position, rows in sightings.places(view):
        lengths = np.linalg.norm(sightings.rows[rows].astype(np.float64), axis=1)[:, None]
        table = np.linalg.norm(sightings.table(view, position), axis=1)[:, None]
        guesses[rows] = nearest(lengths, table, count)[0]
    return guesses


def _nothing(sightings: Sightings, public: PublicText) -> Ids:
    """[m, k] the commonest tokens, and the one that everybody knows."""
    guesses = np.tile(public.commonest(), (len(sightings.rows), 1))
    if sightings.beginning is not None and public.first is not None:
        first = np.array([public.first])
        rest = public.commonest(without=first)[: guesses.shape[1] - 1]
        guesses[sightings.beginning, : 1 + len(rest)] = np.concatenate([first, rest])
    return guesses


def run(view: View) -> Claims:
    """Tokens and the residual's key. The curves show lengths alone, and what is read without the known first token."""
    public, sightings = PublicText.of(view), Sightings.of(view)
    anchor, nothing = _anchor(view, sightings, public), _nothing(sightings, public)
    blind = _solve(view, sightings, None)
    anchored = None if anchor is None else _solve(view, sightings, anchor)
    found = anchored or blind
    if found is None:
        return Claims(
            tokens=sightings.tokens(nothing),
            vocabulary=sightings.vocabulary(view, nothing, np.zeros(0, np.int64)),
            figures={"rows explained": 0.0},
        )
    alignment, reading = found
    solved = (blind,) if anchor is None else (blind, anchored)
    guesses = [sightings.tokens(nothing if each is None else each[1].guesses) for each in solved]
    return Claims(
        tokens=sightings.tokens(reading.guesses),
        vocabulary=sightings.vocabulary(view, reading.guesses, np.flatnonzero(reading.explained)),
        residual=alignment.key,
        points=(
            Point("rows compared at a time", 1, sightings.tokens(_by_length(view, sightings))),
            Point("rows compared at a time", FIXED, sightings.tokens(reading.guesses)),
            *(Point("known first tokens", known, each) for known, each in enumerate(guesses)),
        ),
        figures={
            "rows explained": float(reading.explained.mean()),
            "dimensions of the key": float(alignment.plain.shape[1]),
        },
    )


ATTACK = Attack(
    letter="C",
    name="Norm and Gram matching",
    source="ours",
    assumes="The residual's key is orthogonal (every lossless one is); the embedding table is known, or a relative.",
    cost="Lengths and inner products of a few dozen rows; seconds.",
    rows=("server", "drifted", "table", "base"),
    needs=frozenset(),
    run=run,
)
