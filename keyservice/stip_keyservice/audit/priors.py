"""What one would guess anyway, without a look at the server: the mark beside every figure.

Generous: the model's own prediction of a prompt is made from the true text before each position, which nobody has who
has not read it. Of answers it is no guess: an answer is the model's own prediction, word for word where it is greedy,
and whoever reads answers reads that. There the commonest token stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from stip_keyservice.audit.network import CompleteModel, Network
from stip_keyservice.audit.view import Ids, Labelled

FIRST = 10
"""Guesses a position."""
COMMONEST = "commonest token"
OWN_PREDICTION = "own prediction"
SURROGATE = "surrogate"
RANDOM = "random guess"


def commonest(texts: Sequence[Ids], vocabulary: int) -> Ids:
    """[k] the ids that are most frequent in texts, the first first; of equals the smallest."""
    counts = np.bincount(np.concatenate(texts), minlength=vocabulary)
    return np.argsort(-counts, kind="stable")[:FIRST]


def beginning(public_text: Sequence[Ids]) -> int | None:
    """The id that every public text begins with, if there is one: no finding of anybody's."""
    first = {int(text[0]) for text in public_text}
    return first.pop() if len(first) == 1 else None


def answered(said: Labelled) -> Ids:
    """Positions that were fed of what the model answered: those behind the asked ones."""
    behind = said.seen.asked + 1
    return behind[behind < len(said.ids)]


def guesses(plain: Network, public_text: Sequence[Ids], sessions: Sequence[Labelled]) -> Mapping[str, Sequence[Ids]]:
    """By the name of a prior, its guesses [n, k] at each session's text [n], the best first."""
    vocabulary = int(plain.config["vocab_size"])
    frequent = commonest(public_text, vocabulary)
    opening = commonest([text[:1] for text in public_text], vocabulary)
    predicted = []
    for said in sessions:
        guessed = np.vstack([opening, _predicted(plain, said.ids)])
        guessed[answered(said)] = frequent
        predicted.append(guessed)
    return {COMMONEST: [np.tile(frequent, (len(said.ids), 1)) for said in sessions], OWN_PREDICTION: predicted}


def _predicted(plain: Network, text: Ids) -> Ids:
    """[n - 1, k] for every position but the first."""
    order = np.argsort(-CompleteModel(plain.model).logits(text)[:-1], axis=1, kind="stable")
    return np.asarray(order[:, :FIRST], np.int64)
