"""K: the operator answers a helping user's session with another user's answers, and that user's enclave decodes them.

Nothing lossless closes this on a shared instance: the enclave cannot tell a hidden state that its session led to from
another one of the same instance. What is decoded is what the decoder picks. Where the victim's enclave sampled, and
picked otherwise, the other likely ids come from asking again: with the order of the shown logits changed, or with
hidden states moved a little.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from stip_keyservice.audit.attacks import Attack
from stip_keyservice.audit.attacks.public_text import GUESSES
from stip_keyservice.audit.attacks.stolen import accomplice_of, by_position
from stip_keyservice.audit.claims import NO_GUESS, Claims
from stip_keyservice.audit.knowledge import Grant
from stip_keyservice.audit.view import Accomplice, Ids, Seen, View

ASKED_AGAIN = 64
"""Times that a hidden state is decoded, each time moved another way."""
MOVED = 0.3
"""Standard deviation of a move, over that of the state."""


def _run(view: View) -> Claims:
    accomplice, generator = accomplice_of(view), view.generator("splicing")
    tokens = [by_position(seen, _read(accomplice, seen, generator)) for seen in view.victims]
    return Claims(tokens=tokens, scope="answers")


def _read(accomplice: Accomplice, seen: Seen, generator: np.random.Generator) -> Ids:
    """[m, k] ids behind the answers of one session, the likeliest first."""
    if seen.hidden is not None:
        return _read_hidden(accomplice, seen, generator)
    if seen.top is None:
        return accomplice.decode(seen)[:, None]  # ids that were picked already
    top = seen.top
    ranks = min(GUESSES, top.indices.shape[1])
    columns = []
    for rank in range(ranks):
        first = np.roll(top.indices, -rank, axis=1)
        columns.append(accomplice.decode(replace(seen, top=replace(top, indices=first))))
    return np.stack(columns, axis=1)


def _read_hidden(accomplice: Accomplice, seen: Seen, generator: np.random.Generator) -> Ids:
    """What is decoded first, then what comes most often of the states around it."""
    hidden = seen.hidden
    assert hidden is not None
    answers = [accomplice.decode(seen)]
    for _ in range(ASKED_AGAIN):
        move = generator.normal(0, MOVED * hidden.std(), hidden.shape).astype(np.float32)
        answers.append(accomplice.decode(replace(seen, hidden=hidden + move)))
    guesses = np.full((len(hidden), GUESSES), NO_GUESS)
    for row, heard in zip(guesses, np.stack(answers, axis=1), strict=True):
        found, counts = np.unique(heard, return_counts=True)
        counts[found == heard[0]] += len(heard)
        best = found[np.argsort(-counts, kind="stable")][:GUESSES]
        row[: len(best)] = best
    return guesses


ATTACK = Attack(
    letter="K",
    name="reply splicing",
    source="ours",
    assumes="an operator that sends wrong replies, and a user of the same instance who says what they read",
    cost="a reply of the helping user's budget for each answer of the victim",
    rows=("accomplice",),
    needs=frozenset({Grant.ACCOMPLICE}),
    run=_run,
)
