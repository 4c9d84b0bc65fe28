"""`gateway.toml`."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from stip_protocol.lease import Epoch, InstanceId
from stip_protocol.runtime.config import Address, ConfigPath, Serving, Settings

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


class ReplicaSettings(Settings):
    """One row of the routing table: a model server and the instance epoch it holds."""

    name: Name
    address: Address
    server_name: str | None = None
    instance: InstanceId
    epoch: Epoch


class Limits(Settings):
    """Bounds of one link and of the whole gateway."""

    links: int = Field(default=256, ge=1)
    links_per_enclave: int = Field(default=64, ge=1)
    """Of one link certificate: a link needs no lease, so nothing else keeps one enclave from taking all."""
    sessions_per_link: int = Field(default=256, ge=1)
    slices_per_frame: int = Field(default=512, ge=1)
    retry_seconds: float = Field(default=1.0, gt=0)
    """After which one who was refused a link or a session for want of room may try again."""
    leases: int = Field(default=65536, ge=1)
    """Lease accounts kept; expired ones are dropped first, then new leases are refused."""
    describe_seconds: float = Field(default=5.0, gt=0)
    """How long a replica may take to describe itself."""
    refresh_seconds: float = Field(default=5.0, gt=0)
    """How often replicas are asked whether they still answer."""


class GatewaySettings(Settings):
    serving: Serving = Serving()
    audience: Name
    """The name leases are made out to."""
    service_key: ConfigPath
    """PEM of the key service's Ed25519 public key: signs leases."""
    link_ca: ConfigPath
    """PEM of the key service's CA for link certificates."""
    certificate: ConfigPath
    private_key: ConfigPath
    replica_ca: ConfigPath
    replica_certificate: ConfigPath
    replica_private_key: ConfigPath
    replicas: tuple[ReplicaSettings, ...] = Field(min_length=1, max_length=4096)
    limits: Limits = Limits()
    simulated: bool = False

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [replica.name for replica in self.replicas]
        if len(set(names)) != len(names):
            raise ValueError("replicas: two rows have the same name")
        return self
