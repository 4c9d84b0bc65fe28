"""A configuration that would mean something else on the server is refused, and one with more to say is not."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, cache_utils, masking_utils

from stip_keyservice.protect import configuration
from stip_keyservice.protect.configuration import INERT, READ_UNDECLARED, require_same_meaning
from stip_keyservice.protect.plan import Plan
from stip_protocol.errors import CheckpointInvalid
from tests.protect_core.families import presets
from tests.protect_core.hub import NAMES, published
from tests.protect_core.models import Models, parse

JUNK: dict[str, Any] = {
    "_name_or_path": "acme/model",
    "name_or_path": "acme/model",
    "_commit_hash": "0" * 40,
    "transformers_version": "4.28.1",
    "torch_dtype": "float16",
    "architectures": ["SomethingForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_x.XConfig"},
    "attn_implementation": "flash_attention_2",
    "_attn_implementation": "flash_attention_2",
    "_flash_attn_2_enabled": True,
    "quantization_config": None,
    "rope_ratio": 1.0,
    "attention_dropout": 0.25,
    "initializer_range": 0.5,
    "use_cache": False,
    "output_hidden_states": True,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2},
    "pad_token_id": 3,
    "eos_token_id": [1, 2],
    "unsloth_version": "2024.9",
    "max_sequence_length": 77,
    "do_sample": True,
    "temperature": 0.5,
    "bos_token_id": None,
}


@cache
def planned(name: str, preset: str = "hardened") -> Plan:
    return replace(Models().make(published(name)), config=published(name)).protect(preset).plan


@pytest.mark.parametrize("name", NAMES)
def test_published_forms_are_accepted_whatever_else_they_say(name: str) -> None:
    for preset in presets(parse(published(name)).to_dict()):
        require_same_meaning(published(name), planned(name, preset))
        require_same_meaning(published(name) | JUNK, planned(name, preset))


@pytest.mark.parametrize(
    ("name", "dropped", "field"),
    [
        ("Code Llama", "rope_theta", "rope_parameters"),
        ("Llama 3.1", "rope_scaling", "rope_parameters"),
        ("Llama 3.2", "head_dim", "head_dim"),
        ("Mistral 7B v0.1", "sliding_window", "sliding_window"),
        ("Mistral Nemo", "head_dim", "head_dim"),
        ("Qwen2, head_dim", "head_dim", "head_dim"),
        ("Qwen2, windows on", "max_window_layers", "layer_types"),
        ("Gemma 2, no caps", "attn_logit_softcapping", "attn_logit_softcapping"),
        ("Gemma 3 1B", "rope_local_base_freq", "rope_parameters"),
        ("Gemma 3 1B", "sliding_window_pattern", "layer_types"),
        ("GPT-NeoX, another base", "rotary_emb_base", "rope_parameters"),
        ("RedPajama INCITE", "rotary_pct", "rope_parameters"),
        ("Qwen1.5 MoE", "num_experts", "num_experts"),
    ],
)
def test_a_field_that_is_left_behind_is_refused_by_the_name_the_class_has_for_it(
    name: str, dropped: str, field: str
) -> None:
    plan = planned(name)
    without = {key: value for key, value in plan.config.items() if key != dropped}
    with pytest.raises(CheckpointInvalid, match="on the server, allowed: ") as refused:
        require_same_meaning(published(name), replace(plan, config=without))
    assert refused.value.field == f"config.{field}"


@pytest.mark.parametrize(
    ("name", "more", "field"),
    [
        ("Llama 2", {"is_causal": False}, "is_causal"),
        ("Llama 2", {"sliding_window": 4}, "sliding_window"),
        ("GPT-2", {"hidden_size": 32}, "n_embd"),  # which the class takes for another name of it
        ("GPT-NeoX, another base", {"head_dim": 4}, "head_dim"),
    ],
)
def test_a_keyword_that_no_table_knows_is_refused_where_a_model_reads_it(
    name: str, more: dict[str, Any], field: str
) -> None:
    with pytest.raises(CheckpointInvalid) as refused:
        require_same_meaning(published(name) | more, planned(name))
    assert refused.value.field == f"config.{field}"


def test_a_head_dim_that_is_the_quotient_is_accepted_from_a_class_that_does_not_declare_it() -> None:
    require_same_meaning(published("GPT-NeoX, another base") | {"head_dim": 8}, planned("GPT-NeoX, another base"))


def test_a_field_of_a_newer_class_is_refused_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    @strict
    class Newer(LlamaConfig):  # type: ignore[no-untyped-call]
        logits_scaling: float = 1.0

    monkeypatch.setattr(configuration, "CONFIG_MAPPING", {"llama": Newer})
    source = published("Llama 2")
    require_same_meaning(source | {"logits_scaling": 1.0}, planned("Llama 2"))
    with pytest.raises(CheckpointInvalid, match=r"logits_scaling: got 1.0 on the server, allowed: 8.0"):
        require_same_meaning(source | {"logits_scaling": 8.0}, planned("Llama 2"))


@pytest.mark.parametrize(("field", "value"), [("vocab_size", 30), ("tie_word_embeddings", True)])
def test_what_the_server_states_anew_is_compared_with_the_plan(field: str, value: object) -> None:
    with pytest.raises(CheckpointInvalid, match=f"config.{field}: got "):
        require_same_meaning(published("Llama 2") | {field: value}, planned("Llama 2"))


@pytest.mark.parametrize(
    ("name", "wrong", "named"),
    [
        ("Gemma 3 1B", {"query_pre_attn_scalar": 8.0}, "config.query_pre_attn_scalar: got .*expected int"),
        ("Llama 2", {"initializer_range": "small"}, "config.initializer_range: got .*expected float"),
        ("Llama 2", {"hidden_size": 17}, "config: got .*not a multiple of the number of attention heads"),
        ("Llama 2", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "config: got .*low_freq_factor"),
        ("Llama 2", {"torch_dtype": "float17"}, "config: got .*float17"),
        ("Llama 2", {"id2label": {"one": "x"}}, "config: got .*one"),
    ],
)
def test_what_the_class_does_not_take_is_refused_with_its_reason(name: str, wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointInvalid, match=named):
        require_same_meaning(published(name) | wrong, planned(name))


def test_a_servers_configuration_that_the_class_does_not_take_is_refused_too() -> None:
    """Without its share of turned dimensions, a head has more pairs than Phi-4 mini has factors for."""
    plan = planned("Phi-4 mini")
    without = {key: value for key, value in plan.config.items() if key != "partial_rotary_factor"}
    with pytest.raises(CheckpointInvalid, match=r"server's config: got .*short_factor"):
        require_same_meaning(published("Phi-4 mini"), replace(plan, config=without))


def test_a_long_value_is_cut() -> None:
    source = published("Qwen2, windows on") | {"num_hidden_layers": 200}
    with pytest.raises(CheckpointInvalid) as refused:
        require_same_meaning(source, planned("Qwen2, windows on"))
    assert len(refused.value.message) < 500


def test_reading_leaves_configurations_as_they_are() -> None:
    source, plan = published("Llama 3.1"), planned("Llama 3.1")
    before = str(plan.config)
    require_same_meaning(source, plan)
    assert source == published("Llama 3.1")
    assert str(plan.config) == before


def test_what_masks_and_caches_read_of_any_configuration_is_compared() -> None:
    source = inspect.getsource(masking_utils) + inspect.getsource(cache_utils)
    read = set(re.findall(r"getattr\(\w*config, \"(\w+)\"", source))
    kinds_only = {"layer_types", "number_of_conv_states"}  # say which of the others holds where, or of convolutions
    assert read - kinds_only == READ_UNDECLARED
    assert not READ_UNDECLARED & INERT
