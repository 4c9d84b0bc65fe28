"""Configuration of the model server: `server.toml`."""

from __future__ import annotations

from pydantic import Field

from stip_protocol.runtime.config import ConfigPath, Serving, Settings


class EngineSettings(Settings):
    """`[engine]`: how the model is stepped."""

    slots: int = Field(default=16, ge=1, le=1024)
    """Sessions at once. Memory for slots × max_positions is taken at start."""
    max_positions: int | None = Field(default=None, ge=1)
    """Rows of one session, at most what the manifest allows (the default)."""
    prefill_chunk: int = Field(default=64, ge=1)
    """Rows of a prompt in one step: running sessions wait for at most one such step."""
    gather_window_ms: float = Field(default=50.0, ge=0, le=1000)
    """The longest wait for running sessions that are about to return, before a step starts without them. Half a
    step is waited at most, and only for sessions that usually return in that time; 0 never waits."""
    threads: int | None = Field(default=None, ge=1)
    """Of the math library; its own choice by default."""
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$")
    idle_seconds: float = Field(default=300.0, gt=0)
    """A session that neither feeds nor waits for this long is ended."""


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
    engine: EngineSettings = EngineSettings()
    simulated: bool = False
