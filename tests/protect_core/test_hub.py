"""Configurations as published, not as transformers writes them today, keep their meaning and their logits."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from stip_keyservice.protect.configuration import INERT
from tests.protect_core.families import presets
from tests.protect_core.hub import NAMES, published
from tests.protect_core.models import Models, Plain, parse

_SERVERS_OWN = {"tie_word_embeddings", "vocab_size"}
_LEFT_BEHIND = {
    "_name_or_path",
    "_sliding_window_pattern",  # written by transformers 4.5x beside layer_types, which it stands for
    "activation_dropout",
    "attention_bias",  # of Phi-3, whose class has none
    "attention_probs_dropout_prob",
    "auto_map",
    "cache_implementation",
    "full_attn_mod",
    "hidden_act",  # of Gemma 2, beside hidden_activation
    "hidden_dropout_prob",
    "interpolate_factor",
    "learned_embeddings",
    "lm_head_bias",
    "max_sequence_length",
    "mlp_bias",  # of Phi-3
    "n_ctx",
    "prefix",
    "sliding_window_size",
    "task_specific_params",
    "use_mrope",
}
"""In files, and kept by the class as attributes, but read by no model of theirs."""


@cache
def plain(name: str) -> Plain:
    """A model of the class that the published form builds, with that form as its configuration."""
    config = published(name)
    return replace(Models().make(config), config=config)


CASES = [(name, preset) for name in NAMES for preset in presets(parse(published(name)).to_dict())]


@pytest.mark.parametrize(("name", "preset"), CASES)
def test_a_published_form_is_protected_without_loss(name: str, preset: str) -> None:
    model = plain(name)
    ids = model.ids(length=14, rows=2)
    assert (model.protect(preset).logits(ids) - model.logits(ids)).abs().max().item() < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_the_class_reads_the_servers_configuration_as_it_reads_the_published_one(name: str) -> None:
    source, server = meaning(published(name)), meaning(plain(name).protect("hardened").plan.config)
    declared = CONFIG_MAPPING[published(name)["model_type"]].__dataclass_fields__.keys()
    assert source == server | {left: source[left] for left in source.keys() & _LEFT_BEHIND - declared}


def meaning(config: dict[str, Any]) -> dict[str, Any]:
    read = parse(config).to_dict()
    return {name: value for name, value in read.items() if name not in INERT | _SERVERS_OWN}
