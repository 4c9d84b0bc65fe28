"""Page access pattern: the enclave's host sees which pages a lookup touches, and so nearly which row.

A page holds a few rows of a small table, in the order of ids; what is left open between them public text tells: how
often each id comes, and after which others. All positions of a session are weighed together (forward-backward on a
bigram model; Rabiner, Proc. IEEE 77 (1989), section III).
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import numpy as np

from stip_keyservice.audit.attacks import Attack
from stip_keyservice.audit.attacks.matching import Doubles
from stip_keyservice.audit.attacks.public_text import GUESSES, PublicText
from stip_keyservice.audit.claims import NO_GUESS, Claims
from stip_keyservice.audit.knowledge import Grant
from stip_keyservice.audit.pagetrace import pages_of
from stip_keyservice.audit.view import Ids, NotApplicable, PageTrace, View


def _neighbours(trace: PageTrace, vocabulary: int) -> dict[tuple[int, ...], Ids]:
    """The ids whose rows lie on the same pages, by those pages."""
    found: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for each in range(vocabulary):
        found[pages_of(each, trace.row_bytes, trace.page_bytes)].append(each)
    return {pages: np.array(ids, np.int64) for pages, ids in found.items()}


def _beginning(public: PublicText, ids: Ids) -> Doubles:
    """[c] log probability of each of `ids` at the first position."""
    if public.first is None or public.first not in ids:
        return np.log(public.shares[ids])
    return np.where(ids == public.first, 0.0, -np.inf)


def _summed(scores: Doubles) -> Doubles:
    """[b] logarithms of the sums of exp over the first axis of [a, b]."""
    largest = scores.max(axis=0)
    return np.asarray(largest + np.log(np.exp(scores - largest).sum(axis=0)))


def _ranked(public: PublicText, candidates: list[Ids]) -> Ids:
    """[n, k] ids by their probability given all pages of the session, `NO_GUESS` behind the last."""
    steps = [public.log_next(before, after) for before, after in pairwise(candidates)]
    forward = [_beginning(public, candidates[0])]
    for step in steps:
        forward.append(_summed(forward[-1][:, None] + step))
    backward = [np.zeros(len(candidates[-1]))]
    for step in reversed(steps):
        backward.append(_summed((backward[-1][None, :] + step).T))
    guesses = np.full((len(candidates), GUESSES), NO_GUESS, np.int64)
    for row, (ids, ahead, behind) in enumerate(zip(candidates, forward, reversed(backward), strict=True)):
        best = ids[np.argsort(-(ahead + behind), kind="stable")][:GUESSES]
        guesses[row, : len(best)] = best
    return guesses


def run(view: View) -> Claims:
    """Tokens, and how many ids share their pages on average."""
    if view.pages is None:
        raise NotApplicable("no table lies in the enclave: no page of a lookup can be watched")
    public, tokens, open_ids = PublicText.of(view), list[Ids](), list[int]()
    for trace in view.pages:
        neighbours = _neighbours(trace, view.vocabulary)
        candidates = [neighbours[pages] for pages in trace.pages]
        open_ids += map(len, candidates)
        tokens.append(_ranked(public, candidates))
    return Claims(tokens=tokens, figures={"ids on the same pages": sum(open_ids) / len(open_ids)})


ATTACK = Attack(
    letter="O",
    name="Page access pattern",
    source="Xu, Cui, Peinado, Controlled-Channel Attacks, IEEE S&P 2015; the table's layout is a model",
    assumes="The host sees which pages of the table each look-up touches; the table lies in the order of ids.",
    cost="A page fault for every page touched; seconds of arithmetic.",
    rows=("host",),
    needs=frozenset({Grant.HOST}),
    run=run,
)
