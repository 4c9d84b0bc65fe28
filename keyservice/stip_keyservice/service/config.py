"""`keyservice.toml`."""

from __future__ import annotations

import hashlib
from typing import Self

from pydantic import Field, model_validator

from stip_keyservice.service.policy import Policy
from stip_protocol.attestation.collateral_source import CollateralSettings
from stip_protocol.errors import ConfigurationError
from stip_protocol.runtime.config import ConfigPath, Serving, Settings
from stip_protocol.runtime.files import read_file

ROOT_LIMIT = 16 << 10
"""Bytes of the largest root certificate read."""


class Rate(Settings):
    """A token bucket: `burst` at once, and `per_second` on average."""

    per_second: float = Field(gt=0, le=1_000_000)
    burst: int = Field(ge=1, le=1_000_000)


class Rates(Settings):
    """What one peer (an IPv4 address, an IPv6 /64) may ask for. Many enclaves may share one address."""

    challenge: Rate = Rate(per_second=200, burst=1000)
    release: Rate = Rate(per_second=50, burst=500)
    renewal: Rate = Rate(per_second=500, burst=2000)
    watch: Rate = Rate(per_second=20, burst=500)
    lease: Rate = Rate(per_second=5, burst=20)
    """Renewals of one lease, beyond what its peer has left."""
    peers: int = Field(default=10_000, ge=16, le=1_000_000)
    """Peers told apart; newcomers beyond them share one bucket."""


class Limits(Settings):
    """Bounds of one process."""

    threads: int = Field(default=4, ge=1, le=64)
    waiting: int = Field(default=256, ge=1)
    """Requests under way; more are refused as overloaded."""
    deadline_seconds: float = Field(default=10.0, gt=0, le=300)
    """How long one decision may take."""
    watches: int = Field(default=512, ge=1, le=100_000)
    """Open watch streams; more are refused as overloaded."""
    watches_per_key: int = Field(default=2, ge=1, le=16)
    """Of one link key: its oldest ends where another one comes."""
    rates: Rates = Rates()
    refusals_in_full: int = Field(default=8, ge=0, le=10_000)
    """Refusals of a peer without a user of ours that the audit log records one by one, a minute; more are counted."""


class KeyServiceSettings(Settings):
    serving: Serving = Serving()
    home: ConfigPath | None = None
    """The key service's home; by default `$STIP_KEYSERVICE_HOME` or `~/.stip/keyservice`."""
    policy: ConfigPath
    """The policy, see `stip_keyservice.service.policy`. Its signature lies beside it, `<name>.sig`."""
    policy_key: ConfigPath | None = None
    """Ed25519 public key (PEM) that policies are signed by; by default the home's `developer.pub`."""
    dns_name: str = Field(default="localhost", min_length=1, max_length=253)
    """The name the server's certificate carries."""
    simulated_root: ConfigPath | None = None
    """DER of a simulated TEE's root. Development only."""
    collateral: CollateralSettings | None = None
    """Where the service's own collateral comes from; None: evidence is judged with what came along with it."""
    limits: Limits = Limits()
    simulated: bool = False
    """Must be set, and only then, where the policy trusts a simulated TEE."""

    @model_validator(mode="after")
    def _threads_are_left(self) -> Self:
        if self.collateral is not None and self.collateral.waiters >= self.limits.threads:
            got, most = self.collateral.waiters, self.limits.threads - 1
            raise ValueError(f"collateral.waiters: got {got}, allowed: at most {most}, fewer than limits.threads")
        return self


def trust(settings: KeyServiceSettings, policy: Policy) -> bytes | None:
    """The simulated root (DER) to verify evidence with; None is Intel's.

    Simulation takes three consents that agree: `simulated` and `simulated_root` in the configuration, and a
    development policy that pins that root. Raises `ConfigurationError` where one is missing or too many.
    """
    for name, given in (
        ("simulated_root", settings.simulated_root is not None),
        ("policy evidence.simulated_root_sha256", policy.simulated),
    ):
        if given != settings.simulated:
            got, allowed = ("one", "none without simulated = true") if given else ("none", "one with simulated = true")
            raise ConfigurationError.because(name, got, allowed)
    if settings.simulated_root is None:
        return None
    der = read_file(settings.simulated_root, field="simulated_root", limit=ROOT_LIMIT)
    if hashlib.sha256(der).digest() != policy.evidence.simulated_root_sha256:
        raise ConfigurationError.because("simulated_root", "another root", "the one that the policy pins")
    return der
