"""Text becomes markup nowhere."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stip_keyservice.audit.report.html import Html, markup, tag
from stip_keyservice.audit.report.markdown import text


@given(st.text())
def test_text_never_opens_an_element_or_leaves_an_attribute(said: str) -> None:
    made = tag("p", said, title=said)
    assert made.count("<") == made.count(">") == 2
    assert made.count('"') == 2


def test_markup_stays_and_nothing_is_nothing() -> None:
    assert tag("p", tag("b", "a"), None, ["<", tag("i")]) == "<p><b>a</b>&lt;<i></i></p>"
    assert isinstance(markup(["a", "b"]), Html)


def test_attributes_that_are_not_there_are_left_out() -> None:
    assert (
        tag("td", class_=None, hidden=True, aria_hidden="true", colspan=2)
        == '<td hidden aria-hidden="true" colspan="2"></td>'
    )


def test_void_elements_have_no_end() -> None:
    assert tag("meta", charset="utf-8") == '<meta charset="utf-8">'


@given(st.text())
def test_text_in_markdown_leaves_neither_its_cell_nor_its_line(said: str) -> None:
    made = text(said)
    assert "\n" not in made
    assert "\r" not in made
    assert all(made[index - 1] == "\\" for index, character in enumerate(made) if character in "|<`[")
