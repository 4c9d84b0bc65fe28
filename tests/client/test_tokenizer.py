"""Text to ids and back: a stream of pieces is exactly the whole, whatever the tokenizer and the ids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from stip.tokenizer import Detokenizer, Tokenizer
from stip_protocol.errors import ConfigurationError
from stip_protocol.manifest import ClientManifest

DEMO = Path(__file__).parents[2] / "stack" / "demo_model" / "tokenizer.json"
INSTANCE = "00112233445566778899aabbccddeeff"


def byte_level() -> tokenizers.Tokenizer:
    """As GPT-2, Llama 3: tokens are bytes, a character may span several."""
    return tokenizers.Tokenizer.from_file(str(DEMO))


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2: words with a leading ▁, unknown characters as <0xNN>, the first space dropped."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "c", "é", "▁a", "▁b"]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({word: id_ for id_, word in enumerate(words)}, [("▁", "a"), ("▁", "b")], byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    """As T5: a unigram model whose decoder drops the leading space of the first token."""
    words = [
        ("<unk>", 0.0),
        *((word, -float(rank)) for rank, word in enumerate(["▁", "a", "b", "▁a", "▁ab", "é", "日"])),
    ]
    tokenizer = tokenizers.Tokenizer(models.Unigram(words, 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>"])
    return tokenizer


def word_piece() -> tokenizers.Tokenizer:
    """As BERT: spaces between words, none before ## pieces and punctuation."""
    words = ["[UNK]", "[CLS]", "a", "b", "##a", "##b", ".", ",", "é", "'", "s", "don"]
    tokenizer = tokenizers.Tokenizer(models.WordPiece({word: id_ for id_, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[CLS]"])
    return tokenizer


def wrapped(backend: tokenizers.Tokenizer) -> Tokenizer:
    manifest = ClientManifest(instance=INSTANCE, epoch=0, vocabulary=9999, max_positions=9, stop_ids=(), files={})
    return Tokenizer(backend, manifest)


KINDS = {kind.__name__: wrapped(kind()) for kind in (byte_level, byte_fallback, metaspace, word_piece)}


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = Detokenizer(tokenizer)
    return [*(stream.push(id_) for id_ in ids), stream.flush()]


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(max_size=40))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_pieces_of_any_text_are_the_whole(kind: str, text: str):
    tokenizer = KINDS[kind]
    ids = tokenizer.encode(text, special=True)
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_pieces_of_any_ids_are_the_whole_broken_characters_special_and_unknown_ids_included(kind: str, data: Any):
    tokenizer = KINDS[kind]
    size = tokenizer._backend.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size + 3), max_size=40))
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@given(text=st.text(st.characters(min_codepoint=0x80, exclude_categories=["Cs"]), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_piece_holds_half_a_character(text: str):
    if "\N{REPLACEMENT CHARACTER}" in text:
        return
    for kind in ("byte_level", "byte_fallback"):
        ids = KINDS[kind].encode(text, special=False)
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in streamed(KINDS[kind], ids))


def test_text_comes_with_the_token_that_completes_it():
    tokenizer = KINDS["byte_level"]
    ids = tokenizer.encode("In the beginning", special=False)
    pieces = streamed(tokenizer, ids)
    assert all(pieces[: len(ids)])
    assert pieces[-1] == ""


def test_an_incomplete_character_at_the_end_is_flushed_as_a_replacement():
    tokenizer = KINDS["byte_level"]
    ids = tokenizer.encode("日", special=False)
    assert len(ids) > 1
    assert streamed(tokenizer, ids[:-1]) == [""] * (len(ids) - 1) + ["\N{REPLACEMENT CHARACTER}"]


def test_spaces_survive_between_and_before_words():
    for kind in ("byte_level", "byte_fallback"):
        tokenizer = KINDS[kind]
        ids = tokenizer.encode(" a b  a", special=False)
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == " a b  a"


def test_a_client_part_without_a_tokenizer_takes_ids_alone(
    client_folder: Path, developer: Any, resign: Callable[..., None]
):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (client_folder / name).unlink()
    resign(client_folder)
    tokenizer = Tokenizer.open(client_folder, developer.public_key(), instance=INSTANCE)
    assert tokenizer.template is None
    assert streamed(tokenizer, [5, 6]) == ["", "", ""]
    with pytest.raises(ConfigurationError, match="token ids"):
        tokenizer.encode("text", special=True)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_file_that_cannot_be_read_is_a_configuration_error(
    client_folder: Path, developer: Any, resign: Callable[..., None], name: str
):
    (client_folder / name).write_bytes(b"\xff{")
    resign(client_folder)
    with pytest.raises(ConfigurationError, match="tokenizer files"):
        Tokenizer.open(client_folder, developer.public_key(), instance=INSTANCE)


def test_a_template_of_its_own_file_comes_before_the_one_in_the_settings(
    client_folder: Path, developer: Any, resign: Callable[..., None]
):
    (client_folder / "chat_template.jinja").write_text("{{ eos_token }}{{ messages[0].content }}")
    resign(client_folder)
    tokenizer = Tokenizer.open(client_folder, developer.public_key(), instance=INSTANCE)
    assert tokenizer.template is not None
    assert tokenizer.template.render([{"role": "user", "content": "x"}]) == "</s>x"
