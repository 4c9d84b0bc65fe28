"""Looks for planted secrets in what a running system leaves behind: logs, metrics, error texts, files.

A `Sentinel` knows the forms that a value takes when it slips out: as it is, as hex, base64 (at any alignment), an
escaped literal, or a list of decimal numbers; and any part of it that is long enough to be no accident, because
messages are cut. `sweep` reports where a sentinel was seen, never what.
"""

from __future__ import annotations

import base64
import fnmatch
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

WINDOW = 12
"""Bytes of a secret that count as the secret: 96 bits do not come about by chance."""
IDS = 4
"""Consecutive ids that count as a prompt."""
BYTES = 6
"""Consecutive bytes, printed as numbers, that count as a secret."""
FRACTIONS = 3
"""Consecutive elements that count as a row."""
DIGITS = 3
"""Significant digits by which a printed element is recognised."""
PRINTED = (0.01, 100.0)
"""Magnitudes that are printed without an exponent, whatever prints them."""
GAP = 8
"""Characters that may stand between two numbers of a list."""
GRAM = 8
"""Bytes by which literals are looked up before they are compared. Every literal is longer."""

_WHOLE = re.compile(rb"\d+")
_FRACTION = re.compile(rb"\d+\.\d+")
Form = bytes | tuple[bytes, ...]
"""A literal, or a run of numbers."""
Material = tuple[str, bytes]
"""Where it comes from, and its content."""


@dataclass(frozen=True)
class Finding:
    """A secret at a place where it must not be."""

    sentinel: str
    where: str


@dataclass(frozen=True)
class Sentinel:
    """A planted value and how to recognise it. `name` is what findings call it."""

    name: str
    literals: frozenset[bytes] = field(repr=False)
    lists: frozenset[tuple[bytes, ...]] = field(default=frozenset(), repr=False)
    """Numbers as they are printed, in a row; of fractions, the first digits."""

    @classmethod
    def of_bytes(cls, name: str, secret: bytes) -> Self:
        """A key: its beginning, middle and end."""
        middle = (len(secret) - WINDOW) // 2
        windows = [secret[at : at + WINDOW] for at in (0, middle, len(secret) - WINDOW)]
        return cls(name, _all_forms(windows), frozenset(_whole(window[:BYTES]) for window in windows))

    @classmethod
    def of_text(cls, name: str, text: str) -> Self:
        """A prompt or an answer: every stretch of `WINDOW` bytes as it is, and some in other forms."""
        data = text.encode()
        windows = [data[at : at + WINDOW] for at in range(len(data) - WINDOW + 1)]
        return cls(name, _all_forms(windows[::WINDOW]) | set(windows))

    @classmethod
    def of_ids(cls, name: str, ids: Sequence[int]) -> Self:
        """Token ids: every few consecutive ones as numbers, and as the integers that travel and are computed with."""
        windows = [ids[at : at + IDS] for at in range(len(ids) - IDS + 1)]
        packed = [np.array(window, dtype).tobytes() for window in windows for dtype in ("<u4", "<i8")]
        return cls(name, _all_forms(packed), frozenset(map(_whole, windows)))

    @classmethod
    def of_row(cls, name: str, row: NDArray[np.float32]) -> Self:
        """An embedding or a hidden state: its bytes, and its elements as they are printed."""
        data = row.tobytes()
        packed = [data[at : at + WINDOW] for at in range(0, len(data) - WINDOW + 1, WINDOW)]
        least, most = PRINTED
        windows = [abs(row[at : at + FRACTIONS]) for at in range(len(row) - FRACTIONS + 1)]
        printed = [
            tuple(_first_digits(f"{number:.12f}".encode()) for number in window)
            for window in windows
            if np.all((window > least) & (window < most))
        ]
        return cls(name, _all_forms(packed), frozenset(printed))


def sweep(sentinels: Iterable[Sentinel], materials: Iterable[Material]) -> list[Finding]:
    """Every sentinel in every material that shows it."""
    owners: dict[Form, list[str]] = {}
    for sentinel in sentinels:
        forms: set[Form] = {*sentinel.literals, *sentinel.lists}
        for form in forms:
            owners.setdefault(form, []).append(sentinel.name)
    literals = [form for form in owners if isinstance(form, bytes)]
    grams = np.frombuffer(b"".join(literal[:GRAM] for literal in literals), "<u8")
    lengths = {len(form) for form in owners if isinstance(form, tuple)}
    found: dict[Finding, None] = {}
    for where, content in materials:
        for text in {content, content.replace(b"\\\\", b"\\")}:  # what was escaped twice, too
            shown: set[Form] = set()
            shown |= {literals[at] for at in np.flatnonzero(np.isin(grams, _grams(text))) if literals[at] in text}
            shown |= owners.keys() & (set(_lists(text, _WHOLE, lengths)) | set(_lists(text, _FRACTION, lengths)))
            found.update({Finding(name, where): None for form in shown for name in owners[form]})
    return list(found)


def files(root: Path, *, excluded: Sequence[str]) -> Iterator[Material]:
    """All files below `root`, but those whose relative path matches a pattern of `excluded`."""
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_file() and not any(fnmatch.fnmatch(name, pattern) for pattern in excluded):
            yield name, path.read_bytes()


def _all_forms(windows: Iterable[bytes]) -> frozenset[bytes]:
    return frozenset(form for window in windows for form in _forms(window))


def _forms(window: bytes) -> Iterator[bytes]:
    """The literals that a stretch of bytes may appear as."""
    characters = window.decode("latin-1")
    yield from (window, window.hex().encode(), window.hex().upper().encode(), characters.encode())
    yield from (repr(window)[2:-1].encode(), json.dumps(characters)[1:-1].encode())
    for before in range(3):
        # The characters that depend on this window alone, where it begins `before` bytes into a group of three.
        start, end = math.ceil(before * 8 / 6), (before + len(window)) * 8 // 6
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            yield encode(bytes(before) + window)[start:end]


def _grams(content: bytes) -> NDArray[np.uint64]:
    """Every `GRAM` consecutive bytes, once."""
    count = max(0, len(content) - GRAM + 1)
    return np.unique(np.ndarray((count,), "<u8", content, strides=(1,)))


def _lists(content: bytes, number: re.Pattern[bytes], lengths: Iterable[int]) -> Iterator[tuple[bytes, ...]]:
    """Runs of numbers with little between them, as tuples of the given lengths."""
    last, run = -GAP - 1, list[bytes]()
    for match in number.finditer(content):
        if match.start() - last > GAP:
            run = []
        last = match.end()
        run.append(_first_digits(match[0]) if number is _FRACTION else match[0])
        for length in lengths:
            if len(run) >= length:
                yield tuple(run[-length:])


def _whole(numbers: Sequence[int]) -> tuple[bytes, ...]:
    return tuple(b"%d" % number for number in numbers)


def _first_digits(printed: bytes) -> bytes:
    """A decimal fraction, cut behind its first `DIGITS` significant digits."""
    whole, fraction = printed.split(b".")
    leading = len(fraction) - len(fraction.lstrip(b"0")) if whole == b"0" else -len(whole)
    return whole + b"." + fraction[: max(1, DIGITS + leading)]
