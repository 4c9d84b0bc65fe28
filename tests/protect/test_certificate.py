"""The certificate passes for what is the same, and for nothing else."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from safetensors.torch import load_file, save_file

from stip_keyservice.protect import instance
from stip_keyservice.protect.equivalence.certificate import BOUNDS, Certificate
from stip_keyservice.protect.instance import protect
from stip_keyservice.protect.plan import plan
from stip_keyservice.protect.storage.checkpoint import Checkpoint
from stip_protocol.errors import CheckpointInvalid, IntegrityError, SealedPartInvalid

from .conftest import Case
from .laying import Laid, lay_out

SEALING = X25519PrivateKey.generate()
Protect = Callable[[Case, str], Laid]


@pytest.fixture
def protected(checkpoint_of: Callable[[Case], Path], tmp_path: Path) -> Protect:
    return lambda case, preset: lay_out(checkpoint_of(case), tmp_path / "out", preset)


def changed(laid: Laid, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change tensors of the server part."""
    weights = laid.files.directory / "server" / "model.safetensors"
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("case", "preset", "rounding"),
    [
        (Case("gpt2", tied=True), "hardened", 1e-5),
        (Case("gpt2", tied=True), "paper", 1e-5),
        (Case("llama", tied=False), "hardened", 1e-5),
        (Case("gpt2", tied=True, dtype=torch.float64), "hardened", 1e-13),
        (Case("llama", tied=False, dtype=torch.float64), "hardened", 1e-5),
        (Case("llama", tied=False, dtype=torch.float16), "hardened", 1e-2),
        (Case("llama", tied=False, dtype=torch.bfloat16), "hardened", 5e-2),
        (Case("llama", tied=False, dtype=torch.bfloat16), "paper", 1e-5),
    ],
    ids=str,
)
def test_what_keys_change_is_rounding(protected: Protect, case: Case, preset: str, rounding: float) -> None:
    laid = protected(case, preset)
    dtype = str(case.dtype).removeprefix("torch.")
    steps: list[int] = []
    certification = laid.certification()
    found = certification.run(steps.append)
    assert found.passed
    assert found.departs is None
    assert found.top1_with_ties == 1.0
    assert found.relative_rms < rounding
    assert found.positions == 48
    assert steps == [1] * certification.steps
    assert (found.native is None) == (dtype in ("float32", "float64"))
    if found.native:
        assert found.native.ratio < 1.5
    assert found.bound <= BOUNDS[dtype]
    again = laid.certify()
    assert found == again.model_copy(update={"salt": found.salt}), "the same seed gives the same figures"
    assert found.salt != again.salt
    assert laid.certify(seed=1).scale != found.scale
    assert Certificate.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize("preset", ["paper", "hardened"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_layer_is_compared_in_keyed_coordinates(protected: Protect, preset: str, dtype: torch.dtype) -> None:
    laid = protected(Case("gpt2", tied=True, dtype=dtype), preset)
    found = laid.certify()
    assert [layer.name for layer in found.layers] == ["entry", "layer 0", "layer 1", "final norm"]
    rounding = 1e-5 if dtype is torch.float32 or preset == "paper" else 1e-2
    for layer in found.layers:
        assert layer.differences.spread > 0.1
        assert layer.differences.relative_rms < rounding
        assert layer.differences.relative_largest < 10 * rounding
        if dtype is torch.bfloat16:
            assert layer.native_plain_rms is not None
            assert layer.native_protected_rms is not None
            assert 1e-4 < layer.native_plain_rms < 2e-2
            assert 1e-4 < layer.native_protected_rms < 2e-2
        else:
            assert layer.native_plain_rms is layer.native_protected_rms is None


def test_a_bit_exact_preset_enters_exactly(protected: Protect) -> None:
    found = protected(Case("gpt2", tied=True, dtype=torch.bfloat16), "paper").certify()
    assert found.layers[0].differences.largest == 0.0


@pytest.mark.parametrize("preset", ["paper", "hardened"])
@pytest.mark.parametrize(
    ("tensor", "place"),
    [("wpe", "layer 0"), ("h.0.attn.c_proj.weight", "layer 0"), ("h.1.mlp.c_fc.bias", "layer 1")],
)
def test_the_layer_where_a_difference_begins_is_named(
    protected: Protect, preset: str, tensor: str, place: str, tmp_path: Path
) -> None:
    """One tensor of the source is another: what the instance was not made from."""
    laid = protected(Case("gpt2", tied=True), preset)
    other = tmp_path / "other"
    shutil.copytree(laid.source.directory, other)
    tensors = load_file(other / "model.safetensors")
    name = next(name for name in tensors if name.removeprefix("transformer.").startswith(tensor))
    tensors[name] = tensors[name] + 0.05 * torch.sign(tensors[name])
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    found = replace(laid, source=Checkpoint.open(other)).certify()
    assert not found.passed
    assert found.departs == ("entry" if tensor == "wpe" else place)


def test_given_inputs_are_run_with_the_random_ones_and_decide_by_themselves(protected: Protect) -> None:
    laid = protected(Case("llama", tied=False), "hardened")
    given = [torch.arange(5), torch.tensor([172]), torch.arange(40) % 7]
    found = laid.certify(given=given)
    assert found.passed
    assert [(group.name, group.sequences, group.positions) for group in found.groups] == [
        ("random", 2, 48),
        ("given", 3, 46),
    ]
    assert found.positions == 94
    alone = laid.certify(given=given, samples=0)
    assert alone.passed
    (group,) = alone.groups
    assert group.name == "given"
    assert group.differences.spread == pytest.approx(found.groups[1].differences.spread, rel=1e-5)
    wrong = group.model_copy(update={"top1_with_ties": 0.99})
    assert not found.model_copy(update={"groups": (found.groups[0], wrong)}).passed


def test_padding_changes_nothing(protected: Protect) -> None:
    """A short sequence gives the same figures beside a long one as alone."""
    laid = protected(Case("llama", tied=False, dtype=torch.float64), "paper")
    short, long = torch.tensor([3, 1, 4]), torch.arange(60)
    together, alone = laid.certify(samples=0, given=[short, long]), laid.certify(samples=0, given=[short])
    rest = laid.certify(samples=0, given=[long])
    mixed = (3 * alone.scale + 60 * rest.scale) / 63
    assert together.scale == pytest.approx(mixed, rel=1e-6)


def test_batches_change_rounding_only(protected: Protect, monkeypatch: pytest.MonkeyPatch) -> None:
    laid = protected(Case("llama", tied=False), "hardened")
    whole = laid.certify(samples=5)
    monkeypatch.setattr("stip_keyservice.protect.equivalence.certification.BATCH_ROWS", 50)
    certification = laid.certification(samples=5)
    assert certification.steps == 3 * 2 * 3 + 1, "three batches, two passes, two layers and a head; the tables"
    parts = certification.run()
    assert parts.passed
    assert parts.positions == whole.positions
    assert parts.scale == pytest.approx(whole.scale, rel=1e-6)


def test_more_can_be_computed_in_than_is_stored(protected: Protect) -> None:
    found = protected(Case("gpt2", tied=True), "hardened").certify(compute_dtype="float64")
    assert found.passed
    assert (found.stored_dtype, found.compute_dtype) == ("float32", "float64")
    assert found.bound == BOUNDS["float32"], "rounding the keyed weights to float32 remains"


def test_another_vocabulary_key_does_not_pass(protected: Protect) -> None:
    laid = protected(Case("llama", tied=False), "paper")
    found = replace(laid, files=replace(laid.files, vocabulary_seed=bytes(32))).certify()
    assert not found.passed
    assert found.departs is None, "hidden states are right, the logits are not"
    assert found.top1 < 0.2
    assert found.relative_rms > 1


@pytest.mark.parametrize("name", ["h.1.attn.c_proj.bias", "h.0.mlp.c_fc.weight", "h.1.ln_2.weight"])
def test_one_changed_server_tensor_does_not_pass(protected: Protect, name: str) -> None:
    laid = protected(Case("gpt2", tied=True), "hardened")
    changed(laid, lambda tensors: tensors.update({name: torch.roll(tensors[name], 1) + 0.01}))
    found = laid.certify()
    assert not found.passed
    assert found.departs == f"layer {name[2]}"


def test_values_that_are_not_finite_do_not_pass(protected: Protect) -> None:
    laid = protected(Case("gpt2", tied=True), "hardened")
    changed(laid, lambda tensors: tensors["h.1.mlp.c_proj.bias"].fill_(torch.nan))
    found = laid.certify()
    assert not found.passed
    assert found.departs == "layer 1"
    assert math.isnan(found.largest_difference)


@pytest.mark.parametrize(
    ("case", "preset"),
    [
        (Case("gpt2", tied=True), "hardened"),
        (Case("llama", tied=False), "paper"),
        (Case("llama", tied=False, dtype=torch.bfloat16), "hardened"),
        (Case("gpt2", tied=True, dtype=torch.bfloat16), "hardened"),
    ],
    ids=str,
)
def test_protect_refuses_to_publish_with_one_key_broken(
    checkpoint_of: Callable[[Case], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case, preset: Any
) -> None:
    """Each incidence of one layer, the residual's in and out of it, and the head."""
    source = Checkpoint.open(checkpoint_of(case))
    whole = plan(source.config, source.headers, preset, bytes(32), accept_tied_head=True)
    broken = [found for found in whole.incidences if ".1." not in found.tensor]
    # Softmax does not see a bias of keys without rotary positions (docs/protection.md).
    broken = [found for found in broken if not (found.part == "layers.0.k" and found.tensor.endswith("c_attn.bias"))]
    assert len(broken) > 15
    for number, incidence in enumerate(broken):
        out = tmp_path / f"out{number}"
        monkeypatch.setattr(instance, "plan", functools.partial(plan, mutate=incidence))
        with pytest.raises(IntegrityError, match="equivalence"):
            protect(
                source.directory,
                out,
                preset=preset,
                developer=Ed25519PrivateKey.generate(),
                seal_to=SEALING.public_key(),
                samples=1,
                accept_tied_head=True,
            )
        assert not out.exists()


@pytest.mark.parametrize("change", ["missing", "unexpected", "reshaped"])
def test_a_server_part_that_is_not_the_plans_is_refused(protected: Protect, change: str) -> None:
    laid = protected(Case("gpt2", tied=True), "hardened")
    changes: dict[str, Callable[[dict[str, torch.Tensor]], None]] = {
        "missing": lambda tensors: tensors.__delitem__("h.0.mlp.c_fc.bias"),
        "unexpected": lambda tensors: tensors.update({"h.0.mlp.extra": torch.ones(1)}),
        "reshaped": lambda tensors: tensors.update({"h.0.mlp.c_fc.bias": torch.ones(3)}),
    }
    found = {
        "missing": "h.0.mlp.c_fc.bias: got none, allowed: F32",
        "unexpected": "h.0.mlp.extra: got F32",
        "reshaped": "h.0.mlp.c_fc.bias: got F32 .3., allowed: F32 .128.",
    }
    changed(laid, changes[change])
    with pytest.raises(IntegrityError, match=f"server part, tensor {found[change]}"):
        laid.certify()


def test_a_server_part_that_cannot_be_read_is_refused(protected: Protect) -> None:
    laid = protected(Case("gpt2", tied=True), "hardened")
    (laid.files.directory / "server" / "model.safetensors").unlink()
    with pytest.raises(IntegrityError, match="server part, model: got no weights"):
        laid.certify()


def test_an_enclave_part_that_lacks_a_table_or_is_changed_is_refused(protected: Protect) -> None:
    laid = protected(Case("llama", tied=False), "hardened")
    embedding, head = (laid.files.directory / "enclave" / f"{name}.sealed" for name in ("embedding", "head"))
    original = head.read_bytes()
    head.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(SealedPartInvalid, match=r"head\.sealed chunk"):
        laid.certify()
    head.unlink()
    with pytest.raises(IntegrityError, match="enclave part: got no head"):
        laid.certify()
    embedding.unlink()
    with pytest.raises(IntegrityError, match="enclave part: got no embedding"):
        laid.certify()


def test_a_head_on_the_server_needs_its_vocabulary_key(protected: Protect) -> None:
    laid = protected(Case("llama", tied=False), "paper")
    with pytest.raises(IntegrityError, match="vocabulary seed"):
        replace(laid, files=replace(laid.files, vocabulary_seed=None)).certify()


def test_a_source_that_gives_nan_is_refused(protected: Protect, tmp_path: Path) -> None:
    laid = protected(Case("llama", tied=False), "hardened")
    shutil.copytree(laid.source.directory, tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointInvalid, match="logits of the source: got NaN"):
        replace(laid, source=Checkpoint.open(tmp_path / "nan")).certify()


def test_the_public_summary_does_not_tell_the_scale_of_the_source(protected: Protect) -> None:
    found = protected(Case("gpt2", tied=True), "hardened").certify()
    assert found.scale > 0.1
    assert "scale" not in found.summary()
    told = json.dumps(found.summary())
    for secret in (found.scale, *(layer.differences.spread for layer in found.layers)):
        assert str(secret) not in told


def test_the_public_manifest_does_not_digest_the_source(protected: Protect) -> None:
    """Who guesses the source knows its logits: the digest of the certificate must not confirm them."""
    found = protected(Case("gpt2", tied=True), "hardened").certify()
    assert len(bytes.fromhex(found.salt)) == 16
    assert found.salt not in json.dumps(found.summary())


def test_every_stored_dtype_has_a_bound() -> None:
    assert BOUNDS.keys() == {"float64", "float32", "float16", "bfloat16"}
