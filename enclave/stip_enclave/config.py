"""`enclave.toml`. Under Gramine the file is measured: its pinned keys are part of what a client attests."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from stip_protocol.runtime.config import Address, ConfigPath, Serving, Settings

Seconds = Annotated[float, Field(gt=0, le=24 * 3600)]
PerSecond = Annotated[float, Field(gt=0, le=10_000)]
HostName = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?$")]


class InstanceSettings(Settings):
    """One instance this enclave may open."""

    directory: ConfigPath
    """Holds `manifest.json`, its signature, and `enclave/`."""


class KeyServiceSettings(Settings):
    """Where keys come from, and whose word is believed."""

    address: Address
    ca: ConfigPath
    """PEM roots of its TLS certificate."""
    server_name: str | None = None
    service_key: ConfigPath
    """PEM of its Ed25519 key: signs releases, leases and renewals."""


class GatewaySettings(Settings):
    """Where rows go."""

    address: Address
    ca: ConfigPath
    server_name: str | None = None
    audience: HostName
    """The name leases are made out to."""


class Limits(Settings):
    """Bounds of one session, one user and the whole enclave."""

    sessions: int = Field(default=256, ge=1)
    sessions_per_user: int = Field(default=64, ge=1)
    ids_per_turn: int = Field(default=262_144, ge=1)
    stop_ids: int = Field(default=1024, ge=0)
    steps_ahead: int = Field(default=64, ge=2)
    """Steps that wait for a slow client before its session, and no other, pauses."""
    drafts: int = Field(default=7, ge=0, le=7)
    """Tokens that a client may have guessed ahead a round trip; 0 forbids it. How many were right shows on the
    operator's side, token by token: how, and where, the text repeats itself."""
    accounts: int = Field(default=4096, ge=1)
    """Leases kept for later sessions of the same delegation."""
    open_seconds: Seconds = 10.0
    """For a client's first message, and for a replica's answer to an opening session."""
    idle_seconds: Seconds = 600.0
    """Without a turn, or with a turn that the client does not read."""
    reply_seconds: Seconds = 300.0
    """For a replica's answer to a row."""
    failover_seconds: Seconds = 30.0
    """For a session whose replica was lost to find another one that answers; then it ends with `ReplicaLost`."""
    replays: int = Field(default=4, ge=1)
    """Sessions from elsewhere whose history is fed to one replica at once; the others wait for their turn."""
    replayed_rows: int = Field(default=4096, ge=0)
    """Rows that one session may be fed again elsewhere, or 16 times its length where that is more: what it may cost
    its user that the operator's links break or drain."""
    key_service_seconds: Seconds = 10.0
    attests_per_second: PerSecond = 20.0
    releases_per_second: PerSecond = 20.0
    lease_rows: int = Field(default=4096, ge=1, le=2**31)
    """Rows asked of the key service at a time; its policy decides."""


class EnclaveSettings(Settings):
    serving: Serving = Serving()
    dns_name: HostName = "localhost"
    """The name of the RA-TLS certificate."""
    certificate_hours: float = Field(default=8.0, gt=0, le=24)
    """Of the RA-TLS certificate. It is not renewed: an enclave is restarted before it ends."""
    collateral: ConfigPath
    """`QuoteCollateralV3` JSON that the host keeps fresh."""
    developer_key: ConfigPath
    """PEM of the model developer's Ed25519 key: signs manifests."""
    instances: tuple[InstanceSettings, ...] = Field(min_length=1, max_length=64)
    keyservice: KeyServiceSettings
    gateway: GatewaySettings
    limits: Limits = Limits()
    threads: int | None = Field(default=None, ge=1, le=256)
    """Of the head; None leaves it to torch."""
    simulated: bool = False
    """Must say the same as the evidence provider: nothing is simulated by accident."""
