"""What a server sees of a session: computed from an instance's parts, as a recorded link shows it."""

from __future__ import annotations

import numpy as np

from stip_keyservice.audit.truth import Truth
from stip_keyservice.audit.view import Floats, Ids, Labelled, Seen, Top

TOP = 64
"""Logits of one answer under `paper` (wire/model.proto)."""


def observe(truth: Truth, text: Ids, prompt: int) -> Labelled:
    """One session: `text` [n + 1] of which the first `prompt` ids are sent, the others were answered; the last one is
    never fed."""
    fed, asked = text[:-1], np.arange(prompt - 1, len(text) - 1)
    if truth.manifest.output == "ids":
        assert truth.vocabulary is not None
        permuted = np.argsort(truth.vocabulary)
        return Labelled(Seen(None, permuted[fed], asked), fed, text[prompt:])
    rows = truth.keyed.rows[fed]
    if truth.keyed.positions is not None:
        rows = rows + truth.keyed.positions[: len(fed)]
    if truth.manifest.output == "hidden":
        seen = Seen(rows, None, asked, hidden=truth.server.inside(rows).states[-1][asked])
    else:
        seen = Seen(rows, None, asked, top=_top(truth.server.logits(rows)[asked]))
    return Labelled(seen, fed, text[prompt:])


def _top(logits: Floats) -> Top:
    count = min(TOP, logits.shape[1])
    indices = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    largest = logits.max(axis=1, keepdims=True)
    log_sum_exp = largest[:, 0] + np.log(np.exp((logits - largest).astype(np.float64)).sum(axis=1))
    return Top(indices.astype(np.int64), np.take_along_axis(logits, indices, axis=1), log_sum_exp.astype(np.float32))
