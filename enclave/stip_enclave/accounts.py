"""Bundles and leases that were released, so that a user's next session needs no second release.

Kept by the digest of the signed delegation: who presents the same delegation is, to the key service too, the same
user with the same word. Nothing is kept on disk.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from stip_enclave.config import Limits
from stip_enclave.guards import Rate
from stip_enclave.instances import Instance, Instances
from stip_enclave.lease import LeaseAccount
from stip_enclave.release import ReleaseClient
from stip_protocol.documents import Signed
from stip_protocol.errors import InstanceRefused, LeaseRevoked, Overloaded, StipError
from stip_protocol.release import Grant
from stip_protocol.telemetry import LEASE_AGE, Telemetry

RETRY_SECONDS = 5.0
"""What a client is told to wait where every lease that is kept is in use."""
EARLY_LIMIT = 4096
"""Revoked leases that are remembered without being held."""
TIDY_SECONDS = 10.0
"""How often leases that have ended are forgotten, and with the last of an instance what its grant has opened."""


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """A lease, and the epoch of the instance that it is for."""

    account: LeaseAccount
    instance: Instance

    @property
    def idle(self) -> bool:
        return not self.account.in_use

    @property
    def standing(self) -> bool:
        return self.account.in_use or (self.account.ended is None and not self.account.expired)


class Accounts:
    """The lease accounts of this enclave."""

    def __init__(self, releases: ReleaseClient, instances: Instances, limits: Limits, telemetry: Telemetry) -> None:
        self._releases, self._instances, self._limits = releases, instances, limits
        self._rate = Rate("releases", limits.releases_per_second)
        self._held: dict[bytes, _Held] = {}
        self._former: set[_Held] = set()
        """Superseded: a newer one is kept for the delegation, and their sessions go on."""
        self._early: dict[bytes, None] = {}
        """Leases that were revoked and are not here: a notice may overtake the bundle that it is about."""
        self._locks: dict[bytes, tuple[asyncio.Lock, int]] = {}
        """Of delegations that sessions are being opened under, with their number: what they need is not given up."""
        self.holding, self.empty = asyncio.Event(), asyncio.Event()
        """Whether there are any leases; each is set while the other is not."""
        self.empty.set()
        telemetry.gauge(LEASE_AGE).set_function(self._oldest)

    @property
    def audit_head(self) -> bytes:
        """The newest signed head of the key service's audit log."""
        return self._releases.audit_head

    async def get(self, delegation: bytes, instance: str) -> tuple[LeaseAccount, Instance]:
        """The account of a delegation (signed, checked by `EnclaveIdentity.delegation`), and the epoch of its instance
        that it is for, opened.

        Asks the key service where there is none that new sessions may use. Raises what it refuses with.
        """
        digest, epochs = Signed.from_bytes(delegation).digest(), self._instances.find(instance)
        async with self._locked(digest):
            held, grant = self._held.get(digest), None
            if held is None or not await self._usable(held, epochs):
                new, grant = await self._release(delegation, instance, epochs)
                if new.instance not in self._instances.find(instance).values():
                    raise InstanceRefused(
                        f"instance: its epoch {new.instance.manifest.epoch} has just left this enclave"
                    )
                self._make_room(digest)
                self._keep(digest, new)
                held = new
            await self._open(delegation, held, grant, digest)
            return held.account, held.instance

    def confirm(self) -> None:
        """Have the key service asked now about every lease that is in use."""
        for held in self._everything():
            held.account.confirm()

    async def revoke(self, handles: Collection[bytes], instance: str | None, epoch: int | None) -> int:
        """End the leases named at once, and their sessions. With `instance`, it or one `epoch` of it is closed: every
        lease for it ends, and what its grant has opened is forgotten. Returns how many have ended.
        """
        ended, named = 0, frozenset(handles)
        known = {held.account.held.lease.handle for held in self._everything()}
        for handle in handles:  # a new stream says all of them again
            if handle not in known:
                self._early.pop(handle, None)
                self._early[handle] = None
        while len(self._early) > EARLY_LIMIT:
            del self._early[next(iter(self._early))]
        for held in self._everything():
            manifest = held.instance.manifest
            closed = instance == manifest.instance and epoch in (None, manifest.epoch)
            if held.account.ended is None and (closed or held.account.held.lease.handle in named):
                held.account.end(LeaseRevoked("lease: the key service has revoked it"))
                ended += 1
        if instance is not None:
            await self._instances.close(instance, epoch)
        self._forget()
        return ended

    def supersede(self, handles: Collection[bytes]) -> None:
        """The epoch of the leases named drains."""
        named = frozenset(handles)
        for held in self._everything():
            if held.account.held.lease.handle in named:
                held.account.superseded = True

    async def keep_tidy(self) -> None:
        """For ever: forget leases that have ended, and what was opened of instances that no lease is for any more."""
        while True:
            await asyncio.sleep(TIDY_SECONDS)
            await self.tidy()

    async def tidy(self) -> None:
        """One round of `keep_tidy`."""
        self._forget()
        await self._instances.close_all_but(lambda: {held.instance for held in self._everything()})

    async def stop(self) -> None:
        """Renew nothing more."""
        await asyncio.gather(*(held.account.stop() for held in self._everything()))

    async def _usable(self, held: _Held, epochs: Mapping[int, Instance]) -> bool:
        """Whether a new session may run under a lease. One that cannot be renewed is no reason to refuse a session: the
        key service may release another one for the delegation, and says why where it does not.
        """
        account, here = held.account, held.instance in epochs.values()
        if not here or (account.superseded and len(epochs) > 1):
            return False
        try:
            await account.refresh()
        except StipError:
            return False
        # Over the renewal it may have heard that the epoch drains.
        return not (account.superseded and len(epochs) > 1)

    async def _release(
        self, delegation: bytes, instance: str, epochs: Mapping[int, Instance]
    ) -> tuple[_Held, Grant | None]:
        self._rate.take()
        rows, digests = self._limits.lease_rows, {epoch: one.digest for epoch, one in epochs.items()}
        bundle = await self._releases.bundle(delegation, instance, digests, rows)
        lease = self._releases.held(bundle.lease, bundle.link_certificate, bundle)
        if lease.lease.handle in self._early:
            raise LeaseRevoked("lease: the key service has revoked it already")
        account = LeaseAccount(lease, self._releases, heartbeat_tokens=bundle.heartbeat_tokens, chunk=rows)
        grant = None if bundle.grant is None else Grant.from_bytes(bundle.grant)
        return _Held(account, epochs[bundle.epoch]), grant

    async def _open(self, delegation: bytes, held: _Held, grant: Grant | None, digest: bytes) -> None:
        """Open the instance, where it is not yet. Where that fails, the next attempt asks for lease and grant again: a
        grant that came with its bundle is not kept."""
        instance = held.instance
        if instance.loaded:
            return
        manifest = instance.manifest
        try:
            if grant is None:
                self._rate.take()
                grant = await self._releases.grant(delegation, manifest.instance, manifest.epoch, instance.digest)
            await instance.load(grant)
            if held.account.ended is not None:  # while the grant was on its way
                raise held.account.ended
        except BaseException:
            if self._held.get(digest) is held:
                del self._held[digest]
            raise

    def _keep(self, digest: bytes, held: _Held) -> None:
        before = self._held.get(digest)
        if before is not None and before.account.in_use:
            self._former.add(before)
        self._held[digest] = held
        self._count()

    def _forget(self) -> None:
        """Drop what no session may use any more."""
        self._former = {held for held in self._former if held.account.in_use}
        self._held = {digest: held for digest, held in self._held.items() if held.standing or digest in self._locks}
        self._count()

    def _count(self) -> None:
        some, none = (self.holding, self.empty) if self._everything() else (self.empty, self.holding)
        some.set()
        none.clear()

    def _make_room(self, wanted: bytes) -> None:
        self._forget()
        if wanted not in self._held and len(self._held) >= self._limits.accounts:
            idle = next((each for each, held in self._held.items() if each not in self._locks and held.idle), None)
            if idle is None:
                error = Overloaded.because("leases", len(self._held) + 1, f"at most {self._limits.accounts}")
                error.retry_after = RETRY_SECONDS
                raise error
            del self._held[idle]

    def _everything(self) -> list[_Held]:
        return [*self._held.values(), *self._former]

    def _oldest(self) -> float:
        now = time.monotonic()
        accounts = [held.account for held in self._everything()]  # the metrics server asks from a thread of its own
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
