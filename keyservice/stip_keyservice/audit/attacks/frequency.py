"""Frequency analysis: equal rows are a substitution cipher, and text under one is read by its statistics.

Ranks alone give the commonest tokens. Which tokens follow which gives more: every row has a probability for every
token, and is judged by its neighbours', which are as uncertain; while certainty is raised step by step, no token may
belong to two rows (deterministic annealing for assignment: Rangarajan, Gold and Mjolsness, Neural Computation 8
(1996); the cipher as in Ravi and Knight, ACL 2011).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stip_keyservice.audit.attacks import Attack
from stip_keyservice.audit.attacks.public_text import GUESSES, PublicText
from stip_keyservice.audit.attacks.sightings import Sightings
from stip_keyservice.audit.claims import Claims, Point
from stip_keyservice.audit.view import Floats, Ids, NotApplicable, View

TOKENS = 1024
"""The commonest tokens, which rows are taken for; more where there are more rows."""
CERTAINTY = np.linspace(0.05, 1.0, 20)
"""Exponents of the likelihood, step by step."""
BALANCING = 20
"""Rounds in which rows' probabilities are made to sum to 1, and tokens' to at most 1 (Sinkhorn)."""
WEIGHTS = (1.0, 0.3)
"""Of pairs of neighbours, and of pairs with one id between: the latter tell half again what the former do."""
FLOOR = -80.0
"""Least logarithm of a probability over a row's largest: float32 holds it."""
CURVE = "farthest pairs compared"


def _pairs(rows: Sequence[Ids], count: int, places: int) -> Floats:
    """[m, m] how often row b stands `places` behind row a."""
    found = np.zeros((count, count), np.float32)
    for session in rows:
        np.add.at(found, (session[:-places], session[places:]), 1.0)
    return found


def _assign(pairs: Sequence[Floats], likely: Sequence[Floats], start: Floats, known: tuple[int, int] | None) -> Floats:
    """[m, t] probability of each of t tokens for each of m rows.

    `pairs` [m, m] are counts, `likely` [t, t] log probabilities of public text, pair by pair; `start` [m, t] the
    probabilities to begin with; `known` a row and its token.
    """
    shares: Floats = start
    for certainty in CERTAINTY:
        scores = np.zeros_like(shares)
        for counted, logs in zip(pairs, likely, strict=True):
            scores += counted.T @ (shares @ logs) + counted @ (shares @ logs.T)
        scores *= np.float32(certainty)
        scores -= scores.max(axis=1, keepdims=True)
        if known is not None:
            scores[known[0]] = 2 * FLOOR
            scores[known] = 0.0
        shares = np.exp(np.maximum(scores, FLOOR))
        for _ in range(BALANCING):
            shares /= shares.sum(axis=1, keepdims=True)
            shares /= np.maximum(shares.sum(axis=0), 1.0)
        shares /= shares.sum(axis=1, keepdims=True)
    return shares


def _start(counts: Ids, shares: Floats) -> Floats:
    """[m, t] probability of each token for each row by counts alone: as Poisson variables of public rates."""
    rates = counts.sum() * shares.astype(np.float64)
    scores = counts[:, None] * np.log(rates) - rates
    likelihood = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(likelihood / likelihood.sum(axis=1, keepdims=True), np.float32)


def _by_rank(counts: Ids, tokens: Ids) -> Ids:
    """[m, k] tokens of the nearest ranks, a row's own rank first."""
    ranks = np.empty(len(counts), np.int64)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
    distances = np.abs(ranks[:, None] - np.arange(len(tokens))[None, :])
    return tokens[np.argsort(distances, axis=1, kind="stable")[:, :GUESSES]]


def run(view: View) -> Claims:
    """Tokens by ranks, by neighbours and by neighbours of neighbours."""
    sightings = Sightings.of(view)
    seen, inverse = np.unique(np.concatenate(sightings.sessions), return_inverse=True)
    rows = np.split(inverse.astype(np.int64), np.cumsum([len(each) for each in sightings.sessions])[:-1])
    positions = np.concatenate([np.arange(len(each)) for each in rows])
    if len(np.unique(np.column_stack([inverse, positions]), axis=0)) == len(seen):
        why = "little was said, or learned positions make another cipher of each"
        raise NotApplicable(f"no row comes at two positions: {why}")
    texts = [PublicText.of(view, places) for places, _ in enumerate(WEIGHTS, start=1)]
    public, counts = texts[0], np.bincount(inverse).astype(np.int64)
    tokens = public.ranked[: max(TOKENS, len(seen))]
    beginning = None
    if sightings.beginning is not None and public.first in tokens:
        beginning = int(np.searchsorted(seen, sightings.beginning)), int(np.flatnonzero(tokens == public.first)[0])
    start = _start(counts, public.shares[tokens].astype(np.float32))
    pairs = [weight * _pairs(rows, len(seen), places) for places, weight in enumerate(WEIGHTS, start=1)]
    likely = [text.log_next(tokens, tokens).astype(np.float32) for text in texts]
    guesses = [_by_rank(counts, tokens)]
    for reach in range(1, len(WEIGHTS) + 1):
        shares = _assign(pairs[:reach], likely[:reach], start, beginning)
        guesses.append(tokens[np.argsort(-shares, axis=1, kind="stable")[:, :GUESSES]])
    every = np.tile(public.commonest(), (len(sightings.rows), 1))[:, : guesses[-1].shape[1]]
    every[seen] = guesses[-1]
    return Claims(
        tokens=[guesses[-1][each] for each in rows],
        vocabulary=sightings.vocabulary(view, every, seen),
        points=[Point(CURVE, float(reach), [found[each] for each in rows]) for reach, found in enumerate(guesses)],
        figures={"distinct rows": float(len(seen))},
    )


ATTACK = Attack(
    letter="I",
    name="Frequency analysis",
    source="ours; assignment as in Rangarajan, Gold, Mjolsness, Neural Computation 8 (1996)",
    assumes="Equal tokens make equal rows or ids, as under every key; text of the same kind is public.",
    cost="Statistics of the victims' own traffic and of public text; seconds.",
    rows=("server",),
    needs=frozenset(),
    run=run,
)
