"""Texts: as many as asked for, the same for the same seed, and never the same in two parts."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from stip_keyservice.audit import corpus
from stip_keyservice.audit.corpus import SCALES, Part
from stip_keyservice.audit.network import Network
from stip_protocol.errors import ConfigurationError

from .conftest import MODEL

SCALE = replace(SCALES["quick"], length=12, prompt=5, victims=3, accomplice=40, public=40, held_out=24)
PARTS = get_args(Part)


@pytest.fixture(scope="module")
def plain() -> Network:
    return Network(MODEL)


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("\n".join(f"And number {number} said unto the people, Go forth." for number in range(60)))
    return path


def source(kind: str, plain: Network, book: Path, seed: int = 1) -> corpus.Source:
    return corpus.sampled(plain, SCALE, seed) if kind == "sampled" else corpus.cut(book, plain, SCALE, seed)


@pytest.mark.parametrize("kind", ["sampled", "cut"])
def test_every_part_has_its_own_texts_of_the_asked_length(kind: str, plain: Network, book: Path) -> None:
    texts = source(kind, plain, book)
    found: dict[Any, list[Any]] = {part: texts(part) for part in PARTS}
    assert {part: len(each) for part, each in found.items()} == {
        "victims": 3, "accomplice": 4, "public": 4, "held_out": 2,
    }  # fmt: skip
    everything = [text for each in found.values() for text in each]
    assert {len(text) for text in everything} == {13}
    assert {int(text[0]) for text in everything} == {0}
    assert {text.dtype for text in everything} == {np.dtype(np.int64)}
    assert len({text.tobytes() for text in everything}) == len(everything)


@pytest.mark.parametrize("kind", ["sampled", "cut"])
def test_the_same_seed_gives_the_same_texts_and_another_seed_others(kind: str, plain: Network, book: Path) -> None:
    first, again, other = (source(kind, plain, book, seed)("victims") for seed in (1, 1, 2))
    assert all((one == two).all() for one, two in zip(first, again, strict=True))
    assert any((one != two).any() for one, two in zip(first, other, strict=True))


def test_a_part_does_not_depend_on_how_large_the_others_are(plain: Network) -> None:
    larger = replace(SCALE, accomplice=400, public=80)
    for one, other in zip(*(corpus.sampled(plain, scale, 1)("victims") for scale in (SCALE, larger)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_cut_text_is_the_files(plain: Network, book: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    for text in source("cut", plain, book)("public"):
        assert tokenizer.decode(text[1:].tolist()).strip() in book.read_text()


def test_a_text_that_is_too_short_not_there_or_no_text_is_refused(plain: Network, book: Path) -> None:
    for content, says in ((b"Go forth.", r"allowed: at least \d+ at this scale"), (b"\xff\xfe\xff", "not UTF-8")):
        book.write_bytes(content)
        with pytest.raises(ConfigurationError, match=says):
            source("cut", plain, book)
    book.unlink()
    with pytest.raises(ConfigurationError, match="No such file"):
        source("cut", plain, book)


def test_a_text_that_is_too_large_is_refused(plain: Network, book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "TEXT_LIMIT", 100)
    with pytest.raises(ConfigurationError, match="a larger file"):
        source("cut", plain, book)


def test_a_text_needs_the_models_tokenizer(book: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    (model / "tokenizer.json").unlink()
    with pytest.raises(ConfigurationError, match=r"no tokenizer\.json"):
        source("cut", Network(model), book)


def test_sessions_are_no_longer_than_a_models_positions() -> None:
    assert SCALES["default"].within(4096) == SCALES["default"]
    short = SCALES["default"].within(20)
    assert (short.length, short.prompt) == (20, 10)
    with pytest.raises(ConfigurationError, match="positions"):
        SCALES["default"].within(3)
