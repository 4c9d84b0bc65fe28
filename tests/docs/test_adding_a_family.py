"""The family that docs/adding-a-family.md adds is lossless as it stands there, and wrong tables are caught."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from stip_keyservice.protect.architecture import After, Architecture
from stip_keyservice.protect.configuration import require_same_meaning
from stip_keyservice.protect.families import FAMILIES
from stip_keyservice.protect.matching import TensorHeader
from stip_keyservice.protect.plan import Plan, plan
from stip_keyservice.protect.state_dict import protect_state
from stip_protocol.errors import CheckpointInvalid
from stip_protocol.keys import Permutation

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-family.md"
CONFIG = AutoConfig.for_model(
    "starcoder2",
    vocab_size=37,
    hidden_size=36,
    intermediate_size=29,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=32,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=1,
)
ROOT = bytes(range(32))
Expand = Callable[[Mapping[str, Any]], Architecture]


@pytest.fixture
def shown() -> Expand:
    """The page's code, run."""
    block = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert block is not None
    namespace: dict[str, Any] = {"__name__": "starcoder2"}
    exec(compile(block.group(1), str(PAGE), "exec", dont_inherit=True), namespace)
    expand: Expand = namespace["expand"]
    return expand


@pytest.fixture
def model() -> Iterator[Any]:
    """A random StarCoder2 in float64, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    causal: Any = AutoModelForCausalLM
    found = causal.from_config(CONFIG).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            gain = parameter.ndim == 1 and not name.endswith("bias")
            parameter.copy_(1 + 0.4 * noise if gain else 0.4 * noise)
    yield found
    torch.set_num_threads(threads)


def error(model: Any, preset: str) -> float:
    """Largest difference of logits between plain and protected, relative to the largest logit."""
    config = model.config
    plan, server, enclave = protect_state(config.to_dict(), model.state_dict(), preset, ROOT, accept_token_cipher=True)
    parsed = type(config).from_dict(plan.config)
    kind: Any = AutoModel if plan.output == "hidden" else AutoModelForCausalLM
    protected = kind.from_config(parsed).double().eval()
    protected.load_state_dict(server, strict=True)
    ids = torch.randint(37, (1, 16), generator=torch.Generator().manual_seed(1))
    key = plan.keys["vocabulary"]
    with torch.no_grad():
        expected = model(ids).logits
        if plan.output == "hidden":
            hidden = protected(inputs_embeds=enclave["embedding"][ids]).last_hidden_state
            found = hidden @ enclave["head"].T + enclave["head_bias"]
        else:
            assert isinstance(key, Permutation)
            order = torch.tensor(key.inverse.index)
            given = {"input_ids": order[ids]} if plan.output == "ids" else {"inputs_embeds": enclave["embedding"][ids]}
            found = protected(**given).logits[..., order]
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("preset", ["paper", "hardened", "throughput"])
def test_the_page_adds_a_lossless_family(
    shown: Expand, model: Any, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "starcoder2", shown)
    assert error(model, preset) < 1e-6  # rotary tables are float32


PUBLISHED = {
    "model_type": "starcoder2",
    "architectures": ["Starcoder2ForCausalLM"],
    "attention_dropout": 0.1,
    "embedding_dropout": 0.1,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 36,
    "intermediate_size": 29,
    "max_position_embeddings": 64,
    "mlp_type": "default",
    "norm_epsilon": 1e-6,
    "norm_type": "layer_norm",
    "num_attention_heads": 6,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "residual_dropout": 0.1,
    "rope_scaling": {"type": "linear", "factor": 4.0},
    "rope_theta": 1000.0,
    "sliding_window": 4,
    "torch_dtype": "bfloat16",
    "use_bias": True,
    "vocab_size": 37,
}


def planned_without(forgotten: tuple[str, ...], shown: Expand, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The plan of the published form under a family that does not know some of its fields."""

    def expand(config: Mapping[str, Any]) -> Architecture:
        return shown({name: value for name, value in config.items() if name not in forgotten})

    monkeypatch.setitem(FAMILIES, "starcoder2", expand)
    shapes = shown(PUBLISHED).tensors
    headers = {name: TensorHeader(name, "BF16", shape) for name, shape in shapes.items() if name != "lm_head.weight"}
    return plan(PUBLISHED, headers, "hardened", ROOT)


def test_a_published_form_keeps_its_meaning(shown: Expand, monkeypatch: pytest.MonkeyPatch) -> None:
    require_same_meaning(PUBLISHED, planned_without((), shown, monkeypatch))


@pytest.mark.parametrize(
    ("forgotten", "named"),
    [
        ("rope_theta", "rope_parameters"),
        ("rope_scaling", "rope_parameters"),
        ("sliding_window", "sliding_window"),
        ("norm_epsilon", "norm_epsilon"),
    ],
)
def test_a_forgotten_field_is_refused(
    shown: Expand, forgotten: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = planned_without((forgotten,), shown, monkeypatch)
    with pytest.raises(CheckpointInvalid, match=rf"config\.{named}: got "):
        require_same_meaning(PUBLISHED, planned)


def without_activation(architecture: Architecture) -> Architecture:
    linears = tuple(replace(linear, after=After.NOTHING) for linear in architecture.linears if linear.after)
    return replace(architecture, linears=linears)


def with_queries_as_keys(architecture: Architecture) -> Architecture:
    by_name = {linear.name: linear for linear in architecture.linears}
    query, key = by_name["layers.0.q"], by_name["layers.0.k"]
    wrong = replace(key, writes=replace(key.writes, role=query.writes.role))
    return replace(architecture, linears=tuple(wrong if linear is key else linear for linear in architecture.linears))


@pytest.mark.parametrize("mistake", [without_activation, with_queries_as_keys])
def test_a_wrong_table_shows_in_the_logits(
    shown: Expand,
    model: Any,
    mistake: Callable[[Architecture], Architecture],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(FAMILIES, "starcoder2", lambda config: mistake(shown(config)))
    assert error(model, "hardened") > 1e-2


def test_a_forgotten_tensor_shows_when_the_family_expands(shown: Expand) -> None:
    architecture = shown(CONFIG.to_dict())
    with pytest.raises(ValueError, match=r"tile|without"):
        replace(architecture, linears=architecture.linears[1:])


def test_a_norm_that_no_matrix_reads_through_shows_when_the_family_expands(shown: Expand) -> None:
    architecture = shown(CONFIG.to_dict())
    linears = tuple(replace(linear, norm=None) for linear in architecture.linears)
    with pytest.raises(ValueError, match="folds into"):
        replace(architecture, linears=linears)
