"""Who knows what: the rows of the matrix.

The server part, the configuration, and what the server sees of every session belong to every attacker; so do the
public tokenizer and text of the same kind as the users'. A `Grant` is what one has beyond that.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Grant(StrEnum):
    """Something that an attacker has."""

    TABLE = "table"
    """The embedding table, value for value."""
    DRIFTED = "drifted"
    """A relative of the embedding table: every entry moved by a tenth of the table's standard deviation."""
    BASE = "base"
    """The public checkpoint that the model derives from."""
    ACCOMPLICE = "accomplice"
    """A user of the same instance, who says which ids their sessions were and decodes what the server sends them."""
    SIBLING = "sibling"
    """The server part of another instance of the same model, and a user there."""
    ENCLAVE = "enclave"
    """What lies in the memory of a broken enclave."""
    HOST = "host"
    """The enclave's host: which pages its lookups touch."""


@dataclass(frozen=True)
class Knowledge:
    """One row of the matrix."""

    name: str
    grants: frozenset[Grant]
    words: str
    """Who that is, for the report."""


def _row(name: str, words: str, *grants: Grant) -> Knowledge:
    return Knowledge(name, frozenset(grants), words)


KNOWLEDGE = {
    row.name: row
    for row in (
        _row("server", "The operator alone: the embedding table is private, and so is everything like it."),
        _row("drifted", "The operator has a relative of the embedding table.", Grant.DRIFTED),
        _row("table", "The operator knows the embedding table.", Grant.TABLE),
        _row("base", "The model derives from a public one.", Grant.BASE),
        _row("accomplice", "One user of the same instance helps the operator.", Grant.ACCOMPLICE),
        _row("sibling", "One user of another instance of the same model helps the operator.", Grant.SIBLING),
        _row("enclave", "Somebody broke one enclave.", Grant.ENCLAVE),
        _row("host", "The operator runs the enclave's host and watches its page faults.", Grant.HOST),
    )
}
