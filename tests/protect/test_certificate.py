"""The certificate passes for what is the same, and for nothing else."""

from __future__ import annotations

import functools
import json
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
from stip_keyservice.protect.certificate import BOUNDS, Certificate, certify, passes
from stip_keyservice.protect.checkpoint import Checkpoint
from stip_keyservice.protect.instance import protect
from stip_keyservice.protect.plan import plan
from stip_keyservice.protect.protected_model import InstanceFiles
from stip_protocol.errors import CheckpointInvalid, IntegrityError, SealedPartInvalid
from stip_protocol.secrets_file import grant_of, open_secrets

from .conftest import Case

SEALING = X25519PrivateKey.generate()
Protect = Callable[[Case, str], tuple[InstanceFiles, Path]]


@pytest.fixture
def protected(checkpoint_of: Callable[[Case], Path], tmp_path: Path) -> Protect:
    def make(case: Case, preset: Any) -> tuple[InstanceFiles, Path]:
        model = checkpoint_of(case)
        result = protect(
            model,
            tmp_path / "out",
            preset=preset,
            developer=Ed25519PrivateKey.generate(),
            seal_to=SEALING.public_key(),
            samples=1,
            accept_tied_head=True,
        )
        manifest = result.manifest
        grant = grant_of(open_secrets((tmp_path / "out" / "secrets.sealed").read_bytes(), SEALING))
        files = InstanceFiles(
            directory=tmp_path / "out",
            instance=manifest.instance,
            epoch=manifest.epoch,
            preset=manifest.preset,
            output=manifest.output,
            vocabulary=manifest.vocabulary,
            part_key=grant.part_key,
            vocabulary_seed=grant.vocabulary_seed,
        )
        return files, model

    return make


def certificate(files: InstanceFiles, source: Path, dtype: str = "float32", **options: Any) -> Certificate:
    arguments: dict[str, Any] = {"max_positions": 32, "samples": 2, "advance": lambda step: None} | options
    return certify(files, source, stored_dtype=dtype, **arguments)


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
    files, source = protected(case, preset)
    dtype = str(case.dtype).removeprefix("torch.")
    steps: list[int] = []
    found = certificate(files, source, dtype, advance=steps.append)
    assert found.passed
    assert found.top1_with_ties == 1.0
    assert found.relative_rms < rounding
    assert found.positions == 64
    assert sum(steps) == 2 * passes(dtype, preset)
    assert (found.native is None) == (dtype in ("float32", "float64"))
    if found.native:
        assert found.native.ratio < 1.5
    assert found.bound <= BOUNDS[dtype]
    again = certificate(files, source, dtype)
    assert found == again.model_copy(update={"salt": found.salt}), "the same seed gives the same figures"
    assert found.salt != again.salt
    assert Certificate.model_validate_json(found.model_dump_json()) == found


def test_another_vocabulary_key_does_not_pass(protected: Protect) -> None:
    files, source = protected(Case("llama", tied=False), "paper")
    found = certificate(replace(files, vocabulary_seed=bytes(32)), source)
    assert not found.passed
    assert found.top1 < 0.2
    assert found.relative_rms > 1


@pytest.mark.parametrize("name", ["h.1.attn.c_proj.bias", "h.0.mlp.c_fc.weight", "h.1.ln_2.weight"])
def test_one_changed_server_tensor_does_not_pass(protected: Protect, name: str) -> None:
    files, source = protected(Case("gpt2", tied=True), "hardened")
    weights = files.directory / "server" / "model.safetensors"
    tensors = load_file(weights)
    tensors[name] = torch.roll(tensors[name], 1) + 0.01
    save_file(tensors, weights, metadata={"format": "pt"})
    assert not certificate(files, source).passed


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
    for incidence in broken:
        monkeypatch.setattr(instance, "plan", functools.partial(plan, mutate=incidence))
        with pytest.raises(IntegrityError, match="equivalence"):
            protect(
                source.directory,
                tmp_path / "out",
                preset=preset,
                developer=Ed25519PrivateKey.generate(),
                seal_to=SEALING.public_key(),
                samples=1,
                accept_tied_head=True,
            )
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_a_server_part_that_does_not_load_whole_is_refused(protected: Protect, change: str) -> None:
    files, source = protected(Case("gpt2", tied=True), "hardened")
    weights = files.directory / "server" / "model.safetensors"
    tensors = load_file(weights)
    if change == "missing":
        del tensors["h.0.mlp.c_fc.bias"]
    else:
        tensors["h.0.mlp.extra"] = torch.ones(1)
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=f"server part {change}_keys"):
        certificate(files, source)


def test_an_enclave_part_that_lacks_a_table_or_is_changed_is_refused(protected: Protect) -> None:
    files, source = protected(Case("llama", tied=False), "hardened")
    embedding, head = (files.directory / "enclave" / f"{name}.sealed" for name in ("embedding", "head"))
    original = head.read_bytes()
    head.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(SealedPartInvalid, match=r"head\.sealed chunk 0"):
        certificate(files, source)
    head.unlink()
    with pytest.raises(IntegrityError, match="enclave part: got no head"):
        certificate(files, source)
    embedding.unlink()
    with pytest.raises(IntegrityError, match="enclave part: got no embedding"):
        certificate(files, source)


def test_a_head_on_the_server_needs_its_vocabulary_key(protected: Protect) -> None:
    files, source = protected(Case("llama", tied=False), "paper")
    with pytest.raises(IntegrityError, match="vocabulary seed"):
        certificate(replace(files, vocabulary_seed=None), source)


def test_a_source_that_gives_nan_is_refused(protected: Protect, tmp_path: Path) -> None:
    files, source = protected(Case("llama", tied=False), "hardened")
    shutil.copytree(source, tmp_path / "nan")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointInvalid, match="logits of the source: got NaN"):
        certificate(files, tmp_path / "nan")


def test_the_public_summary_does_not_tell_the_scale_of_the_source(protected: Protect) -> None:
    files, source = protected(Case("gpt2", tied=True), "hardened")
    found = certificate(files, source)
    assert found.scale > 0.1
    assert str(found.scale) not in json.dumps(found.summary())
    assert "scale" not in found.summary()


def test_the_public_manifest_does_not_digest_the_source(protected: Protect) -> None:
    """Who guesses the source knows its logits: the digest of the certificate must not confirm them."""
    files, source = protected(Case("gpt2", tied=True), "hardened")
    found = certificate(files, source)
    assert len(bytes.fromhex(found.salt)) == 16
    assert found.salt not in json.dumps(found.summary())


def test_every_stored_dtype_has_a_bound() -> None:
    assert BOUNDS.keys() == {"float64", "float32", "float16", "bfloat16"}
