"""HTML and SVG from Python, escaped: text becomes markup nowhere else."""

from __future__ import annotations

import html
from collections.abc import Iterable


class Html(str):
    """Markup. Only this module makes it from text."""

    __slots__ = ()


Child = str | Html | Iterable["Child"] | None
Attribute = str | int | bool | None

VOID = frozenset({"meta", "br", "hr", "col"})
"""Elements of HTML that have no end tag."""


def escape(text: str) -> Html:
    """Text as markup, quotes too."""
    return Html(html.escape(text, quote=True))


def markup(child: Child) -> Html:
    """A child, or several one after another, as markup: text is escaped, None is nothing."""
    if child is None:
        return Html()
    if isinstance(child, Html):
        return child
    if isinstance(child, str):
        return escape(child)
    return Html("".join(markup(each) for each in child))


def tag(element: str, /, *children: Child, **attributes: Attribute) -> Html:
    """One element. `class_` is `class`, `aria_label` is `aria-label`; None and False leave an attribute out."""
    opening = element + "".join(_attribute(name, value) for name, value in attributes.items())
    if element in VOID:
        return Html(f"<{opening}>")
    return Html(f"<{opening}>{markup(children)}</{element}>")


def _attribute(name: str, value: Attribute) -> str:
    name = name.rstrip("_").replace("_", "-")
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'


def style(css: str) -> Html:
    """A style sheet of ours, as it is: text of others never goes here."""
    return Html(f"<style>\n{css}</style>")


def document(language: str, head: Child, body: Child) -> str:
    """A whole page."""
    return f"<!DOCTYPE html>\n{tag('html', tag('head', head), tag('body', body), lang=language)}\n"
