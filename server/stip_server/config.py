"""Configuration of the model server: `server.toml`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from stip_protocol.runtime.config import ConfigPath, Serving, Settings


class TransformersSettings(Settings):
    """`[engine]` with `kind = "transformers"`, the default: how this project's own engine steps the model."""

    kind: Literal["transformers"] = "transformers"
    slots: int = Field(default=16, ge=1, le=1024)
    """Sessions at once. Memory for slots × max_positions is taken at start."""
    max_positions: int | None = Field(default=None, ge=1)
    """Rows of one session, at most what the manifest allows (the default)."""
    positions: int | None = Field(default=None, ge=1)
    """The sum of what open sessions may hold, beyond which none is admitted: slots × max_positions by default."""
    memory_gb: float | None = Field(default=None, gt=0)
    """GiB of keys and values: there are as many slots as fit, at most `slots`."""
    prefill_chunk: int = Field(default=64, ge=1)
    """Rows of a prompt in one step: running sessions wait for at most one such step."""
    gather_window_ms: float = Field(default=50.0, ge=0, le=1000)
    """The longest wait for running sessions that are about to return, before a step starts without them. Half a
    step is waited at most, and only for sessions that usually return in that time; 0 never waits."""
    threads: int | None = Field(default=None, ge=1)
    """Of the math library; its own choice by default."""
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$")
    tensor_parallel: int = Field(default=1, ge=1)
    """Processes among which every matrix is cut, each with a device of its own: torchrun starts them."""
    graphs: bool | None = None
    """Record decoding steps of fixed shapes at the start and replay them (CUDA graphs): a slower start, faster steps.
    By default on a GPU, where the model can be recorded."""
    idle_seconds: float = Field(default=300.0, gt=0)
    """A session that neither feeds nor waits for this long is ended."""


class VllmSettings(Settings):
    """`[engine]` with `kind = "vllm"`: what is handed to vLLM, which schedules on its own. The device is that of the
    vLLM that is installed."""

    kind: Literal["vllm"]
    slots: int = Field(default=64, ge=1, le=4096)
    """Sessions open at once, and sequences in one of vLLM's steps."""
    max_positions: int | None = Field(default=None, ge=1)
    """Rows of one session, at most what the manifest allows (the default)."""
    memory_gb: float | None = Field(default=None, gt=0)
    """GiB of each worker's KV cache. By default what `gpu_memory_share` leaves on a GPU, vLLM's own choice on a CPU."""
    gpu_memory_share: float = Field(default=0.9, gt=0, le=1)
    """Of each GPU's memory: weights, activations and KV cache together. Not used where `memory_gb` is set."""
    block: int = Field(default=32, ge=32, le=256, multiple_of=32)
    """Positions in a block of the KV cache: what a later step finds again is rounded down to whole blocks. vLLM's CPU
    attention wants multiples of 32."""
    step_rows: int | None = Field(default=None, ge=1)
    """Rows in one step of vLLM, prompts in chunks included; its own choice by default."""
    threads: int | None = Field(default=None, ge=1)
    """Of the math library on a CPU; its own choice by default."""
    compiled: bool = True
    """torch.compile and, on GPUs, CUDA graphs: faster steps, a slower start."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Workers among which every matrix is cut."""
    pipeline_parallel: int = Field(default=1, ge=1)
    """Groups of workers among which the layers are cut."""
    distributed_backend: Literal["mp", "ray"] | None = None
    """How workers are started: processes of this machine, or of a Ray cluster. vLLM's own choice by default."""
    log_level: str = Field(default="critical", pattern="^(debug|info|warning|error|critical)$")
    """Of vLLM's own log, on standard error. On a failed step its errors hold stop ids and ids of running sessions
    (permuted); lower it to find out why an instance does not load, and only there."""
    idle_seconds: float = Field(default=300.0, gt=0)
    """A session that neither feeds nor waits for this long is ended."""


def _kind(value: Any) -> Any:
    return value.get("kind", "transformers") if isinstance(value, dict) else getattr(value, "kind", None)


AnyEngine = Annotated[
    Annotated[TransformersSettings, Tag("transformers")] | Annotated[VllmSettings, Tag("vllm")],
    Discriminator(
        _kind,
        custom_error_type="engine_kind",
        custom_error_message="kind must be 'transformers' or 'vllm'",
    ),
]


class ServerSettings(Settings):
    """The whole file."""

    serving: Serving = Serving()
    instance: ConfigPath
    """The instance directory: manifest.json, manifest.json.sig and server/."""
    developer_key: ConfigPath
    """PEM of the model developer's Ed25519 key, which signs manifests."""
    certificate: ConfigPath
    private_key: ConfigPath
    client_ca: ConfigPath
    """PEM of the CA whose certificates may link (the operator's own: gateways)."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}$")
    """Of this replica."""
    engine: AnyEngine = TransformersSettings()
    simulated: bool = False
