"""Bundles and leases that were released, so that a user's next session needs no second release.

Kept by the digest of the signed delegation: who presents the same delegation is, to the key service too, the same
user with the same word. Nothing is kept on disk.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from stip_enclave.config import Limits
from stip_enclave.guards import Rate
from stip_enclave.instances import Instance
from stip_enclave.lease import LeaseAccount
from stip_enclave.release import ReleaseClient
from stip_protocol.documents import Signed
from stip_protocol.errors import LeaseError, Overloaded
from stip_protocol.release import Grant
from stip_protocol.telemetry import LEASE_AGE, Telemetry

RETRY_SECONDS = 5.0
"""What a client is told to wait where every lease that is kept is in use."""


class Accounts:
    """The lease accounts of this enclave."""

    def __init__(self, releases: ReleaseClient, limits: Limits, telemetry: Telemetry) -> None:
        self._releases, self._limits = releases, limits
        self._rate = Rate("releases", limits.releases_per_second)
        self._accounts: dict[bytes, LeaseAccount] = {}
        self._locks: dict[bytes, tuple[asyncio.Lock, int]] = {}
        telemetry.gauge(LEASE_AGE).set_function(self._oldest)

    async def get(self, delegation: bytes, instance: Instance) -> LeaseAccount:
        """The account of a delegation (signed, checked by `EnclaveIdentity.delegation`), with its instance loaded.

        Asks the key service where there is none that can go on. Raises what it refuses with.
        """
        digest = Signed.from_bytes(delegation).digest()
        async with self._locked(digest):
            account = self._accounts.get(digest)
            if account is not None:
                try:
                    await account.refresh()
                except LeaseError:
                    account = None  # a lease that ran out beyond renewal: the delegation may still get another one
            grant = None
            if account is None:
                account, grant = await self._release(delegation, instance)
                self._make_room()
                self._accounts[digest] = account
            await self._load(delegation, instance, grant, digest)
            return account

    async def stop(self) -> None:
        """Renew nothing more."""
        await asyncio.gather(*(account.stop() for account in self._accounts.values()))

    async def _release(self, delegation: bytes, instance: Instance) -> tuple[LeaseAccount, Grant | None]:
        self._rate.take()
        manifest, rows = instance.manifest, self._limits.lease_rows
        bundle = await self._releases.bundle(delegation, manifest.instance, instance.digest, manifest.epoch, rows)
        held = self._releases.held(bundle.lease, bundle.link_certificate, bundle)
        account = LeaseAccount(held, self._releases, heartbeat_tokens=bundle.heartbeat_tokens, chunk=rows)
        return account, None if bundle.grant is None else Grant.from_bytes(bundle.grant)

    async def _load(self, delegation: bytes, instance: Instance, grant: Grant | None, digest: bytes) -> None:
        if instance.loaded:
            return
        if grant is None:
            self._rate.take()
            manifest = instance.manifest
            grant = await self._releases.grant(delegation, manifest.instance, instance.digest, manifest.epoch)
            await instance.load(grant)
            return
        try:
            await instance.load(grant)
        except BaseException:
            # The grant came with the bundle and is not kept: the next attempt asks for both.
            self._accounts.pop(digest, None)
            raise

    def _make_room(self) -> None:
        for digest, account in list(self._accounts.items()):
            if not account.in_use and (account.ended is not None or account.expired):
                del self._accounts[digest]
        if len(self._accounts) >= self._limits.accounts:
            idle = next((digest for digest, account in self._accounts.items() if not account.in_use), None)
            if idle is None:
                error = Overloaded.because("leases", len(self._accounts) + 1, f"at most {self._limits.accounts}")
                error.retry_after = RETRY_SECONDS
                raise error
            del self._accounts[idle]

    def _oldest(self) -> float:
        now = time.monotonic()
        accounts = list(self._accounts.values())  # the metrics server asks from a thread of its own
        return max((now - account.began for account in accounts if account.in_use), default=0.0)

    @asynccontextmanager
    async def _locked(self, digest: bytes) -> AsyncIterator[None]:
        """One release at a time for one delegation; the lock is forgotten with its last user."""
        lock, users = self._locks.get(digest, (asyncio.Lock(), 0))
        self._locks[digest] = lock, users + 1
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks[digest]
            if users == 1:
                del self._locks[digest]
            else:
                self._locks[digest] = lock, users - 1
