"""The plain words are true of the figures: as plain where a preset fails as where it holds, and no word beyond."""

from __future__ import annotations

import pytest

from stip_keyservice.audit.document import Cell, Report
from stip_keyservice.audit.knowledge import KNOWLEDGE
from stip_keyservice.audit.report import words
from stip_keyservice.audit.report.judging import KINDS, Level

from .conftest import made_up, share, tokens


def _report(*cells: Cell) -> Report:
    return made_up("hardened").model_copy(update={"cells": cells})


def _said(*cells: Cell) -> str:
    return " ".join(sentence.text for sentence in words.read(_report(*cells)).sentences).replace(
        "\N{NO-BREAK SPACE}", " "
    )


def _cell(letter: str, knowledge: str, value: float) -> Cell:
    return Cell(attack=letter, knowledge=knowledge, metrics=tokens(value))


def test_a_known_table_that_opens_everything_is_said_to() -> None:
    said = _said(_cell("C", "table", 1.0))
    assert said.startswith(
        "An operator that knows the embedding table reads every session that was tested, word for word: 100 % "
    )
    assert "word for word: 100 % of tokens (" in said
    assert "by attack C" in said


def test_nearly_everything_is_not_called_everything() -> None:
    said = _said(_cell("C", "table", 0.998))
    assert "reads nearly everything: 99.8 % of tokens" in said
    assert "every" not in said.replace("everything", "")


def test_every_token_is_not_called_every_session_where_no_session_was_counted() -> None:
    said = _said(Cell(attack="C", knowledge="table", metrics=(share("token_top1", 1.0, 0.18),)))
    assert "reads every token that was tested: 100 % of tokens" in said


def test_a_preset_that_holds_is_said_to_beside_the_guess() -> None:
    said = _said(_cell("A", "server", 0.17), _cell("B", "server", 0.15))
    assert "The operator alone stays at what one would guess anyway, or below: 17.0 % of tokens" in said
    assert "the model's own prediction of the next token gets 18.0 %" in said


def test_one_attack_above_the_guess_decides_over_all_that_stayed_there() -> None:
    said = _said(_cell("A", "server", 0.17), _cell("B", "server", 0.6), _cell("C", "server", 0.15))
    assert "stays at" not in said
    assert "more than one would guess: 60.0 % of tokens" in said


def test_too_little_traffic_is_no_comfort() -> None:
    reading = words.read(_report(_cell("B", "server", 0.205)))
    assert "could not be told from this traffic" in reading.headline
    assert "may read more than one would guess" in reading.sentences[0].text


def test_splicing_is_said_to_read_answers_and_nothing_else() -> None:
    said = _said(_cell("K", "accomplice", 1.0))
    assert "reads every answer that was tested, word for word" in said
    assert "session" not in said


def test_a_copy_of_the_model_is_said_beside_what_was_read() -> None:
    stolen = Cell(attack="G", knowledge="accomplice", metrics=(share("stolen_agreement", 0.95, 0.2, of="found table"),))
    said = _said(_cell("L", "accomplice", 0.9), stolen)
    assert "gets a copy of the model that says nearly always the same: 95.0 % of next tokens" in said


def test_a_key_is_said_where_nothing_was_opened_by_it() -> None:
    said = _said(Cell(attack="N", knowledge="enclave", metrics=(share("residual_cosine", 0.999, 0.06),)))
    assert "Whoever breaks one enclave finds nearly all of a key: 99.9 % |cosine| with the residual key" in said


def test_what_is_not_applicable_says_the_reason_that_is_its_own() -> None:
    cells = [Cell(attack=letter, knowledge="base", not_applicable="uses nothing of this") for letter in "BCI"]
    cells += [Cell(attack=letter, knowledge="server", not_applicable="uses nothing of this") for letter in "DF"]
    said = _said(*cells, Cell(attack="D", knowledge="base", not_applicable="no public base was named"))
    assert "derives: nothing was measured (no public base was named)." in said
    assert "0 %" not in said


def test_the_headline_counts_those_who_read_more() -> None:
    headline = words.read(made_up("hardened")).headline
    assert headline.startswith("Against the operator alone, every attack that was run stayed at what one would guess")
    assert "Others know or have more: 4 read nearly everything (1 of answers alone)" in headline
    assert "2 read more than one would guess" in headline


def test_without_a_measurement_of_the_operator_alone_the_headline_says_so() -> None:
    assert words.read(_report(_cell("C", "table", 1.0))).headline.startswith(
        "What the operator alone reads was not measured. Others know or have more: 1 read nearly everything."
    )


@pytest.mark.parametrize("knowledge", KNOWLEDGE)
def test_every_row_of_the_matrix_has_a_subject(knowledge: str) -> None:
    assert words.who(knowledge) == words.WHO[knowledge]


def test_a_row_that_nobody_knows_is_named_by_itself() -> None:
    assert "An attacker of the row “martian”" in _said(_cell("B", "martian", 0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_every_level_of_every_kind_has_words(kind: str) -> None:
    assert set(words.PREDICATES[kind]) == set(Level)  # type: ignore[index]
    assert {level for which, _ in words.OTHERS for level in which} == set(Level)
    assert set(words.ALONE) == {*Level, None}
