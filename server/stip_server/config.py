"""Configuration of the model server: `server.toml`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo

from stip_protocol.runtime.config import Serving, Settings


def _resolve(path: Path, info: ValidationInfo) -> Path:
    base = (info.context or {}).get("base")
    return path if base is None else base / path


FilePath = Annotated[Path, AfterValidator(_resolve)]
"""A path; a relative one is taken from the folder of the configuration file."""


class EngineSettings(Settings):
    """`[engine]`: how the model is stepped."""

    slots: int = Field(default=16, ge=1, le=1024)
    """Sessions at once. Memory for slots × max_positions is taken at start."""
    max_positions: int | None = Field(default=None, ge=1)
    """Rows of one session, at most what the manifest allows (the default)."""
    prefill_chunk: int = Field(default=64, ge=1)
    """Rows of a prompt in one step: running sessions wait for at most one such step."""
    gather_window_ms: float = Field(default=2.0, ge=0, le=1000)
    """The longest wait for running sessions that are about to return, before a step starts without them."""
    threads: int | None = Field(default=None, ge=1)
    """Of the math library; its own choice by default."""
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$")
    idle_seconds: float = Field(default=300.0, gt=0)
    """A session that neither feeds nor waits for this long is ended."""


class ServerSettings(Settings):
    """The whole file."""

    serving: Serving = Serving()
    instance: FilePath
    """The instance directory: manifest.json, manifest.json.sig and server/."""
    developer_key: FilePath
    """PEM of the model developer's Ed25519 key, which signs manifests."""
    certificate: FilePath
    private_key: FilePath
    client_ca: FilePath
    """PEM of the CA whose certificates may link (the operator's own: gateways)."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}$")
    """Of this replica."""
    engine: EngineSettings = EngineSettings()
    simulated: bool = False
