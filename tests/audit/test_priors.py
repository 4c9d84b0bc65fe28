"""Prior guesses are what somebody says who saw nothing of the server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from stip_keyservice.audit import priors
from stip_keyservice.audit.view import Ids, Labelled, Seen


def test_the_commonest_tokens_come_in_the_order_of_their_counts() -> None:
    texts = [np.array([4, 4, 2, 7]), np.array([4, 2, 9])]
    assert priors.commonest(texts, 10)[:4].tolist() == [4, 2, 7, 9]
    assert len(priors.commonest(texts, 10)) == 10
    assert len(priors.commonest([np.array([1])], 3)) == 3  # there are no ten


def test_a_beginning_is_known_where_every_text_has_it() -> None:
    assert priors.beginning([np.array([0, 5]), np.array([0, 7])]) == 0
    assert priors.beginning([np.array([0, 5]), np.array([1, 7])]) is None


def said(text: Ids, asked: Sequence[int] = ()) -> Labelled:
    return Labelled(Seen(None, text, np.array(asked, np.int64)), text, np.zeros(len(asked), np.int64))


def test_own_prediction_is_the_plain_models_from_the_true_text_before(ground: Any) -> None:
    text = ground.victims[0]
    (guesses,) = priors.guesses(ground.plain, ground.public, [said(text)])[priors.OWN_PREDICTION]
    assert guesses.shape == (len(text), 10)
    assert guesses[0, 0] == text[0] == 0  # every text begins so
    with torch.inference_mode():
        cut = ground.plain.model(input_ids=torch.from_numpy(text[:20])[None]).logits[0, -1]
    assert guesses[20].tolist() == torch.topk(cut, 10).indices.tolist()


def test_a_greedy_answer_is_not_guessed_by_the_model_that_gave_it(ground: Any) -> None:
    prompt = ground.victims[0][:12]
    with torch.inference_mode():
        made = ground.plain.model.generate(torch.from_numpy(prompt)[None], max_new_tokens=8, do_sample=False)
    text = made[0].numpy()
    session = said(text, range(11, len(text)))
    assert priors.answered(session).tolist() == list(range(12, len(text)))
    guesses = priors.guesses(ground.plain, ground.public, [session])
    (own,), (common,) = guesses[priors.OWN_PREDICTION], guesses[priors.COMMONEST]
    assert (own[12:] == common[12:]).all()
    assert (own[1:12] != common[1:12]).any(axis=1).all()
    (unasked,) = priors.guesses(ground.plain, ground.public, [said(text)])[priors.OWN_PREDICTION]
    assert (unasked[12:, 0] == text[12:]).all()  # it would have said every word


def test_the_commonest_token_is_guessed_everywhere(ground: Any) -> None:
    sessions = [said(text) for text in ground.victims[:2]]
    for guesses in priors.guesses(ground.plain, ground.public, sessions)[priors.COMMONEST]:
        assert (guesses == guesses[0]).all()
        counts = np.bincount(np.concatenate(ground.public))[guesses[0]]
        assert (np.diff(counts) <= 0).all()


def test_prior_guesses_never_look_at_the_token_itself_or_at_later_ones(ground: Any) -> None:
    text = ground.victims[0]
    other = np.concatenate([text[:10], (text[10:] + 1) % 2048])
    for first, second in zip(
        priors.guesses(ground.plain, ground.public, [said(text)]).values(),
        priors.guesses(ground.plain, ground.public, [said(other)]).values(),
        strict=True,
    ):
        assert (first[0][:11] == second[0][:11]).all()
