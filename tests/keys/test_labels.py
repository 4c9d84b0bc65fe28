"""One stream a label: no two labels, and no two roots, share a stretch of randomness."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from stip_keyservice.protect import keyring
from stip_keyservice.protect.families import expand
from stip_keyservice.protect.presets import PRESETS
from stip_protocol.keys import VOCABULARY_LABEL, KeyStream, derive
from stip_protocol.secrets_file import PART_LABEL

ROOT = bytes(range(32))
LABELS = [
    "key",
    PART_LABEL,
    VOCABULARY_LABEL,
    "space/residual",
    *(f"space/layers.{layer}.{name}" for layer in range(40) for name in ("query_key", "value_output", "feed_forward")),
    *(f"structure/layers.{layer}.attention" for layer in range(40)),
]
"""The labels of a model of 40 layers, written out."""
READ = 4096
"""Bytes read of each stream."""


def windows(content: bytes) -> np.ndarray:
    """Each 8 bytes of `content`, at any offset."""
    aligned = [
        np.frombuffer(content[offset : len(content) - (len(content) - offset) % 8], "<u8") for offset in range(8)
    ]
    return np.concatenate(aligned)


def share_a_stretch(contents: Iterable[bytes]) -> bool:
    """Whether 8 bytes occur twice. By chance: 164 streams have 670,000 windows, so 1 in 80 million."""
    seen = np.concatenate([windows(content) for content in contents])
    return bool(np.unique(seen).size < seen.size)


def test_no_stretch_of_one_labels_stream_is_in_another() -> None:
    assert not share_a_stretch([KeyStream(ROOT, label).bytes(READ) for label in LABELS])


def test_no_stretch_is_shared_under_the_seeds_that_spaces_draw_from() -> None:
    assert not share_a_stretch([KeyStream(derive(ROOT, label), "key").bytes(READ) for label in LABELS])


def test_roots_that_differ_in_one_bit_share_no_stretch() -> None:
    roots = [(1 << bit).to_bytes(32, "big") for bit in range(0, 256, 2)]
    assert not share_a_stretch([KeyStream(root, "space/residual").bytes(READ) for root in roots])


@pytest.mark.parametrize("offset", [0, 1, 100, 3000])
def test_a_stream_that_is_another_further_on_is_found(offset: int) -> None:
    """What one keystream with a counter for each label would do."""
    whole = KeyStream(ROOT, "one").bytes(READ + offset)
    assert share_a_stretch([whole[:READ], whole[offset:], KeyStream(ROOT, "two").bytes(READ)])


@given(st.text(min_size=1), st.text(min_size=1))
def test_streams_are_equal_where_labels_are(a: str, b: str) -> None:
    assert (KeyStream(ROOT, a).bytes(32) == KeyStream(ROOT, b).bytes(32)) == (a == b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("space/a", "space/a "),
        ("space/a", "space/a\0"),
        ("space/a", "Space/a"),
        ("space/é", "space/e\u0301"),
        ("space/layers.1.x", "space/layers.11.x"),
        ("space/" + 300 * "a", "space/" + 301 * "a"),
    ],
)
def test_labels_that_look_alike_have_their_own_streams(a: str, b: str) -> None:
    assert KeyStream(ROOT, a).bytes(32) != KeyStream(ROOT, b).bytes(32)
    assert derive(ROOT, a) != derive(ROOT, b)


def test_a_stream_is_not_the_seed_that_it_could_be_taken_for() -> None:
    """A grant hands out `derive(root, label)`: it must not show the stream of that label, or of any other."""
    handed_out = [derive(ROOT, label) for label in LABELS]
    assert not share_a_stretch([*handed_out, *(KeyStream(ROOT, label).bytes(READ) for label in LABELS)])


MODELS: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=2, n_head=2),
    "llama": LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
}


@pytest.mark.parametrize("preset", ["paper", "hardened"])
@pytest.mark.parametrize("model", MODELS)
def test_every_space_of_a_model_draws_from_a_stream_of_its_own(
    model: str, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads spaces of one attention share their order of heads by intent, and so the stream of their structure."""
    opened: list[bytes] = []

    class Noted(KeyStream):
        def __init__(self, root: bytes, label: str) -> None:
            super().__init__(root, label)
            opened.append(derive(root, label))

    monkeypatch.setattr(keyring, "KeyStream", Noted)
    spaces = expand(MODELS[model].to_dict()).spaces
    keyring.draw_keys(expand(MODELS[model].to_dict()), PRESETS[preset], ROOT)
    structures = [space.structure for space in spaces.values() if space.structure]
    assert len(opened) == len(spaces) + len(structures)
    assert len(set(opened)) == len(spaces) + len(set(structures))
