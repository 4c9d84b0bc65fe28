"""Dictionary by ordinary use: rows of a user who helps, with what they were, label the rows of everybody else.

At layer 0 a token's row is the same in every session of an instance, and natural text repeats itself (Zipf): no key
needs to be known, and no table. Where positions are learned a row belongs to its position, and the dictionary grows
so much more slowly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stip_keyservice.audit.attacks import Attack
from stip_keyservice.audit.attacks.public_text import GUESSES, PublicText
from stip_keyservice.audit.claims import NO_GUESS, Claims, Point
from stip_keyservice.audit.knowledge import Grant
from stip_keyservice.audit.view import Ids, NotApplicable, Seen, View

CURVE = "labelled tokens"


def _words(seen: Seen) -> list[bytes]:
    """What a server can look up: the bytes of each row, or of each permuted id."""
    if seen.ids is not None:
        return [each.tobytes() for each in seen.ids]
    assert seen.rows is not None
    return [row.tobytes() for row in np.ascontiguousarray(seen.rows)]


def _read(view: View, labels: dict[bytes, int], public: PublicText) -> list[Ids]:
    """[n, k] per session: the labelled id first; behind it, or alone, the commonest ids without a label."""
    rest = public.commonest(without=np.unique(np.fromiter(labels.values(), np.int64, len(labels))))
    guesses: list[Ids] = []
    for seen in view.victims:
        known = np.array([labels.get(word, NO_GUESS) for word in _words(seen)], np.int64)
        others = np.broadcast_to(rest, (len(known), len(rest)))
        shifted = np.column_stack([known[:, None], others])
        unlabelled = np.column_stack([others, np.full((len(known), 1), NO_GUESS)])
        guesses.append(np.where(known[:, None] == NO_GUESS, unlabelled, shifted)[:, :GUESSES])
    return guesses


def _vocabulary(view: View, labels: dict[bytes, int]) -> Ids | None:
    if any(seen.ids is None for seen in view.victims):
        return None
    found = np.full(view.vocabulary, NO_GUESS, np.int64)
    for word, token in labels.items():
        found[np.frombuffer(word, np.int64)[0]] = token
    return found


def _prices(total: int) -> Sequence[int]:
    """Powers of ten up to `total`, and `total`."""
    powers = [10**digits for digits in range(1, len(str(total)))]
    return [*(each for each in powers if each < total), total]


def run(view: View) -> Claims:
    """Tokens by the dictionary, and how they grow with its size."""
    if view.accomplice is None:
        raise NotApplicable("no user of the instance helps: no row has a label")
    pairs = [
        (word, int(token))
        for labelled in view.accomplice.labelled
        for word, token in zip(_words(labelled.seen), labelled.ids, strict=True)
    ]
    if not pairs:
        raise NotApplicable("the user who helps had no session: no row has a label")
    public, labels, points, done = PublicText.of(view), dict[bytes, int](), list[Point](), 0
    for price in _prices(len(pairs)):
        labels.update(pairs[done:price])
        done = price
        points.append(Point(CURVE, float(price), _read(view, labels, public)))
    return Claims(
        tokens=points[-1].tokens,
        vocabulary=_vocabulary(view, labels),
        points=points,
        figures={"distinct rows labelled": float(len(labels))},
    )


ATTACK = Attack(
    letter="L",
    name="Dictionary by ordinary use",
    source="ours",
    assumes="A user of the same instance tells the operator what their own sessions said.",
    cost="Ordinary use within a token budget; a look-up a token.",
    rows=("accomplice",),
    needs=frozenset({Grant.ACCOMPLICE}),
    run=run,
)
