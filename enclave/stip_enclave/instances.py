"""The instances this enclave may open, and those it has opened."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import grpc.aio
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from stip_enclave.config import InstanceSettings, Limits
from stip_enclave.decode import Decoder
from stip_enclave.head import Head
from stip_enclave.link import Link
from stip_enclave.tables import Tables, open_part
from stip_protocol.errors import ConfigurationError, InstanceRefused, ManifestMismatch, PresetRefused
from stip_protocol.keys import vocabulary_key
from stip_protocol.manifest import Manifest
from stip_protocol.release import Grant
from stip_protocol.telemetry import Telemetry

SERVED_PRESETS = ("paper", "hardened")
SERVED_OUTPUTS = ("hidden", "top")
Connect = Callable[[bytes], grpc.aio.Channel]
"""A channel to the gateway under a link certificate (DER)."""


class Instance:
    """One instance: its signed manifest at first, its tables and links once a grant has opened it."""

    def __init__(
        self, folder: Path, developer: Ed25519PublicKey, connect: Connect, limits: Limits, telemetry: Telemetry
    ) -> None:
        """Raises `SignatureInvalid`, `ManifestMismatch` or `VersionUnsupported` for a bad manifest, and
        `PresetRefused` for a preset or a form of output that this enclave does not serve.
        """
        self.manifest, self.digest = Manifest.load(folder / "manifest.json", developer)
        for name, served in (("preset", SERVED_PRESETS), ("output", SERVED_OUTPUTS)):
            if (got := getattr(self.manifest, name)) not in served:
                refused = f"{got}, not served by this enclave yet"
                raise PresetRefused.because(f"manifest {name}", refused, ", ".join(served))
        self._folder, self._connect, self._limits, self._telemetry = folder, connect, limits, telemetry
        self._opened: tuple[Tables, Decoder] | None = None
        self._loading = asyncio.Lock()
        self._linking = asyncio.Lock()
        self._links: list[Link] = []

    @property
    def loaded(self) -> bool:
        return self._opened is not None

    @property
    def tables(self) -> Tables:
        """The opened tables. Raises `InstanceRefused` before `load`."""
        return self._require_opened()[0]

    async def load(self, grant: Grant) -> None:
        """Open the enclave part, in a thread. Raises `SealedPartInvalid` or `ManifestMismatch`, and stays unloaded."""
        async with self._loading:
            if self._opened is None:
                began = time.perf_counter()
                self._opened = await asyncio.to_thread(self._open, grant)
                seconds = round(time.perf_counter() - began, 3)
                structlog.get_logger().info("instance opened", instance=self.manifest.instance, seconds=seconds)

    async def link(self, link_certificate: bytes) -> Link:
        """The link that takes new sessions; a new one where there is none or the last one was lost or drains."""
        tables, decoder = self._require_opened()
        async with self._linking:
            over = [link for link in self._links if not link.usable and not link.sessions]
            self._links = [link for link in self._links if link not in over]
            await asyncio.gather(*(link.stop() for link in over))
            for link in self._links:
                if link.usable:
                    return link
            link = await Link.connect(
                self._connect(link_certificate),
                self.manifest,
                self.digest,
                tables.rows,
                decoder.deliver,
                self._limits,
                self._telemetry,
            )
            self._links.append(link)
            return link

    async def stop(self) -> None:
        """End all links."""
        await asyncio.gather(*(link.stop() for link in self._links))

    def _require_opened(self) -> tuple[Tables, Decoder]:
        if self._opened is None:
            raise InstanceRefused(f"instance {self.manifest.instance}: not opened by a grant yet")
        return self._opened

    def _open(self, grant: Grant) -> tuple[Tables, Decoder]:
        manifest = self.manifest
        part = open_part(self._folder / "enclave", manifest, self.digest, grant)
        head = None
        if part.head is not None:
            head = Head(part.head, part.head_bias, manifest.dtype, logit_cap=manifest.logit_cap)
        true_ids = None
        if manifest.output == "top":
            if grant.vocabulary_seed is None:
                raise ManifestMismatch.because("grant vocabulary_seed", "none", "one: this instance's head is outside")
            true_ids = vocabulary_key(grant.vocabulary_seed, manifest.vocabulary).index.astype("i4")
        return Tables(part), Decoder(head, true_ids, self._telemetry)


class Instances:
    """All configured instances by id."""

    def __init__(
        self,
        settings: tuple[InstanceSettings, ...],
        developer: Ed25519PublicKey,
        connect: Connect,
        limits: Limits,
        telemetry: Telemetry,
    ) -> None:
        """Raises `ConfigurationError` for one instance in two directories, and what `Instance` raises."""
        self._instances: dict[str, Instance] = {}
        for one in settings:
            instance = Instance(one.directory, developer, connect, limits, telemetry)
            if instance.manifest.instance in self._instances:
                raise ConfigurationError.because("instances", f"{instance.manifest.instance} twice", "each once")
            self._instances[instance.manifest.instance] = instance

    def find(self, instance: str) -> Instance:
        """Raises `InstanceRefused` for one that is not configured."""
        found = self._instances.get(instance)
        if found is None:
            raise InstanceRefused.because("instance", "another one", f"the {len(self._instances)} configured here")
        return found

    async def stop(self) -> None:
        """End all links of all instances."""
        await asyncio.gather(*(instance.stop() for instance in self._instances.values()))
