"""The instances this enclave may open, and those it has opened."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from stip_enclave.alone import Alone
from stip_enclave.config import InstanceSettings, Limits
from stip_enclave.decode import Decoder
from stip_enclave.decoding import Decoding, TokenStream
from stip_enclave.head import Head
from stip_enclave.lease import LeaseAccount
from stip_enclave.links import Connect, Links
from stip_enclave.outbox import Encoding
from stip_enclave.stepwise import Stepwise
from stip_enclave.substitution import Substitution
from stip_enclave.tables import Tables, open_part, open_substitution, require_seed
from stip_protocol.errors import ConfigurationError, InstanceRefused, PresetRefused
from stip_protocol.keys import vocabulary_key
from stip_protocol.manifest import Manifest
from stip_protocol.release import Grant
from stip_protocol.telemetry import Telemetry

SERVED = {"paper": "top", "hardened": "hidden", "throughput": "ids"}
"""Forms of output by preset."""


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """What a grant has opened."""

    encoding: Encoding
    decoder: Decoder
    links: Links
    substitution: Substitution | None
    """Where the server decodes alone."""


class Instance:
    """One instance: its signed manifest at first, its tables and links once a grant has opened it."""

    def __init__(
        self, folder: Path, developer: Ed25519PublicKey, connect: Connect, limits: Limits, telemetry: Telemetry
    ) -> None:
        """Raises `SignatureInvalid`, `ManifestMismatch` or `VersionUnsupported` for a bad manifest, and
        `PresetRefused` for a preset or a form of output that this enclave does not serve.
        """
        self.manifest, self.digest = Manifest.load(folder / "manifest.json", developer)
        preset, output = self.manifest.preset, self.manifest.output
        if preset not in SERVED:
            raise PresetRefused.because("manifest preset", preset, ", ".join(SERVED))
        if output != SERVED[preset]:
            raise PresetRefused.because("manifest output", output, f"{SERVED[preset]}, as the preset {preset} has it")
        self._folder, self._connect, self._limits, self._telemetry = folder, connect, limits, telemetry
        self._opened: Opened | None = None
        self._loading = asyncio.Lock()

    @property
    def loaded(self) -> bool:
        return self._opened is not None

    @property
    def opened(self) -> Opened:
        """Raises `InstanceRefused` before `load`."""
        if self._opened is None:
            raise InstanceRefused(f"instance {self.manifest.instance}: not opened by a grant yet")
        return self._opened

    @property
    def encoding(self) -> Encoding:
        """How its ids leave. Raises as `opened`."""
        return self.opened.encoding

    def decoding(self, stream: TokenStream, account: LeaseAccount) -> Decoding:
        """A session's way of decoding. Raises as `opened`."""
        opened = self.opened
        if opened.substitution is None:
            return Stepwise(stream, opened.links, account, self._limits)
        return Alone(stream, opened.links, account, self._limits, opened.substitution)

    async def load(self, grant: Grant) -> None:
        """Open the enclave part, in a thread. Raises `SealedPartInvalid` or `ManifestMismatch`, and stays unloaded."""
        async with self._loading:
            if self._opened is None:
                began = time.perf_counter()
                self._opened = await asyncio.to_thread(self._open, grant)
                seconds = round(time.perf_counter() - began, 3)
                structlog.get_logger().info("instance opened", instance=self.manifest.instance, seconds=seconds)

    async def stop(self) -> None:
        """End all links."""
        if self._opened is not None:
            await self._opened.links.stop()

    def _open(self, grant: Grant) -> Opened:
        manifest = self.manifest
        if manifest.output == "ids":
            substitution = open_substitution(manifest, self.digest, grant)
            return self._linked(substitution, Decoder(None, None, self._telemetry), substitution)
        part = open_part(self._folder / "enclave", manifest, self.digest, grant)
        head = None
        if part.head is not None:
            head = Head(part.head, part.head_bias, manifest.dtype, logit_cap=manifest.logit_cap)
        true_ids = None
        if manifest.output == "top":
            true_ids = vocabulary_key(require_seed(grant), manifest.vocabulary).index.astype("i4")
        return self._linked(Tables(part), Decoder(head, true_ids, self._telemetry), None)

    def _linked(self, encoding: Encoding, decoder: Decoder, substitution: Substitution | None) -> Opened:
        links = Links(
            self._connect, self.manifest, self.digest, encoding, decoder.deliver, self._limits, self._telemetry
        )
        return Opened(encoding, decoder, links, substitution)


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
