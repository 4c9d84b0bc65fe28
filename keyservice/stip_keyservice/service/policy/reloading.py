"""Loads the policy of a running service: at its start, and again on SIGHUP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from stip_keyservice.home import Home
from stip_keyservice.service.auditlog import AuditLog, Trail
from stip_keyservice.service.config import KeyServiceSettings, trust
from stip_keyservice.service.policy.loading import InForce, record
from stip_keyservice.service.policy.signing import read, unsigned
from stip_keyservice.service.state.store import Store
from stip_protocol.errors import StipError
from stip_protocol.runtime.files import read_ed25519
from stip_protocol.telemetry import AUDIT_SEQUENCE, POLICY_LOADS, POLICY_SERIAL, Telemetry

LOADED = "loaded"


class PolicyLoader:
    """File and signature, read together, become what decisions are made by, or nothing changes."""

    def __init__(self, settings: KeyServiceSettings, home: Home, store: Store, telemetry: Telemetry) -> None:
        """Raises `ConfigurationError` where `policy_key` cannot be read."""
        self._settings, self._store, self._telemetry = settings, store, telemetry
        self._audit = AuditLog(store, home.service, observe=telemetry.gauge(AUDIT_SEQUENCE).set)
        given = settings.policy_key
        self._key = home.developer.public_key() if given is None else read_ed25519(given, field="policy_key")

    def load(self) -> InForce:
        """The policy as it lies there now; an entry in the audit log where it is another one than before.

        Raises `PolicyInvalid` (does not load, unsigned, a step back), `VersionUnsupported`, `SignatureInvalid`, and
        `ConfigurationError` where it does not agree with the rest of the configuration.
        """
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


async def reload_on(hangup: asyncio.Event, loader: PolicyLoader, adopt: Callable[[InForce], None]) -> None:
    """For ever: whenever `hangup` is set, load the policy again and hand it to `adopt`.

    One that is refused is logged, and the one before stays in force. Whatever comes while one is being loaded loads it
    once more: the last file that lay there wins.
    """
    log = structlog.get_logger()
    while True:
        await hangup.wait()
        hangup.clear()
        try:
            found = await asyncio.to_thread(loader.load)
        except StipError as error:
            log.error("policy refused, the one before stays in force", code=error.code, reason=error.message)
        else:
            await asyncio.to_thread(adopt, found)
