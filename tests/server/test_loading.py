"""From an instance directory to an engine: what is not exactly what was signed does not load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import load_file, save_file

from stip_protocol.errors import (
    CheckpointInvalid,
    ConfigurationError,
    ManifestMismatch,
    PresetRefused,
    SignatureInvalid,
)
from stip_protocol.manifest import Manifest, file_digest
from stip_server.config import TransformersSettings
from stip_server.engine import Form
from stip_server.engines.transformers import TransformersEngine, card_for, load, split
from tests.server.models import MODELS, tiny

KEY = Ed25519PrivateKey.generate()
PRESETS = {"hidden": "hardened", "top": "paper", "ids": "throughput"}


def sign(instance: Path, **changes: Any) -> None:
    fields = {
        "instance": "ab" * 16,
        "epoch": 3,
        "preset": "hardened",
        "dtype": "float32",
        "width": 48,
        "vocabulary": 211,
        "max_positions": 80,
        "output": "hidden",
        "server": {path.name: file_digest(path) for path in (instance / "server").iterdir()},
        "enclave": {},
        "certificate": {},
        **changes,
    }
    Manifest(**fields).write(instance / "manifest.json", KEY)


@pytest.fixture
def make_instance(tmp_path: Path, make_plain: Any) -> Callable[..., Path]:
    def make(family: str, output: str, dtype: torch.dtype = torch.float32) -> Path:
        model = make_plain(family, dtype).model
        (model.base_model if output == "hidden" else model).save_pretrained(tmp_path / "server")
        (tmp_path / "server" / "generation_config.json").unlink(missing_ok=True)
        sign(tmp_path, output=output, preset=PRESETS[output], dtype=str(dtype).removeprefix("torch."))
        return tmp_path

    return make


@pytest.mark.parametrize("output", PRESETS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
async def test_a_signed_checkpoint_loads_in_its_class_and_dtype(
    make_instance: Any, family: str, output: str, dtype: torch.dtype
) -> None:
    loaded = load(make_instance(family, output, dtype), KEY.public_key(), "cpu")
    settings = TransformersSettings(slots=2)
    card = card_for(loaded.model, loaded.head, settings, manifest=loaded.manifest, digest=loaded.digest)
    assert card.dtype == str(dtype).removeprefix("torch.")
    assert (card.instance, card.epoch, card.width, card.max_positions) == ("ab" * 16, 3, 48, 80)
    assert card.forms == (Form(output),)
    assert (card.vocabulary, card.max_outputs) == (0 if output == "hidden" else 211, 8)
    assert len(card.manifest_digest) == 32
    await TransformersEngine(loaded.model, loaded.head, card, settings).stop()


def flip(instance: Path) -> None:
    path = instance / "server" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def truncate(instance: Path) -> None:
    path = instance / "server" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def retensor(instance: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = instance / "server" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def reconfigure(instance: Path, **changes: Any) -> None:
    path = instance / "server" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "tamper",
    [
        pytest.param(flip, id="a flipped bit"),
        pytest.param(truncate, id="a truncated file"),
        pytest.param(lambda i: (i / "server" / "model.safetensors").unlink(), id="a missing file"),
        pytest.param(lambda i: (i / "server" / "tokenizer.json").write_text("{}"), id="an unlisted file"),
        pytest.param(lambda i: reconfigure(i, rope_theta=1.0), id="another configuration"),
    ],
)
def test_a_checkpoint_that_differs_from_its_manifest_is_refused(make_instance: Any, tamper: Any) -> None:
    instance = make_instance("llama", "hidden")
    tamper(instance)
    with pytest.raises(ManifestMismatch):
        load(instance, KEY.public_key(), "cpu")


def test_a_manifest_by_another_developer_is_refused(make_instance: Any) -> None:
    instance = make_instance("llama", "hidden")
    with pytest.raises(SignatureInvalid):
        load(instance, Ed25519PrivateKey.generate().public_key(), "cpu")


NORM = "norm.weight"


@pytest.mark.parametrize(
    ("tamper", "field"),
    [
        pytest.param(lambda i: retensor(i, lambda t: t.pop(NORM)), "missing_keys", id="a missing tensor"),
        pytest.param(
            lambda i: retensor(i, lambda t: t.update(extra=torch.zeros(1))), "unexpected_keys", id="an unknown tensor"
        ),
        pytest.param(
            lambda i: retensor(i, lambda t: t.update({NORM: torch.zeros(47)})), "mismatched_keys|server", id="a shape"
        ),
        pytest.param(
            lambda i: retensor(i, lambda t: t.update({NORM: t[NORM].half()})), "dtype of norm.weight", id="a dtype"
        ),
        pytest.param(truncate, "model.safetensors", id="a truncated file"),
        pytest.param(lambda i: reconfigure(i, architectures=["LlamaForCausalLM"]), "architectures", id="another class"),
        pytest.param(lambda i: reconfigure(i, model_type="no_such_model"), "server", id="an unknown architecture"),
        pytest.param(lambda i: reconfigure(i, hidden_size="wide"), "server", id="a configuration of the wrong type"),
    ],
)
def test_a_signed_checkpoint_that_is_not_whole_is_refused_by_field(make_instance: Any, tamper: Any, field: str) -> None:
    instance = make_instance("llama", "hidden")
    tamper(instance)
    sign(instance)
    with pytest.raises(CheckpointInvalid, match=f"^({field})"):
        load(instance, KEY.public_key(), "cpu")


@pytest.mark.parametrize(
    ("changes", "error", "field"),
    [
        ({"width": 49}, CheckpointInvalid, "hidden_size"),
        ({"dtype": "bfloat16"}, CheckpointInvalid, "dtype"),
        ({"output": "top", "vocabulary": 212}, CheckpointInvalid, "vocabulary|missing_keys|architectures"),
        ({"preset": "throughput"}, PresetRefused, "preset"),
    ],
)
def test_a_manifest_that_says_something_else_than_the_checkpoint_is_refused(
    make_instance: Any, changes: dict[str, Any], error: type[Exception], field: str
) -> None:
    instance = make_instance("llama", "hidden")
    sign(instance, **changes)
    with pytest.raises(error, match=f"^({field})"):
        load(instance, KEY.public_key(), "cpu")


def test_an_instance_without_its_server_part_is_refused(make_instance: Any) -> None:
    instance = make_instance("gpt2", "hidden")
    (instance / "server").rename(instance / "elsewhere")
    with pytest.raises(CheckpointInvalid, match="server"):
        load(instance, KEY.public_key(), "cpu")


@pytest.mark.parametrize("output", PRESETS)
@pytest.mark.parametrize("name", MODELS)
async def test_every_family_loads_in_its_class_and_computes_what_was_saved(
    tmp_path: Path, name: str, output: str
) -> None:
    model = tiny(name)
    base = model.base_model
    (base if output == "hidden" else model).save_pretrained(tmp_path / "server")
    (tmp_path / "server" / "generation_config.json").unlink(missing_ok=True)
    width = model.get_input_embeddings().weight.shape[1]
    cap = getattr(model.config, "final_logit_softcapping", None)
    sign(tmp_path, output=output, preset=PRESETS[output], width=width, logit_cap=cap, max_positions=96)
    loaded = load(tmp_path, KEY.public_key(), "cpu")
    settings = TransformersSettings(slots=2)
    card = card_for(loaded.model, loaded.head, settings, manifest=loaded.manifest, digest=loaded.digest)
    assert (card.width, card.max_positions) == (width, 72 if "longrope" in name else 96)
    rows = torch.randn(1, 20, width)
    with torch.inference_mode():
        expected = base(inputs_embeds=rows).last_hidden_state
        loaded.model.set_attn_implementation(model.config._attn_implementation)
        assert torch.equal(loaded.model(inputs_embeds=rows).last_hidden_state, expected)
        if output != "hidden":
            assert torch.equal(loaded.head(expected), model.get_output_embeddings()(expected))  # type: ignore[misc]
        if output == "ids":
            ids = torch.arange(20)
            assert torch.equal(loaded.model.get_input_embeddings()(ids), model.get_input_embeddings()(ids))
    await TransformersEngine(loaded.model, loaded.head, card, settings).stop()


@pytest.mark.parametrize("cap", [None, 30.0])
def test_a_cap_that_the_manifest_does_not_say_is_refused(tmp_path: Path, cap: float | None) -> None:
    tiny("gemma2").base_model.save_pretrained(tmp_path / "server")
    sign(tmp_path, logit_cap=cap)
    with pytest.raises(CheckpointInvalid, match=r"final_logit_softcapping: got 5\.0"):
        load(tmp_path, KEY.public_key(), "cpu")


def test_a_preset_that_decodes_alone_with_an_output_of_another_is_refused(make_instance: Any) -> None:
    instance = make_instance("llama", "hidden")
    sign(instance, preset="throughput")
    with pytest.raises(PresetRefused, match="preset: got throughput, allowed: one whose output is hidden"):
        load(instance, KEY.public_key(), "cpu")


async def test_memory_bounds_the_slots_before_they_are_taken_and_says_the_numbers(make_plain: Any) -> None:
    plain = make_plain("llama")
    base, head = split(plain.model)
    # 2 layers of keys and values, 3 heads of width 8, 96 positions and one for rows of nobody, 4 bytes each.
    slot = 2 * 2 * 3 * 8 * 97 * 4
    for memory, slots in ((3.5 * slot, 3), (1000 * slot, 16), (slot, 1)):
        assert card_for(base, head, TransformersSettings(memory_gb=memory / 2**30)).max_sessions == slots
    settings = TransformersSettings(memory_gb=3.5 * slot / 2**30)
    engine = TransformersEngine(base, head, card_for(base, head, settings), settings)
    cache = engine._runner._cache
    assert sum(store.nbytes for layer in cache._slot_layers for store in layer._stores) == 3 * slot
    await engine.stop()
    with pytest.raises(ConfigurationError, match=r"engine.memory_gb: .* allowed: at least .* \(one session of 96 pos"):
        card_for(base, head, TransformersSettings(memory_gb=0.9 * slot / 2**30))
