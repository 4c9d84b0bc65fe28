"""Challenge, release, renewal: decisions of `release` and `leases`, carried out against the store.

Blocking, and safe from any number of threads and processes at once: what must be atomic is one exclusive
transaction. Every decision leaves an entry in the audit log, in the transaction that carries it out.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import structlog
from sqlalchemy import Connection

from stip_keyservice.home import Home
from stip_keyservice.service import canaries, instances, leases, nonces, release, revocations, users, watching
from stip_keyservice.service.auditlog import AuditLog, Trail
from stip_keyservice.service.clock import ServiceClock
from stip_keyservice.service.instances import Epoch, Instance
from stip_keyservice.service.leases import LeaseRecord
from stip_keyservice.service.linkca import issue_link_certificate, read_link_key
from stip_keyservice.service.nonces import Nonces
from stip_keyservice.service.policy import Policy
from stip_keyservice.service.policy.loading import InForce, require_current
from stip_keyservice.service.ratelimit import LinkKeys
from stip_keyservice.service.release import Applicant, EnclaveFacts, Request
from stip_keyservice.service.state.store import Store
from stip_keyservice.service.vault import open_vault
from stip_keyservice.service.watching import Change, Standing
from stip_protocol.documents import Signed
from stip_protocol.errors import (
    AttestationError,
    FrameInvalid,
    InstanceRefused,
    LeaseForeign,
    LeaseRevoked,
    NonceRefused,
    PolicyOutdated,
    ReleaseError,
    SignatureInvalid,
)
from stip_protocol.release import (
    DER_LIMIT,
    HEARTBEAT_LIMIT,
    SIGNATURE_LIMIT,
    AuditHead,
    Bundle,
    Claims,
    Grant,
    Heartbeat,
    Renewal,
    Watch,
    open_heartbeat,
    open_watch,
    seal,
    service_id,
)
from stip_protocol.telemetry import AUDIT_SEQUENCE, DECISIONS, RELEASES, Telemetry

T = TypeVar("T")


@dataclass(frozen=True)
class Challenge:
    nonce: bytes
    seconds: int
    """Its life."""
    service: bytes
    """Who asks: the key service's id."""


@dataclass(frozen=True)
class _Issued:
    """What a granted release has to seal."""

    in_force: InForce
    instance: Instance
    epoch: Epoch
    record: LeaseRecord | None
    """The lease of a bundle; None for a grant."""
    grant: Grant | None = field(repr=False)
    """None in the bundle for a shared instance."""
    canaries: tuple[bytes, ...] = field(repr=False)
    head: Signed


