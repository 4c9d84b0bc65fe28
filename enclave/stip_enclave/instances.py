"""The instances this enclave may open, and those it has opened."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from stip_protocol.errors import ConfigurationError, InstanceRefused, PresetRefused, StipError
from stip_protocol.keys import vocabulary_key
from stip_protocol.manifest import Manifest
from stip_protocol.release import EPOCHS_LIMIT, Grant
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
    """One epoch of an instance: its signed manifest at first, its tables and links once a grant has opened it."""

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
                manifest = self.manifest
                structlog.get_logger().info(
                    "instance opened", instance=manifest.instance, epoch=manifest.epoch, seconds=seconds
                )

    async def close(self, unless: Callable[[], bool] = lambda: False) -> None:
        """End all links and forget what the grant has opened: only a new one opens the instance again. Idempotent.

        `unless` is asked at the last moment: one that is being opened is waited for, and may be needed by then.
        """
        async with self._loading:
            if unless():
                return
            opened, self._opened = self._opened, None
        if opened is not None:
            await opened.links.stop()
            manifest = self.manifest
            structlog.get_logger().info("instance closed", instance=manifest.instance, epoch=manifest.epoch)

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
    """The configured instances by id, each with the epochs that are here."""

    def __init__(
        self,
        settings: Sequence[InstanceSettings],
        developer: Ed25519PublicKey,
        connect: Connect,
        limits: Limits,
        telemetry: Telemetry,
    ) -> None:
        """Raises `ConfigurationError` for one epoch in two directories and for too many epochs of one instance, and
        what `Instance` raises.
        """
        self._read = partial(Instance, developer=developer, connect=connect, limits=limits, telemetry=telemetry)
        self._folders: dict[Path, Instance] = {}
        self._leaving: set[Instance] = set()
        """No longer configured: their sessions go on."""
        for one in settings:
            self._add(one.directory)

    def find(self, instance: str) -> Mapping[int, Instance]:
        """The epochs of an instance. Raises `InstanceRefused` for one that is not configured."""
        found = {each.manifest.epoch: each for each in self._folders.values() if each.manifest.instance == instance}
        if not found:
            known = {each.manifest.instance for each in self._folders.values()}
            raise InstanceRefused.because("instance", "another one", f"the {len(known)} configured here")
        return found

    async def reread(self, settings: Sequence[InstanceSettings]) -> None:
        """Take another list of directories: new ones are checked as at start, and one that is refused is left out; what
        is no longer listed takes no new sessions; the others stay as they are.

        Raises `ConfigurationError` at the end where a directory was refused.
        """
        log, wanted = structlog.get_logger(), [one.directory for one in settings]
        for folder in [folder for folder in self._folders if folder not in wanted]:
            instance = self._folders.pop(folder)
            self._leaving.add(instance)
            log.info("instance leaves", instance=instance.manifest.instance, epoch=instance.manifest.epoch)
        refused = []
        for folder in [folder for folder in dict.fromkeys(wanted) if folder not in self._folders]:
            try:
                instance = await asyncio.to_thread(self._read, folder)
                self._admit(folder, instance)
            except StipError as error:
                refused.append(error)
                log.error("instance refused", directory=str(folder), code=error.code, detail=error.message)
            else:
                log.info("instance joins", instance=instance.manifest.instance, epoch=instance.manifest.epoch)
        if refused:
            raise ConfigurationError(f"instances: {len(refused)} refused, the first with: {refused[0].message}")

    async def close(self, instance: str, epoch: int | None) -> None:
        """Forget what grants have opened of one epoch, or of all."""
        each = [one for one in self._everything() if one.manifest.instance == instance]
        await asyncio.gather(*(one.close() for one in each if epoch in (None, one.manifest.epoch)))

    async def close_all_but(self, used: Callable[[], Collection[Instance]]) -> None:
        """Forget what grants have opened, where no lease stands behind it any more: `used` says where one does."""
        unused = [one for one in self._everything() if one not in used()]
        await asyncio.gather(*(one.close(partial(self._in, one, used)) for one in unused))
        self._leaving.intersection_update(used())

    @staticmethod
    def _in(one: Instance, used: Callable[[], Collection[Instance]]) -> bool:
        return one in used()

    async def stop(self) -> None:
        """End all links of all instances."""
        await asyncio.gather(*(one.close() for one in self._everything()))

    def _everything(self) -> list[Instance]:
        return [*self._folders.values(), *self._leaving]

    def _add(self, folder: Path) -> None:
        self._admit(folder, self._read(folder))

    def _admit(self, folder: Path, instance: Instance) -> None:
        manifest = instance.manifest
        epochs = [one.manifest.epoch for one in self._folders.values() if one.manifest.instance == manifest.instance]
        if manifest.epoch in epochs:
            twice = f"epoch {manifest.epoch} of {manifest.instance} twice"
            raise ConfigurationError.because("instances", twice, "each epoch once")
        if len(epochs) == EPOCHS_LIMIT:
            raise ConfigurationError.because("instances", f"another epoch of {manifest.instance}", EPOCHS_LIMIT)
        self._folders[folder] = instance
