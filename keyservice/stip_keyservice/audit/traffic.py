"""What a server sees of texts: computed from an instance's parts, as a recorded link shows it (`recording`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from stip_keyservice.audit.recording import TOP, Recording, Session, User
from stip_keyservice.audit.truth import Truth
from stip_keyservice.audit.view import Floats, Ids, Labelled, Seen, Top

BATCH_VALUES = 1 << 25
"""Values of the widest tensor computed at once: 128 MB."""


def computed(truth: Truth, texts: Mapping[User, Sequence[Ids]], prompt: int) -> Recording:
    """What the server of an instance would see of these texts, of which the first `prompt` ids are sent."""
    sessions = [
        Session(user, "computed", said) for user, each in texts.items() for said in observed(truth, each, prompt)
    ]
    return Recording.of(truth.manifest, sessions)


def observe(truth: Truth, text: Ids, prompt: int) -> Labelled:
    """One session: `text` [n + 1] of which the first `prompt` ids are sent, the others were answered; the last one is
    never fed."""
    return observed(truth, [text], prompt)[0]


def observed(truth: Truth, texts: Sequence[Ids], prompt: int) -> list[Labelled]:
    """As `observe`, several at a time; the order is kept."""
    seen: dict[int, Labelled] = {}
    widest = max(truth.manifest.width, truth.manifest.vocabulary if truth.manifest.output == "top" else 0)
    for length in sorted({len(text) for text in texts}):
        places = [place for place, text in enumerate(texts) if len(text) == length]
        step = max(1, BATCH_VALUES // (length * widest))
        for first in range(0, len(places), step):
            batch = places[first : first + step]
            seen |= zip(batch, _batch(truth, np.stack([texts[place] for place in batch]), prompt), strict=True)
    return [seen[place] for place in range(len(texts))]


def _batch(truth: Truth, texts: Ids, prompt: int) -> Iterator[Labelled]:
    """Sessions of texts [b, n + 1]."""
    fed, asked = texts[:, :-1], np.arange(prompt - 1, texts.shape[1] - 1)
    for text, seen in zip(texts, _seen(truth, fed, asked), strict=True):
        yield Labelled(seen, text[:-1], text[prompt:])


def _seen(truth: Truth, fed: Ids, asked: Ids) -> Iterator[Seen]:
    """What the server sees of ids [b, n]."""
    if truth.manifest.output == "ids":
        assert truth.vocabulary is not None
        yield from (Seen(None, ids, asked) for ids in np.argsort(truth.vocabulary)[fed])
        return
    rows = truth.keyed.rows[fed]
    if truth.keyed.positions is not None:
        rows = rows + truth.keyed.positions[: fed.shape[1]]
    answers = _answers(truth, rows)[:, asked]
    for each, answer in zip(rows, answers, strict=True):
        if truth.manifest.output == "hidden":
            yield Seen(each, None, asked, hidden=answer)
        else:
            yield Seen(each, None, asked, top=_top(answer))


@torch.inference_mode()
def _answers(truth: Truth, rows: Floats) -> Floats:
    """[b, n, d] final hidden states, or [b, n, V] logits, of rows [b, n, d]."""
    model, fed = truth.server.model, torch.from_numpy(rows)
    if truth.manifest.output == "hidden":
        answers: Floats = model.base_model(inputs_embeds=fed, use_cache=False).last_hidden_state.numpy()
    else:
        answers = model(inputs_embeds=fed, use_cache=False).logits.numpy()
    return answers


def _top(logits: Floats) -> Top:
    count = min(TOP, logits.shape[1])
    indices = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    largest = logits.max(axis=1, keepdims=True)
    log_sum_exp = largest[:, 0] + np.log(np.exp((logits - largest).astype(np.float64)).sum(axis=1))
    return Top(indices.astype(np.int64), np.take_along_axis(logits, indices, axis=1), log_sum_exp.astype(np.float32))
