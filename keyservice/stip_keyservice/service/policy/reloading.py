"""Loads the policy of a running service: at its start, on SIGHUP, and where another replica has loaded a later one."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from stip_keyservice.home import Home
from stip_keyservice.service.auditlog import AuditLog, Trail
from stip_keyservice.service.config import KeyServiceSettings, trust
from stip_keyservice.service.policy.loading import InForce, record
from stip_keyservice.service.policy.signing import read, signature_path, unsigned
from stip_keyservice.service.state.store import Store
from stip_protocol.errors import StipError
from stip_protocol.runtime.files import read_ed25519
from stip_protocol.telemetry import AUDIT_SEQUENCE, POLICY_LOADS, POLICY_SERIAL, Telemetry

LOADED = "loaded"
Adopt = Callable[[InForce], None]
Stamp = tuple[int, int, int] | None


class PolicyLoader:
    """File and signature, read together, become what decisions are made by, or nothing changes. Safe between threads:
    one policy is loaded and adopted at a time."""

    def __init__(self, settings: KeyServiceSettings, home: Home, store: Store, telemetry: Telemetry) -> None:
        """Raises `ConfigurationError` where `policy_key` cannot be read."""
        self._settings, self._store, self._telemetry = settings, store, telemetry
        self._audit = AuditLog(store, home.service, observe=telemetry.gauge(AUDIT_SEQUENCE).set)
        given = settings.policy_key
        self._key = home.developer.public_key() if given is None else read_ed25519(given, field="policy_key")
        self._lock = threading.Lock()
        self._tried: tuple[Stamp, Stamp] | None = None
        """File and signature as they lay there when they were read last."""

    def load(self) -> InForce:
        """The policy as it lies there now; an entry in the audit log where it is another one than before.

        Raises `PolicyInvalid` (does not load, unsigned, a step back), `VersionUnsupported`, `SignatureInvalid`, and
        `ConfigurationError` where it does not agree with the rest of the configuration.
        """
        with self._lock:
            return self._counted()

    def reload(self, adopt: Adopt) -> None:
        """Load, and hand it to `adopt`. Raises as `load` does."""
        with self._lock:
            adopt(self._counted())

    def catch_up(self, adopt: Adopt) -> None:
        """Reload where the files are others than those that were read last: an outdated replica asks for it with every
        decision that it cannot make. What is refused is logged, once for each pair of files."""
        with self._lock:
            if self._stamps() == self._tried:
                return
            try:
                adopt(self._counted())
            except StipError as error:
                _log_refused(error)

    def _counted(self) -> InForce:
        try:
            loaded = self._load()
        except StipError as error:
            self._telemetry.counter(POLICY_LOADS).labels(result=error.code).inc()
            raise
        self._telemetry.counter(POLICY_LOADS).labels(result=LOADED).inc()
        self._telemetry.gauge(POLICY_SERIAL).set(loaded.policy.serial or 0)
        return loaded

    def _load(self) -> InForce:
        path, trail = self._settings.policy, Trail("policy_loaded", int(time.time()))
        self._tried = self._stamps()
        with self._audit.refusals(trail):
            found = read(path, self._key)
            trail.subject["detail"] = found.digest.hex()
            root_der = trust(self._settings, found.policy)
            # Whoever writes the policy could call it one for development: only the configuration can say so.
            if found.signature is None and not self._settings.simulated:
                raise unsigned(path)
            with self._store.write() as db:
                if record(db, found):
                    self._audit.append(db, trail)
        return InForce(found.policy, found.digest, root_der, signed=found.signature is not None)

    def _stamps(self) -> tuple[Stamp, Stamp]:
        path = self._settings.policy
        return _stamp(path), _stamp(signature_path(path))


def _stamp(path: Path) -> Stamp:
    """Another one for every file that is put there; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _log_refused(error: StipError) -> None:
    log = structlog.get_logger()
    log.error("policy refused, the one before stays in force", code=error.code, reason=error.message)


async def reload_on(hangup: asyncio.Event, loader: PolicyLoader, adopt: Adopt) -> None:
    """For ever: whenever `hangup` is set, load the policy again and hand it to `adopt`.

    One that is refused is logged, and the one before stays in force. Whatever comes while one is being loaded loads it
    once more: the last file that lay there wins.
    """
    while True:
        await hangup.wait()
        hangup.clear()
        try:
            await asyncio.to_thread(loader.reload, adopt)
        except StipError as error:
            _log_refused(error)