class Issuer:
    """The key service without its transport."""

    def __init__(
        self,
        home: Home,
        store: Store,
        policy: Policy,
        telemetry: Telemetry,
        *,
        root_der: bytes | None = None,
        clock: Callable[[], float] = time.time,
        refusals_in_full: int = 8,
        collateral: Callable[[bytes], bytes] | None = None,
        catch_up: Callable[[], None] = lambda: None,
    ) -> None:
        """`root_der` is the simulated root that a development policy pins; None in production. `refusals_in_full`: of
        one peer in a minute, see `strangers`. `collateral`: of the platform that made a quote, to judge it with; None
        judges it with what came along. `catch_up` reads the policy again, and calls `adopt` where there is another."""
        self._home, self._store, self._telemetry = home, store, telemetry
        self._in_force, self._collateral = InForce(policy, policy.digest(), root_der), collateral
        self._catch_up = catch_up
        self._service = service_id(home.service.public_key())
        self._nonces, self._vault = Nonces(home.service), open_vault(home)
        entries = telemetry.gauge(AUDIT_SEQUENCE)
        self._audit = AuditLog(
            store, home.service, observe=entries.set, decided=self._decided, refusals_in_full=refusals_in_full
        )
        self.clock = ServiceClock(lambda: self._audit.last_at, self._audit.refresh, clock)
        self.link_keys = LinkKeys()
        entries.set(self._audit.length())
        self._audit.refresh()

    def adopt(self, in_force: InForce) -> None:
        """Decide by another policy from the next decision on."""
        self._in_force = in_force

    def outdated(self) -> str | None:
        """Why nothing is decided until this replica has read its policy again; None where it is the one of today."""
        try:
            self._by_policy_of_today(self._require_current)
        except PolicyOutdated as refusal:
            return refusal.message
        return None

    def challenge(self) -> Challenge:
        """A fresh nonce. Raises `ClockRefused`; blocks only where the clock is behind (`clock.behind`)."""
        seconds = self._in_force.policy.release.nonce_seconds
        return Challenge(self._nonces.issue(now=self.clock.require(), seconds=seconds), seconds, self._service)

    def release(self, request: Request, *, peer: str | None = None) -> tuple[bytes, bytes]:
        """(sealed, signature) of a `Bundle` or a `Grant`.

        Raises what `release` and `nonces` raise, `ClockRefused`, `LeakageRefused`, `BudgetSpent`, and where the service
        has collateral of its own `CollateralUnavailable`; `PolicyOutdated`. The claims' nonce is spent in any case, in
        the one transaction that also holds the decision and its entry.
        """
        claims = release.read_claims(request.claims)
        trail = Trail("release", self.clock.machine(), {"kind": claims.kind, "instance": claims.instance}, peer)
        with self._audit.refusals(trail, also=lambda db: self._burn(db, claims, trail)):
            trail.now = self.clock.require()
            applicant, issued = self._by_policy_of_today(
                lambda in_force: self._decide(request, claims, in_force, trail)
            )
        if issued.record is not None:
            self.link_keys.note(issued.record.handle, issued.record.link_key)
        with self._telemetry.stage("seal").time():
            sealed = self._seal(applicant, issued, trail.now)
        self._granted(claims.kind)
        return sealed

    def renew(self, heartbeat: bytes, signature: bytes, *, peer: str | None = None) -> bytes:
        """A signed `Renewal` for a heartbeat.

        Raises `SignatureInvalid` (not the lease's link key), `LeaseRevoked`, `UserRefused`, `InstanceRefused`,
        `PolicyOutdated`, what `leases.find` and `leases.renew` raise, and what `Policy.require_running` does: the
        policy of today decides, not the one of the release.
        """
        _require_short(heartbeat=(heartbeat, HEARTBEAT_LIMIT), signature=(signature, SIGNATURE_LIMIT))
        handle = Heartbeat.from_bytes(heartbeat).handle
        trail = Trail("renewal", self.clock.machine(), {"handle": handle}, peer)
        with self._audit.refusals(trail):
            return self._by_policy_of_today(lambda in_force: self._renew(handle, heartbeat, signature, in_force, trail))

    def watch(self, watch: bytes, signature: bytes, link_key: bytes) -> Watch:
        """What a watching enclave asks for, verified; its nonce is spent. `link_key` is DER.

        Raises `FrameInvalid`, `RequestInvalid` (a key that cannot be used), `SignatureInvalid` (another key than the
        one that is named), `NonceRefused`, `LeaseForeign` (a key that no lease on record names).
        """
        _require_short(
            watch=(watch, HEARTBEAT_LIMIT), signature=(signature, SIGNATURE_LIMIT), link_key=(link_key, DER_LIMIT)
        )
        asked = open_watch(watch, signature, read_link_key(link_key))
        if not hmac.compare_digest(hashlib.sha256(link_key).digest(), asked.link_key):
            raise SignatureInvalid("watch: not signed by the link key that it names")
        now = self.clock.require()
        seconds = self._in_force.policy.release.nonce_seconds
        expires = self._nonces.require(asked.nonce, now=now, seconds=seconds)
        with self._store.read() as db:  # first: a stranger, whose key proves nothing, writes nothing either
            known = leases.known_link_key(db, asked.link_key)
        if not known:
            raise LeaseForeign.because("watch link_key", "a key that no lease names", "the link key of a lease")
        with self._store.write() as db:
            nonces.spend(db, asked.nonce, expires=expires, now=now)
        return asked

    def standings(self, link_keys: Collection[bytes]) -> Mapping[bytes, Standing]:
        """What there is to hear for watching link keys."""
        grace = self._in_force.policy.lease.grace_seconds
        with self._store.read() as db:
            return watching.standings(db, link_keys, now=self.clock.reading(), grace=grace)

    def notice(self, change: Change, nonce: bytes, sequence: int) -> bytes:
        """The signed `Notice` of a change."""
        return Signed.sign(change.notice(nonce, sequence), self._home.service).to_bytes()

    def write_folded(self) -> None:
        """Write what was folded of refusals in minutes that ended."""
        self._audit.write_folded(now=self.clock.machine())

    def close(self) -> None:
        """Write what was folded of refusals and not written yet."""
        self._audit.close(now=self.clock.machine())

    def refused_instances(self) -> Mapping[str, ReleaseError]:
        """Registered instances that the policy does not serve, by id: not listed, or above its leakage maxima."""
        with self._store.read() as db:
            registered = instances.everything(db)
        return {instance.id: refusal for instance in registered for refusal in self._objections(instance)}

    def _burn(self, db: Connection, claims: Claims, trail: Trail) -> None:
        """A refusal spends the nonce as well, where it was a good one: also one for the clock's sake."""
        now = max(trail.now, self.clock.reading())
        with contextlib.suppress(NonceRefused):
            seconds = self._in_force.policy.release.nonce_seconds
            expires = self._nonces.require(claims.nonce, now=now, seconds=seconds)
            nonces.spend(db, claims.nonce, expires=expires, now=now)

    def _by_policy_of_today(self, decide: Callable[[InForce], T]) -> T:
        """What `decide` makes of the policy in force, which asks the state in its transaction whether that is the one
        of today. Where another replica has loaded a later one, this one reads its files, and decides by what is there:
        also where the older one refused before it came to that, since the later one may not.

        Raises `PolicyOutdated` where the older one is still there.
        """
        in_force = self._in_force
        try:
            return decide(in_force)
        except PolicyOutdated:
            self._catch_up()
            if self._in_force is in_force:
                raise
        except (AttestationError, ReleaseError):
            self._by_policy_of_today(self._require_current)
            if self._in_force is in_force:
                raise
        return decide(self._in_force)

    def _require_current(self, in_force: InForce) -> None:
        with self._store.read() as db:
            require_current(db, in_force)

    def _decide(self, request: Request, claims: Claims, in_force: InForce, trail: Trail) -> tuple[Applicant, _Issued]:
        policy = in_force.policy
        expires = self._nonces.require(claims.nonce, now=trail.now, seconds=policy.release.nonce_seconds)
        if self._collateral is not None:
            request = replace(request, collateral=self._collateral(request.quote))
        with self._telemetry.stage("verify").time():
            applicant = release.examine(
                request, claims, policy, service=self._service, root_der=in_force.root_der, now=trail.now
            )
            trail.subject["measurement"] = applicant.enclave.measurement
        return applicant, self._issue(applicant, in_force, trail, expires)

    def _renew(self, handle: bytes, heartbeat: bytes, signature: bytes, in_force: InForce, trail: Trail) -> bytes:
        policy = in_force.policy
        with self._store.write() as db:
            require_current(db, in_force)
            trail.now = self.clock.require()
            record = leases.find(db, handle)
            beat = open_heartbeat(heartbeat, signature, read_link_key(record.link_key))
            trail.subject |= {"user": record.user, "instance": record.instance, "epoch": record.epoch}
            epoch = self._require_running(db, record, policy, trail.now)
            again = leases.answered(record, heartbeat)
            if again is not None:
                return again
            renewed, debited = leases.renew(db, record, beat, epoch, policy.lease, caps=policy.budgets, now=trail.now)
            trail.subject["tokens"] = debited
            head = self._audit.append(db, trail)
            renewal = self._renewal(renewed, epoch, beat, head, trail.now)
            leases.store_renewal(db, renewed, heartbeat, renewal)
        self.link_keys.note(record.handle, record.link_key)
        self._granted("renewal")
        return renewal

    def _issue(self, applicant: Applicant, in_force: InForce, trail: Trail, nonce_expires: int) -> _Issued:
        policy = in_force.policy
        with self._store.write() as db:
            require_current(db, in_force)
            claims = applicant.claims
            nonces.spend(db, claims.nonce, expires=nonce_expires, now=trail.now)
            holder = users.by_key(db, applicant.delegation.user)
            if holder is not None:
                trail.subject |= {"user": holder[0].id, "device": holder[1].id}
            holder, instance, epoch = release.require_entitled(
                claims, holder, instances.find(db, claims.instance), now=trail.now
            )
            trail.subject["epoch"] = epoch.number
            revocations.require_none(revocations.standing(db, release.subjects(applicant, holder, epoch)))
            policy.require_running(holder[0], instance, epoch, applicant.enclave)
            # Opened before anything is debited or logged as granted: a damaged one is a refusal like any other.
            carried = instance.kind == "dedicated" or claims.kind == "grant"
            grant = instances.grant(db, self._vault, instance.id, epoch.number) if carried else None
            record, drawn = None, tuple[bytes, ...]()
            if claims.kind == "bundle":
                record = leases.issue(
                    db, applicant, holder, (instance, epoch), policy.lease, caps=policy.budgets, now=trail.now
                )
                trail.subject |= {"handle": record.handle, "tokens": record.tokens}
                drawn = self._draw(db, instance, epoch, policy.canaries.per_bundle)
            head = self._audit.append(db, trail)
        return _Issued(in_force, instance, epoch, record, grant, drawn, head)

    def _seal(self, applicant: Applicant, issued: _Issued, now: int) -> tuple[bytes, bytes]:
        record, grant = issued.record, issued.grant
        if record is None:
            assert grant is not None  # a release without a lease is one of the grant alone
            return seal(grant, applicant.claims_bytes, self._home.service)
        bundle = Bundle(
            delegation=applicant.delegation_digest,
            user_key=secrets.token_bytes(32),
            instance=issued.instance.id,
            epoch=issued.epoch.number,
            manifest_digest=issued.epoch.manifest_digest,
            lease=record.sign(self._home.service, _hash_of(issued.head)),
            link_certificate=self._link_certificate(record, now),
            heartbeat_tokens=issued.in_force.policy.lease.heartbeat_tokens,
            cache_salt=secrets.token_bytes(32),
            policy_digest=issued.in_force.digest,
            audit_head=issued.head.to_bytes(),
            grant=None if grant is None else grant.to_bytes(),
            canaries=issued.canaries,
        )
        return seal(bundle, applicant.claims_bytes, self._home.service)

    def _draw(self, db: Connection, instance: Instance, epoch: Epoch, wanted: int) -> tuple[bytes, ...]:
        """The canaries of one bundle. A pool that has run dry releases without, and the log says so."""
        drawn = canaries.draw(db, self._vault, instance.id, epoch.number, wanted)
        if len(drawn) < wanted:
            structlog.get_logger().warning(
                "canaries are running out", instance=instance.id, epoch=epoch.number, wanted=wanted, drawn=len(drawn)
            )
        return drawn

    def _renewal(self, record: LeaseRecord, epoch: Epoch, beat: Heartbeat, head: Signed, now: int) -> bytes:
        renewal = Renewal(
            nonce=beat.nonce,
            lease=record.sign(self._home.service, _hash_of(head)),
            link_certificate=self._link_certificate(record, now),
            audit_head=head.to_bytes(),
            superseded=epoch.state == "draining",
        )
        return Signed.sign(renewal, self._home.service).to_bytes()

    def _link_certificate(self, record: LeaseRecord, now: int) -> bytes:
        key = read_link_key(record.link_key)
        return issue_link_certificate(self._home.link_ca, key, now=now, expires=record.expires)

    def _require_running(self, db: Connection, record: LeaseRecord, policy: Policy, now: int) -> Epoch:
        """The lease's epoch, where it could be issued today."""
        if record.revoked is not None:
            raise LeaseRevoked.because("lease", f"one that was revoked (revocation {record.revoked})", "a new lease")
        instance = instances.by_id(db, record.instance)
        user, device = users.by_id(db, record.user), users.device(db, record.device)
        release.require_present(user, device)
        epoch = instance.epoch(record.epoch)
        if epoch is None or epoch.state == "removed":
            raise InstanceRefused.because("lease instance", "one that was removed", "a registered instance")
        if not epoch.serves(now):
            raise InstanceRefused.because("lease epoch", "one that has drained", "a new lease, of the active epoch")
        release.require_member(user, instance)
        policy.require_running(user, instance, epoch, EnclaveFacts.from_bytes(record.enclave))
        return epoch

    def _objections(self, instance: Instance) -> Iterator[ReleaseError]:
        policy = self._in_force.policy
        for epoch in instance.epochs:
            try:
                if epoch.state != "removed":
                    policy.require_listed(epoch.manifest_digest, instance.kind)
                    policy.require_measured(epoch.leakage, epoch.preset)
            except ReleaseError as refusal:
                yield refusal

    def _granted(self, kind: str) -> None:
        self._telemetry.counter(RELEASES).labels(kind=kind).inc()

    def _decided(self, event: str, code: str) -> None:
        self._telemetry.counter(DECISIONS).labels(event=event, code=code).inc()


def _require_short(**parts: tuple[bytes, int]) -> None:
    for name, (data, limit) in parts.items():
        if len(data) > limit:
            raise FrameInvalid.because(name, f"{len(data)} bytes", f"at most {limit}")


def _hash_of(head: Signed) -> bytes:
    return AuditHead.from_bytes(head.payload).hash
