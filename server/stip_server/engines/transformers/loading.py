"""From an instance directory to a model that can be stepped: signature, digests, headers, tensors, in this order."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import logging

from stip_protocol.errors import CheckpointInvalid, PresetRefused
from stip_protocol.manifest import Manifest, check_files
from stip_protocol.tensor import FRAME_LIMIT, SAFETENSORS_DTYPE, row_bytes
from stip_server.config import EngineSettings
from stip_server.engine import Card, Form
from stip_server.engines.transformers.family import shape_of

LOADERS: dict[Form, Any] = {
    Form.HIDDEN: transformers.AutoModel,
    Form.TOP: transformers.AutoModelForCausalLM,
}
"""What loads a checkpoint, by the output of its manifest: blocks and final norm, or those and a head."""
PLAIN = "0" * 32
"""The instance id of a card for a model that belongs to no instance."""


@dataclass(frozen=True)
class Loaded:
    """A model with its head, ready for the engine, and what it was loaded from."""

    model: nn.Module
    head: nn.Module | None
    manifest: Manifest
    digest: bytes
    """SHA-256 of manifest.json."""


def load(instance: Path, developer: Ed25519PublicKey, device: str) -> Loaded:
    """Load the server part of an instance.

    Raises `SignatureInvalid` and `ManifestMismatch` before a tensor is looked at, `CheckpointInvalid` where the
    checkpoint is not what its manifest and its configuration say, `PresetRefused` for a preset that this engine
    does not serve.
    """
    manifest, digest = Manifest.load(instance / "manifest.json", developer)
    if manifest.preset == "throughput" or manifest.output not in LOADERS:
        served = "paper, hardened; serving it needs an engine that generates by itself"
        raise PresetRefused.because("preset", manifest.preset, served)
    folder = instance / "server"
    if not folder.is_dir():
        raise CheckpointInvalid.because("server", "no such folder", "the server part of the instance")
    check_files(folder, dict(manifest.server))
    _require_dtype(folder, manifest)
    model = _load(folder, manifest, device)
    base, head = split(model)
    shape = shape_of(base.config)
    form = Form(manifest.output)
    if form is Form.HIDDEN:
        head = None
    elif head is None or head.weight.shape[0] != manifest.vocabulary:
        raise CheckpointInvalid.because("vocabulary", model.config.vocab_size, manifest.vocabulary)
    elif row_bytes(manifest.dtype, manifest.vocabulary) > FRAME_LIMIT:
        raise CheckpointInvalid.because("vocabulary", manifest.vocabulary, f"a logits row of {FRAME_LIMIT} bytes")
    if shape.width != manifest.width:
        raise CheckpointInvalid.because("hidden_size", shape.width, manifest.width)
    if shape.logit_cap != manifest.logit_cap:
        raise CheckpointInvalid.because("final_logit_softcapping", shape.logit_cap, manifest.logit_cap)
    return Loaded(base, head, manifest, digest)


def split(model: nn.Module) -> tuple[Any, Any]:
    """(base model, head or None) of a transformers model, protected or plain."""
    return getattr(model, "base_model", model), getattr(model, "get_output_embeddings", lambda: None)()


def card_for(
    model: nn.Module,
    head: nn.Module | None,
    settings: EngineSettings,
    *,
    manifest: Manifest | None = None,
    digest: bytes = b"",
) -> Card:
    """The card of a loaded model. Without a manifest, of a plain one: then it offers hidden states, and tops
    where it has a head. Raises `CheckpointInvalid` for a model that the engine would get wrong."""
    shape = shape_of(model.config)
    positions = shape.positions
    limits = [positions, manifest.max_positions if manifest else positions, settings.max_positions or positions]
    forms = (Form(manifest.output),) if manifest else (Form.HIDDEN, Form.TOP) if head else (Form.HIDDEN,)
    parameter = next(model.parameters())
    return Card(
        instance=manifest.instance if manifest else PLAIN,
        epoch=manifest.epoch if manifest else 0,
        manifest_digest=digest,
        preset=manifest.preset if manifest else "plain",
        dtype=str(parameter.dtype).removeprefix("torch."),
        width=shape.width,
        vocabulary=int(head.weight.shape[0]) if isinstance(head, nn.Linear) else 0,
        max_positions=min(limits),
        max_sessions=settings.slots,
        forms=forms,
    )


def _require_dtype(folder: Path, manifest: Manifest) -> None:
    """Every stored tensor has the manifest's dtype: transformers would convert others without a word."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    stored = file.get_slice(name).get_dtype()
                    if SAFETENSORS_DTYPE.get(stored) != manifest.dtype:
                        raise CheckpointInvalid.because(f"dtype of {name}", stored, manifest.dtype)
        except SafetensorError:
            raise CheckpointInvalid.because(path.name, "no whole safetensors file", "a safetensors file") from None


def _load(folder: Path, manifest: Manifest, device: str) -> Any:
    """The model, in the class that its configuration names. Nothing remote, no code of the checkpoint's own."""
    loader = LOADERS[Form(manifest.output)]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        stored = json.loads((folder / "config.json").read_bytes()).get("architectures")
        model, report = loader.from_pretrained(
            folder,
            dtype=getattr(torch, manifest.dtype),
            device_map=None if device == "cpu" else device,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        # Its message may quote paths and contents: the type says enough.
        raise CheckpointInvalid.because(
            "server", f"a checkpoint that does not load ({type(error).__name__})", f"a checkpoint for {loader.__name__}"
        ) from error
    if stored != [type(model).__name__]:
        raise CheckpointInvalid.because("architectures", stored, f"[{type(model).__name__}]")
    for finding in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := report[finding]:
            raise CheckpointInvalid.because(finding, f"{len(found)} ({min(map(str, found))})", "none")
    return model
