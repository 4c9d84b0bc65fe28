"""M: a linear decoder from the residual after k blocks to the token, trained on a helping user's sessions.

What is seen after k blocks is all that an operator would see if the first k ran in the enclave: the curve says what
that would buy. Blocks mix in earlier tokens, so that one token no longer has one state; a linear map takes most of that
out again.
"""

from __future__ import annotations

import numpy as np

from stip_keyservice.audit.attacks import Attack
from stip_keyservice.audit.attacks.stolen import accomplice_of
from stip_keyservice.audit.attacks.training import discriminant
from stip_keyservice.audit.claims import Claims, Point
from stip_keyservice.audit.knowledge import Grant
from stip_keyservice.audit.view import Floats, Seen, View

GUESSES = 10
BLOCKS = (0, 1, 4)
"""Blocks in the enclave, as far as the model has them."""
CLAIMED = 1


def _run(view: View) -> Claims:
    labelled = accomplice_of(view).labelled
    labels = np.concatenate([session.ids for session in labelled])
    shown, wanted = (
        [_states(view, session.seen) for session in labelled],
        [_states(view, seen) for seen in view.victims],
    )
    depth = len(shown[0]) - 1
    points = []
    for blocks in sorted({min(each, depth) for each in BLOCKS}):
        decoder = discriminant(np.concatenate([states[blocks] for states in shown]), labels)
        tokens = [decoder.best(states[blocks], GUESSES) for states in wanted]
        points.append(Point("blocks in the enclave", blocks, tokens))
    claimed = next(point for point in points if point.x == min(CLAIMED, depth))
    return Claims(tokens=claimed.tokens, points=points, figures={"labelled tokens": float(len(labels))})


def _states(view: View, seen: Seen) -> Floats:
    """[L + 1, n, d]."""
    return view.server.inside(view.rows(seen)).states


ATTACK = Attack(
    letter="M",
    name="trained inverter",
    source="ours",
    assumes="residual states after k blocks, and a user of the same instance who says which tokens theirs were",
    cost="the helping user's ordinary traffic and one linear fit",
    rows=("accomplice",),
    needs=frozenset({Grant.ACCOMPLICE}),
    run=_run,
)
