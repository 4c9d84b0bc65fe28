"""From an instance directory to a model that can be stepped: signature, digests, headers, tensors, in this order."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
import transformers
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from torch import nn
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils import logging

from stip_protocol.errors import CheckpointInvalid, ConfigurationError
from stip_protocol.manifest import Manifest
from stip_server.checkpoint import Checkpoint
from stip_server.config import TransformersSettings
from stip_server.engine import Card, Form
from stip_server.engines.family import shape_of
from stip_server.engines.transformers.sharding import require_plan

LOADERS: dict[Form, Any] = {
    Form.HIDDEN: transformers.AutoModel,
    Form.TOP: transformers.AutoModelForCausalLM,
    Form.IDS: transformers.AutoModelForCausalLM,
}
"""What loads a checkpoint, by the output of its manifest: blocks and final norm, or those and a head; where the engine
decodes alone the embedding is in use too."""
DECODE_ROWS = 8
"""Rows of a session that one decoding step takes, and answers."""
GIB = 1 << 30
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


def load(instance: Path, developer: Ed25519PublicKey, device: str, ranks: int = 1) -> Loaded:
    """Load the server part of an instance, or this process's part of it where it is cut among `ranks`.

    Raises `SignatureInvalid` and `ManifestMismatch` before a tensor is looked at, `CheckpointInvalid` where the
    checkpoint is not what its manifest and its configuration say, `PresetRefused` for a preset that this engine
    does not serve, `ConfigurationError` for a model that cannot be cut among so many.
    """
    checkpoint = Checkpoint.open(instance, developer, tuple(LOADERS))
    manifest = checkpoint.manifest
    model = _load(checkpoint.folder, manifest, device, ranks)
    base, head = split(model)
    if checkpoint.form is Form.HIDDEN:
        head = None
    elif head is None or head.weight.shape[0] != manifest.vocabulary:
        raise CheckpointInvalid.because("vocabulary", model.config.vocab_size, manifest.vocabulary)
    shape = shape_of(base.config)
    checkpoint.require_shape(shape.width, shape.logit_cap)
    return Loaded(base, head, manifest, checkpoint.digest)


def split(model: nn.Module) -> tuple[Any, Any]:
    """(base model, head or None) of a transformers model, protected or plain."""
    return getattr(model, "base_model", model), getattr(model, "get_output_embeddings", lambda: None)()


def card_for(
    model: nn.Module,
    head: nn.Module | None,
    settings: TransformersSettings,
    *,
    manifest: Manifest | None = None,
    digest: bytes = b"",
) -> Card:
    """The card of a loaded model. Without a manifest, of a plain one: then it offers hidden states, and every form
    where it has a head. Raises `CheckpointInvalid` for a model that the engine would get wrong, `ConfigurationError`
    where `settings.memory_gb` does not hold one session."""
    shape = shape_of(model.config)
    positions = shape.positions
    bounds = (manifest and manifest.max_positions, settings.max_positions, settings.positions)
    limits = [positions, *(bound for bound in bounds if bound)]
    forms = (Form(manifest.output),) if manifest else tuple(Form) if head else (Form.HIDDEN,)
    parameter = next(model.parameters())
    # One position more than a session holds: rows that belong to nobody go there (see `cache`).
    slot_bytes = 2 * shape.layers * shape.kv_heads * shape.head_width * (min(limits) + 1) * parameter.element_size()
    return Card(
        instance=manifest.instance if manifest else PLAIN,
        epoch=manifest.epoch if manifest else 0,
        manifest_digest=digest,
        preset=manifest.preset if manifest else "plain",
        dtype=str(parameter.dtype).removeprefix("torch."),
        width=shape.width,
        vocabulary=int(head.weight.shape[0]) if isinstance(head, nn.Linear) else 0,
        max_positions=min(limits),
        max_sessions=_slots(settings, slot_bytes, min(limits)),
        forms=forms,
        max_outputs=DECODE_ROWS,
    )


def _slots(settings: TransformersSettings, slot_bytes: int, positions: int) -> int:
    """Sessions whose keys and values the engine has room for."""
    if settings.memory_gb is None:
        return settings.slots
    fitting = int(settings.memory_gb * GIB / slot_bytes)
    if fitting < 1:
        least = f"at least {slot_bytes / GIB:.3g} (one session of {positions} positions)"
        raise ConfigurationError.because("engine.memory_gb", settings.memory_gb, least)
    slots = min(settings.slots, fitting)
    structlog.get_logger().info(
        "slots", slots=slots, asked=settings.slots, memory_gb=settings.memory_gb, slot_mib=round(slot_bytes / 2**20, 3)
    )
    return slots


def _load(folder: Path, manifest: Manifest, device: str, ranks: int) -> Any:
    """The model, in the class that its configuration names. Nothing remote, no code of the checkpoint's own."""
    loader = LOADERS[Form(manifest.output)]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        stored = json.loads((folder / "config.json").read_bytes()).get("architectures")
        model, report = loader.from_pretrained(
            folder,
            dtype=getattr(torch, manifest.dtype),
            **_placed(folder, manifest, device, ranks),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except ConfigurationError:
        raise
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


def _placed(folder: Path, manifest: Manifest, device: str, ranks: int) -> dict[str, Any]:
    """Where `from_pretrained` puts the tensors. Raises `ConfigurationError` where they cannot be cut."""
    if ranks == 1:
        return {"device_map": None if device == "cpu" else device}
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    require_plan(config, ranks, head=Form(manifest.output) is not Form.HIDDEN)
    return {"distributed_config": DistributedConfig(tp_size=ranks)}
