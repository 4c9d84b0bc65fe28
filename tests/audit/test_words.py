"""Words of texts are those that people read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from stip_keyservice.audit.words import spelled
from stip_protocol.errors import CheckpointInvalid

MODEL = Path(__file__).parents[2] / "stack" / "demo_model"


def test_words_are_the_texts_in_lower_case_without_punctuation() -> None:
    ids = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode("And the LORD said, Go unto Pharaoh.").ids
    assert list(spelled(MODEL)(np.array(ids))) == ["and", "the", "lord", "said", "go", "unto", "pharaoh"]
    assert list(spelled(MODEL)(np.array([], np.int64))) == []


def test_without_a_tokenizer_each_id_is_a_word(tmp_path: Path) -> None:
    assert list(spelled(tmp_path)(np.array([7, 12, 7]))) == ["7", "12", "7"]


def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointInvalid, match=r"tokenizer\.json: cannot be read"):
        spelled(tmp_path)
