"""From an instance directory to a running vLLM that serves it: checked first, then loaded, then tried on one step.

`surroundings.surround` comes before this module is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import PoolerConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from stip_protocol.errors import CheckpointInvalid, StipError
from stip_protocol.tensor import row_bytes
from stip_server.checkpoint import Checkpoint
from stip_server.config import VllmSettings
from stip_server.engine import Card, Form, Generation, Slice
from stip_server.engines.family import Shape, shape_of
from stip_server.engines.vllm.engine import VllmEngine
from stip_server.engines.vllm.head import Answers, load_head
from stip_server.engines.vllm.requests import generated, last_state, sampling
from stip_server.engines.vllm.sequence import Ids, Rows

GIB = 1 << 30
POOLING: Mapping[str, Any] = {"runner": "pooling", "convert": "embed", "enable_prompt_embeds": True}
RUNNERS: Mapping[Form, Mapping[str, Any]] = {
    Form.HIDDEN: POOLING,
    Form.TOP: POOLING,
    Form.IDS: {"runner": "generate"},
}
"""What vLLM is asked to be, by the output of the manifest: a decoder, or what makes an "embedding" of a prompt, which
is the hidden state of its last row."""
FOREIGN = ("auto_map", "quantization_config", "compression_config")
"""Of a configuration: code of its own, and conversions of tensors that are what the manifest says."""
DTYPES = ("float32", "float16", "bfloat16")
"""vLLM computes in these; a float64 instance is refused."""


@dataclass(frozen=True)
class Loaded:
    """A vLLM that runs, and what it serves."""

    llm: Any
    """An `AsyncLLM` of the running event loop."""
    card: Card
    positions: int
    """What its KV cache has room for."""
    head: nn.Linear | None
    """Of `Form.TOP`: vLLM's pooling runner ends before it."""
    logit_cap: float | None


async def start(instance: Path, developer: Ed25519PublicKey, settings: VllmSettings) -> VllmEngine:
    """`load`, and an engine over it that takes vLLM down when it stops."""
    loaded = await load(instance, developer, settings)
    answers = Answers(loaded.card, loaded.head, loaded.logit_cap, settings.threads)
    llm = loaded.llm
    return VllmEngine(
        llm,
        answers,
        loaded.card,
        positions=loaded.positions,
        idle_seconds=settings.idle_seconds,
        leave=llm.shutdown,
    )


async def load(instance: Path, developer: Ed25519PublicKey, settings: VllmSettings) -> Loaded:
    """Load the server part of an instance into vLLM. Within a running event loop, to which it then belongs.

    Raises what `Checkpoint.open` raises, and `CheckpointInvalid` where vLLM does not load or step the checkpoint.
    """
    checkpoint = Checkpoint.open(instance, developer, tuple(RUNNERS))
    shape = _shape(checkpoint)
    card = card_for(checkpoint, shape, settings)
    head = load_head(checkpoint) if checkpoint.form is Form.TOP else None
    llm = launch(checkpoint.folder, checkpoint.form, card, settings)
    try:
        await _rehearse(llm, card)
    except Exception as error:
        llm.shutdown()
        raise error if isinstance(error, StipError) else _refused("step", error) from error
    cache = llm.vllm_config.cache_config
    # One block belongs to nobody.
    return Loaded(llm, card, (cache.num_gpu_blocks - 1) * cache.block_size, head, shape.logit_cap)


def card_for(checkpoint: Checkpoint, shape: Shape, settings: VllmSettings) -> Card:
    """What is served."""
    manifest = checkpoint.manifest
    return Card(
        instance=manifest.instance,
        epoch=manifest.epoch,
        manifest_digest=checkpoint.digest,
        preset=manifest.preset,
        dtype=manifest.dtype,
        width=manifest.width,
        vocabulary=0 if checkpoint.form is Form.HIDDEN else manifest.vocabulary,
        max_positions=min(shape.positions, manifest.max_positions, settings.max_positions or shape.positions),
        max_sessions=settings.slots,
        forms=(checkpoint.form,),
    )


