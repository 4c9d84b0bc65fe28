"""Texts as people read them: the words that true ids spell."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from stip_keyservice.audit.material import Words
from stip_keyservice.audit.view import Ids
from stip_protocol.errors import CheckpointInvalid

TOKENIZER = "tokenizer.json"
_WORD = re.compile(r"\w+")


def spelled(model: Path) -> Words:
    """By the tokenizer in a checkpoint folder: lower case, without punctuation or special tokens, as ROUGE counts
    words (Lin 2004). Where there is no tokenizer, each id is a word.

    Raises `CheckpointInvalid` for a tokenizer that cannot be read.
    """
    path = model / TOKENIZER
    if not path.exists():
        return numbered
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001  # the tokenizers library raises bare exceptions
        raise CheckpointInvalid(f"{TOKENIZER}: cannot be read ({type(error).__name__})") from None

    def words(ids: Ids) -> Sequence[str]:
        return _WORD.findall(tokenizer.decode(ids.tolist()).lower())

    return words


def numbered(ids: Ids) -> Sequence[str]:
    """Each id as a word of its own."""
    return [str(each) for each in ids]
