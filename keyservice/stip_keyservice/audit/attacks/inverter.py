"""M: a linear decoder from the residual after k blocks to the token, trained on a helping user's sessions.

What is seen after k blocks is all that an operator would see if the first k ran in the enclave: the curve says what
that would buy. Blocks mix in earlier tokens, so that one token no longer has one state; a linear map takes most of that
out again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stip_keyservice.audit.attacks import Attack
from stip_keyservice.audit.attacks.public_text import GUESSES
from stip_keyservice.audit.attacks.stolen import accomplice_of, rows_of
from stip_keyservice.audit.attacks.training import discriminant
from stip_keyservice.audit.claims import Claims, Point
from stip_keyservice.audit.knowledge import Grant
from stip_keyservice.audit.view import Floats, Seen, View

BLOCKS = (0, 1, 4)
"""Blocks in the enclave, as far as the model has them."""
CLAIMED = 1


def _run(view: View) -> Claims:
    labelled = accomplice_of(view).labelled
    labels = np.concatenate([session.ids for session in labelled])
    depths = sorted({min(each, view.server.model.config.num_hidden_layers) for each in BLOCKS})
    shown = [np.concatenate(each) for each in _states(view, [session.seen for session in labelled], depths)]
    points = []
    for blocks, features, wanted in zip(depths, shown, _states(view, view.victims, depths), strict=True):
        decoder = discriminant(features, labels)
        points.append(Point("blocks in the enclave", blocks, [decoder.best(states, GUESSES) for states in wanted]))
    claimed = points[depths.index(min(CLAIMED, depths[-1]))]
    return Claims(tokens=claimed.tokens, points=points, figures={"labelled tokens": float(len(labels))})


def _states(view: View, sessions: Sequence[Seen], depths: Sequence[int]) -> list[list[Floats]]:
    """For each of the depths, [n, d] states of each session."""
    found: list[list[Floats]] = [[] for _ in depths]
    for rows in rows_of(view, sessions):
        states = view.server.inside(rows).states
        for column, blocks in zip(found, depths, strict=True):
            column.append(states[blocks].copy())
    return found


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
