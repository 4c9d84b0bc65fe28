"""G: the operator and one user take the model: the vocabulary's order, the table, and a copy that runs without them.

The permutation of the vocabulary comes in two ways. An operator that keeps to the protocol holds the answers a user was
given against what its server computed: each says which permuted id was likely. One that does not, sends V made-up
answers and lets the user's enclave decode them. With the order known, the server part is a model but for the input
rows, and those the user's own sessions label.

Where the head stays in the enclave, there is no order to find, and the head is learned: from hidden states, the ids
that followed, and the ids that the user's enclave reads in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from stip_keyservice.audit.attacks import Attack
from stip_keyservice.audit.attacks.public_text import GUESSES
from stip_keyservice.audit.attacks.stolen import (
    HeadedCopy,
    ServerCopy,
    Tabulated,
    accomplice_of,
    by_position,
    tabulate,
    text_of,
)
from stip_keyservice.audit.attacks.training import descend
from stip_keyservice.audit.claims import NO_GUESS, Claims, Point, Stolen
from stip_keyservice.audit.knowledge import Grant
from stip_keyservice.audit.view import Accomplice, Ids, Labelled, NotApplicable, Seen, Top, View

LABELLED = (250, 1000, 4000, 16_000)
"""Tokens of the user: the points of the curve."""
LEAST = 1e-12
"""Bound of probabilities, from below and of their complements."""
HEAD_STATES = 40_000
"""Hidden states that a head is learned from: as many answers of the user's budget."""
HEAD_STEPS, HEAD_PASSES = 240, 8
"""Steps of training, or so many passes over the states, where they are few."""
HEAD_SIZE, HEAD_RATE = 512, 5e-3
TOP = 64
SURE = 100.0
"""A made-up logit above zeros: any sampler picks it."""


def _run(view: View) -> Claims:
    accomplice = accomplice_of(view)
    table = tabulate(view, accomplice.labelled)
    if view.victims[0].hidden is not None:
        head = _learned_head(view, accomplice, table)
        return Claims(
            stolen=[("server part, learned head", HeadedCopy(view.server, table, head))], figures=_figures(view, table)
        )
    vocabulary = _decoded(view, accomplice)
    permuted = np.argsort(vocabulary)
    if view.victims[0].ids is not None:  # the server part embeds the ids itself
        rows = view.server.embedding[permuted]
        table = Tabulated(rows, None, np.ones(view.vocabulary, bool))
    copy: Stolen = ServerCopy(view.server, table, permuted)
    return Claims(
        vocabulary=vocabulary,
        stolen=[("server part, found table", copy)],
        points=_curve(view, accomplice.labelled),
        scope="answers",
        figures=_figures(view, table),
    )


def _figures(view: View, table: Tabulated) -> dict[str, float]:
    return {"share of the table's rows known": float(table.known.mean())}


def _decoded(view: View, accomplice: Accomplice) -> Ids:
    """[V] true id of each permuted id: what the user reads when each is sent as an answer."""
    count = view.vocabulary
    every, asked = np.arange(count), np.arange(count + 1)
    if view.victims[0].ids is not None:
        sent = Seen(None, np.concatenate([[0], every]), asked)
    else:
        others = min(TOP, count)
        indices = (every[:, None] + np.arange(others)) % count
        values = np.zeros((count, others), np.float32)
        values[:, 0] = SURE
        rows = np.zeros((count, view.server.model.config.hidden_size), np.float32)
        sent = Seen(rows, None, every, top=Top(indices, values, np.full(count, SURE, np.float32)))
    read = accomplice.decode(sent)[:count]
    if len(np.unique(read)) != count:
        raise NotApplicable("the user's enclave reads different answers as one id")
    return read


def _curve(view: View, labelled: Sequence[Labelled]) -> list[Point]:
    """The victims' answers, read under the order that the protocol's own answers show."""
    return [
        Point("labelled tokens", tokens, [_under(order, seen) for seen in view.victims])
        for tokens, order in _orders(view, labelled)
    ]


def _under(order: Ids, seen: Seen) -> Ids:
    """[n, k] guesses of one session's answers under a guessed order."""
    if seen.ids is not None:
        behind = seen.asked + 1
        return by_position(seen, order[seen.ids[behind[behind < len(seen)]]][:, None])
    assert seen.top is not None
    return by_position(seen, order[seen.top.indices[:, :GUESSES]])


def _orders(view: View, labelled: Sequence[Labelled]) -> Iterator[tuple[int, Ids]]:
    """Numbers of labelled tokens, and [V] the true id of each permuted id after so many; `NO_GUESS` where nothing was
    learned. At `LABELLED`, as far as there are so many, and at the end.

    Under `throughput` each id that was fed stands beside its label. Otherwise each position gives the probability p(i)
    of every permuted id i, and the true id v that followed: v is i with a likelihood of the product of p(i) where v
    followed and of 1 - p(i) elsewhere. The surest pairs are taken first, each id once.
    """
    sizes = np.cumsum([len(session.ids) for session in labelled])
    labelled = labelled[: int(np.searchsorted(sizes, LABELLED[-1])) + 1]
    stops = set(np.minimum(np.searchsorted(sizes, LABELLED), len(labelled) - 1).tolist())
    evidence = _Pairs(view) if labelled[0].seen.ids is not None else _Evidence(view, labelled)
    for number, session in enumerate(labelled):
        evidence.add(session)
        if number in stops:
            yield int(sizes[number]), evidence.order()


