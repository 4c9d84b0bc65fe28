"""A helping user's enclave decodes what the operator sends it, whosever it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stip_keyservice.audit.attacks import attack
from stip_keyservice.audit.claims import NO_GUESS
from stip_keyservice.audit.view import NotApplicable

PRESETS = ["paper", "hardened", "throughput"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_greedy_victims_answers_are_decoded_whole(ground: Any, preset: str) -> None:
    view = ground.view(preset, "accomplice")
    claims = attack("K").run(view)
    assert claims.tokens is not None
    assert claims.scope == "answers"
    for guesses, seen, text in zip(claims.tokens, view.victims, ground.victims, strict=True):
        behind = seen.asked[:-1] + 1
        # ids come as they were sampled; states and logits are decoded greedily
        plain = ground.plain.logits(ground.plain.rows(text[:-1])).argmax(axis=1)[behind - 1]
        assert np.mean(guesses[behind, 0] == (text[behind] if preset == "throughput" else plain)) > 0.98


@pytest.mark.parametrize("preset", ["paper", "hardened"])
def test_asking_again_names_most_of_what_a_sampling_victim_was_told(ground: Any, preset: str) -> None:
    view = ground.view(preset, "accomplice")
    claims = attack("K").run(view)
    assert claims.tokens is not None
    first, any_of_ten = [], []
    for guesses, seen, text in zip(claims.tokens, view.victims, ground.victims, strict=True):
        behind = seen.asked[:-1] + 1
        first.append(guesses[behind, 0] == text[behind])
        any_of_ten.append((guesses[behind] == text[behind][:, None]).any(axis=1))
    assert np.mean(any_of_ten) > np.mean(first) + 0.15
    assert np.mean(any_of_ten) > 0.55


@pytest.mark.parametrize("preset", PRESETS)
def test_only_positions_that_answers_led_to_are_guessed(ground: Any, preset: str) -> None:
    view = ground.view(preset, "accomplice")
    claims = attack("K").run(view)
    assert claims.tokens is not None
    for guesses, seen in zip(claims.tokens, view.victims, strict=True):
        guessed = np.flatnonzero((guesses != NO_GUESS).any(axis=1))
        assert guessed.tolist() == (seen.asked[:-1] + 1).tolist()
        assert len(guesses) == len(seen)


@pytest.mark.parametrize("preset", PRESETS)
def test_without_a_user_nobody_decodes(ground: Any, preset: str) -> None:
    with pytest.raises(NotApplicable, match="no user of this instance"):
        attack("K").run(ground.view(preset))


def test_a_user_of_another_instance_does_not_help(ground: Any) -> None:
    with pytest.raises(NotApplicable, match="no user of this instance"):
        attack("K").run(ground.view("hardened", "sibling"))
