"""The operator and one user take the model: all of it where the head is on the server, else as much as is learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from stip_keyservice.audit.attacks import attack
from stip_keyservice.audit.claims import Claims
from stip_keyservice.audit.view import NotApplicable, View

WITH_HEAD = ["paper", "throughput"]
PRESETS = [*WITH_HEAD, "hardened"]


@pytest.fixture(scope="module")
def claims(ground: Any) -> Callable[[str], Claims]:
    return cache(lambda preset: attack("G").run(ground.view(preset, "accomplice")))


def agreement(ground: Any, stolen: Any) -> float:
    """Share of the victims' positions at which a stolen model's next token is the plain model's."""
    same = [
        stolen.logits(text[:-1]).argmax(axis=1) == ground.plain.logits(ground.plain.rows(text[:-1])).argmax(axis=1)
        for text in ground.victims
    ]
    return float(np.mean(same))


def commonest(ground: Any) -> float:
    """The agreement of whoever always says the commonest id."""
    said = np.bincount(np.concatenate(ground.public)).argmax()
    plain = [ground.plain.logits(ground.plain.rows(text[:-1])).argmax(axis=1) for text in ground.victims]
    return float(np.mean(np.concatenate(plain) == said))


def read(view: View, tokens: Any, texts: Any) -> float:
    """Share of the victims' answers that the first guesses name."""
    right = [
        guesses[seen.asked[:-1] + 1, 0] == text[seen.asked[:-1] + 1]
        for guesses, seen, text in zip(tokens, view.victims, texts, strict=True)
    ]
    return float(np.mean(right))


@pytest.mark.parametrize("preset", WITH_HEAD)
def test_the_whole_order_of_the_vocabulary_is_read_from_made_up_answers(
    ground: Any, claims: Callable[[str], Claims], preset: str
) -> None:
    assert claims(preset).vocabulary.tolist() == ground.truth(preset).vocabulary.tolist()  # type: ignore[union-attr]


def test_a_server_that_decodes_alone_is_the_whole_model_once_the_order_is_known(
    ground: Any, claims: Callable[[str], Claims]
) -> None:
    _, stolen = claims("throughput").stolen[0]
    text = ground.victims[0][:-1]
    np.testing.assert_allclose(stolen.logits(text), ground.plain.logits(ground.plain.rows(text)), atol=1e-3)


@pytest.mark.parametrize("preset", ["paper", "hardened"])
def test_labelled_rows_and_the_server_part_make_a_working_copy(
    ground: Any, claims: Callable[[str], Claims], preset: str
) -> None:
    _, stolen = claims(preset).stolen[0]
    assert claims(preset).figures["share of the table's rows known"] < 0.5  # of the types; more of what is said
    assert agreement(ground, stolen) > commonest(ground) + 0.1


def test_no_order_is_claimed_where_the_head_stays_in_the_enclave(claims: Callable[[str], Claims]) -> None:
    assert claims("hardened").vocabulary is None


@pytest.mark.parametrize("preset", WITH_HEAD)
def test_answers_of_the_protocol_itself_show_more_of_the_order_the_more_there_are(
    ground: Any, claims: Callable[[str], Claims], preset: str
) -> None:
    view = ground.view(preset, "accomplice")
    points = claims(preset).points
    shares = [read(view, point.tokens, ground.victims) for point in points]
    assert [point.x for point in points] == sorted(point.x for point in points)
    assert shares == sorted(shares)
    assert shares[-1] > shares[0] > 0.1


def test_every_position_without_an_answer_has_no_guess(ground: Any, claims: Callable[[str], Claims]) -> None:
    for preset in WITH_HEAD:
        for guesses, seen in zip(
            claims(preset).points[0].tokens, ground.view(preset, "accomplice").victims, strict=True
        ):
            assert (guesses[: seen.asked[0] + 1] == -1).all()


def test_an_enclave_that_reads_different_answers_as_one_id_gives_no_order(ground: Any) -> None:
    view = ground.view("paper", "accomplice")
    deaf = replace(view.accomplice, decode=lambda seen: np.zeros(len(seen.asked), np.int64))
    with pytest.raises(NotApplicable, match="different answers as one id"):
        attack("G").run(replace(view, accomplice=deaf))


@pytest.mark.parametrize("preset", PRESETS)
def test_without_a_user_there_is_nothing_to_take(ground: Any, preset: str) -> None:
    with pytest.raises(NotApplicable, match="no user of this instance"):
        attack("G").run(ground.view(preset))


@pytest.mark.long
def test_the_same_view_gives_the_same_copy(ground: Any, claims: Callable[[str], Claims]) -> None:
    again = attack("G").run(ground.view("hardened", "accomplice"))
    text = ground.victims[0][:-1]
    np.testing.assert_array_equal(claims("hardened").stolen[0][1].logits(text), again.stolen[0][1].logits(text))