class _Pairs:
    """Ids that were fed, beside their labels."""

    def __init__(self, view: View) -> None:
        self._order = np.full(view.vocabulary, NO_GUESS)

    def add(self, session: Labelled) -> None:
        assert session.seen.ids is not None
        self._order[session.seen.ids] = session.ids

    def order(self) -> Ids:
        return self._order.copy()


class _Evidence:
    """Log-likelihoods of pairs of a permuted id and a true one."""

    def __init__(self, view: View, labelled: Sequence[Labelled]) -> None:
        self._view = view
        self._labels = np.unique(np.concatenate([text_of(session)[1:] for session in labelled]))
        self._followed = np.zeros((len(self._labels), view.vocabulary))
        self._elsewhere = np.zeros(view.vocabulary)
        self._counts = np.zeros(len(self._labels), np.int64)

    def add(self, session: Labelled) -> None:
        logits = self._view.server.logits(self._view.rows(session.seen)).astype(np.float64)
        shares = np.exp(logits - _log_sum_exp(logits)).clip(LEAST, 1 - LEAST)
        label = np.searchsorted(self._labels, text_of(session)[1:])
        without = np.log1p(-shares)
        np.add.at(self._followed, label, np.log(shares) - without)
        np.add.at(self._counts, label, 1)
        self._elsewhere += without.sum(axis=0)

    def order(self) -> Ids:
        found = np.full(self._view.vocabulary, NO_GUESS)
        said = np.flatnonzero(self._counts)
        likelihood = self._followed[said] + self._elsewhere
        found[_one_to_one(likelihood - _log_sum_exp(likelihood))] = self._labels[said]
        return found


def _log_sum_exp(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """[c, 1] over the columns of [c, V]."""
    largest = values.max(axis=1, keepdims=True)
    total: NDArray[np.float64] = largest + np.log(np.exp(values - largest).sum(axis=1, keepdims=True))
    return total


def _one_to_one(scores: NDArray[np.float64]) -> Ids:
    """[c] columns for the rows of `scores` [c, V], c at most V, each column once. In rounds, every row without a column
    asks for its best free one, and whoever scores highest there gets it."""
    left, columns = scores.copy(), np.full(len(scores), NO_GUESS)
    while (waiting := np.flatnonzero(columns == NO_GUESS)).size:
        wanted = left[waiting].argmax(axis=1)
        rising = np.argsort(left[waiting, wanted], kind="stable")
        winner = np.full(left.shape[1], NO_GUESS)
        winner[wanted[rising]] = waiting[rising]  # the highest writes last
        taken = np.flatnonzero(winner != NO_GUESS)
        columns[winner[taken]] = taken
        left[:, taken] = -np.inf
    return columns


def _learned_head(view: View, accomplice: Accomplice, table: Tabulated) -> torch.nn.Linear:
    """A head [V, d] that says which id follows a hidden state: in the user's sessions and in text of one's own, run
    under the rows that were found; and which id the user's enclave reads when it is sent that state."""
    generator = view.generator("theft")
    every = [text_of(session) for session in accomplice.labelled] + list(view.public_text)
    texts = [every[number] for number in generator.permutation(len(every))]
    texts = texts[: 1 + int(np.searchsorted(np.cumsum([len(text) for text in texts]), HEAD_STATES))]
    states = [view.server.inside(table.enter(text[:-1])).states[-1] for text in texts]
    read = [accomplice.decode(Seen(each, None, np.arange(len(each)), hidden=each)) for each in states]
    hidden, followed = np.concatenate(states), np.concatenate([text[1:] for text in texts])
    head = torch.nn.Linear(hidden.shape[1], view.vocabulary)
    counts = np.bincount(followed, minlength=view.vocabulary) + 1.0
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.from_numpy(np.log(counts / counts.sum())))
    inputs, labels = torch.from_numpy(hidden), torch.from_numpy(np.stack([followed, np.concatenate(read)]))
    steps = min(HEAD_STEPS, HEAD_PASSES * -(-len(hidden) // HEAD_SIZE))
    chosen = torch.from_numpy(generator.integers(len(hidden), size=(steps, HEAD_SIZE)))

    def loss(step: int) -> torch.Tensor:
        scores = head(inputs[chosen[step]]).repeat(len(labels), 1)
        return torch.nn.functional.cross_entropy(scores, labels[:, chosen[step]].flatten())

    descend(head.parameters(), loss, steps=steps, rate=HEAD_RATE)
    return head


ATTACK = Attack(
    letter="G",
    name="model theft by the operator and one user",
    source="ours; the order of a vocabulary from answers after the TEE-IO design of arXiv 2312.00025",
    assumes="a user of the same instance who helps; for the whole order at once, an operator that makes up answers",
    cost="V answers of the user's budget, or their ordinary traffic",
    rows=("accomplice",),
    needs=frozenset({Grant.ACCOMPLICE}),
    run=_run,
)