def launch(folder: Path, form: Form, card: Card, settings: VllmSettings) -> Any:
    """vLLM over a checkpoint folder: an `AsyncLLM`. Raises `CheckpointInvalid` where it does not load.

    Statistics and the log of requests are off: both see what sessions send.
    """
    runner = dict(RUNNERS[form])
    if form is not Form.IDS:
        runner["pooler_config"] = PoolerConfig(seq_pooling_type="LAST", use_activation=False)
    try:
        arguments = AsyncEngineArgs(
            model=str(folder),
            hf_overrides={"architectures": [_architecture(folder)]},
            skip_tokenizer_init=True,
            trust_remote_code=False,
            generation_config="vllm",  # not the checkpoint's own
            load_format="safetensors",
            dtype=card.dtype,
            max_model_len=card.max_positions,
            max_num_seqs=card.max_sessions,
            max_num_batched_tokens=settings.step_rows,
            block_size=settings.block,
            enable_prefix_caching=True,
            prefix_caching_hash_algo="sha256",
            kv_cache_memory_bytes=int(settings.memory_gb * GIB) if settings.memory_gb else None,
            gpu_memory_utilization=settings.gpu_memory_share,
            enforce_eager=not settings.compiled,
            tensor_parallel_size=settings.tensor_parallel,
            pipeline_parallel_size=settings.pipeline_parallel,
            distributed_executor_backend=settings.distributed_backend,
            disable_log_stats=True,
            enable_log_requests=False,
            **runner,
        )
        return AsyncLLM.from_engine_args(arguments)
    except Exception as error:
        raise _refused("load", error) from error


def _architecture(folder: Path) -> str:
    """The class with a head, of which vLLM makes both its runners; a `hardened` checkpoint names the one without."""
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[_config(folder).model_type])


def _config(folder: Path) -> Any:
    return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _shape(checkpoint: Checkpoint) -> Shape:
    """The facts of the model, held to the manifest."""
    manifest = checkpoint.manifest
    if manifest.dtype not in DTYPES:
        raise CheckpointInvalid.because("dtype", manifest.dtype, ", ".join(DTYPES))
    try:
        config = _config(checkpoint.folder)
    except Exception as error:
        # Its message may quote paths and contents: the type says enough.
        raise CheckpointInvalid.because(
            "config.json", f"one that does not load ({type(error).__name__})", "a configuration of transformers"
        ) from error
    for name in FOREIGN:
        if getattr(config, name, None) is not None:
            raise CheckpointInvalid.because(f"config.json's {name}", "one", "none")
    shape = shape_of(config)
    checkpoint.require_shape(shape.width, shape.logit_cap)
    if checkpoint.form is not Form.HIDDEN and config.vocab_size != manifest.vocabulary:
        raise CheckpointInvalid.because("vocabulary", config.vocab_size, manifest.vocabulary)
    return shape


async def _rehearse(llm: Any, card: Card) -> None:
    """One step before anything is offered: vLLM finds out only then what its kernels cannot compute."""
    if card.forms == (Form.IDS,):
        history = Ids()
        history.extend([0])
        params = sampling(Generation(1, 1, frozenset()), card.vocabulary)
        async for _ in generated(llm, "rehearsal", history, "rehearsal", params):
            pass
        return
    rows = Rows(card)
    rows.add(Slice((0, b""), 0, 1, 1, bytes(row_bytes(card.dtype, card.width))))
    state = await last_state(llm, "rehearsal", rows, "rehearsal")
    if tuple(state.shape) != (card.width,):
        raise CheckpointInvalid.because("hidden state", list(state.shape), [card.width])


def _refused(what: str, error: Exception) -> CheckpointInvalid:
    got = f"a checkpoint that vLLM does not {what} ({type(error).__name__})"
    return CheckpointInvalid.because("server", got, "one of its architectures; engine.log_level = 'error' says why")
