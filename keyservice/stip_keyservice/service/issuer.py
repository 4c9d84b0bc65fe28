"""Challenge, release, renewal: decisions of `release` and `leases`, carried out against the store.

Blocking, and safe from any number of threads and processes at once: what must be atomic is one exclusive
transaction. Every decision leaves an entry in the audit log, in the transaction that carries it out.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from stip_keyservice.home import Home
from stip_keyservice.service import instances, leases, nonces, release, users, vault
from stip_keyservice.service.auditlog import AuditLog, Trail
from stip_keyservice.service.instances import Instance
from stip_keyservice.service.leases import LeaseRecord
from stip_keyservice.service.linkca import issue_link_certificate, read_link_key
from stip_keyservice.service.policy import Policy
from stip_keyservice.service.release import Applicant, Request
from stip_keyservice.service.store import Store
from stip_protocol.documents import Signed
from stip_protocol.errors import FrameInvalid, InstanceRefused, LeakageRefused
from stip_protocol.release import AuditHead, Bundle, Grant, Heartbeat, Renewal, open_heartbeat, seal, service_id
from stip_protocol.telemetry import AUDIT_SEQUENCE, RELEASES, Telemetry

HEARTBEAT_LIMIT = 1024
SIGNATURE_LIMIT = 128
"""Bytes of a DER-encoded P-256 signature, with room."""


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

    instance: Instance
    record: LeaseRecord | None
    """The lease of a bundle; None for a grant."""
    grant: Grant | None = field(repr=False)
    """None in the bundle for a shared instance."""
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
    ) -> None:
        """`root_der` is the simulated root that a development policy pins; None in production."""
        self._home, self._store, self._policy, self._telemetry = home, store, policy, telemetry
        self._root_der, self._clock = root_der, clock
        self._service = service_id(home.service.public_key())
        self._policy_digest = policy.digest()
        entries = telemetry.gauge(AUDIT_SEQUENCE)
        self._audit = AuditLog(store, home.service, observe=entries.set)
        entries.set(self._audit.length())

    def challenge(self) -> Challenge:
        """A fresh nonce."""
        bounds = self._policy.release
        with self._store.write() as db:
            nonce = nonces.issue(db, now=self._now(), seconds=bounds.nonce_seconds, limit=bounds.max_pending_nonces)
        return Challenge(nonce, bounds.nonce_seconds, self._service)

    def release(self, request: Request) -> tuple[bytes, bytes]:
        """(sealed, signature) of a `Bundle` or a `Grant`.

        Raises what `release` and `nonces` raise, `LeakageRefused` and `BudgetSpent`. The claims' nonce is spent in
        any case.
        """
        claims = release.read_claims(request.claims)
        trail = Trail("release", self._now(), {"kind": claims.kind, "instance": claims.instance})
        with self._audit.refusals(trail):
            nonces.consume(self._store, claims.nonce, now=trail.now)
            with self._telemetry.stage("verify").time():
                applicant = release.examine(
                    request, claims, self._policy, service=self._service, root_der=self._root_der, now=trail.now
                )
                trail.subject["measurement"] = applicant.measurement
            issued = self._issue(applicant, trail)
        with self._telemetry.stage("seal").time():
            sealed = self._seal(applicant, issued, trail.now)
        self._granted(claims.kind)
        return sealed

    def renew(self, heartbeat: bytes, signature: bytes) -> bytes:
        """A signed `Renewal` for a heartbeat.

        Raises `SignatureInvalid` (not the lease's link key), `UserRefused`, `InstanceRefused`, `LeakageRefused`, and
        what `leases.find` and `leases.renew` raise.
        """
        for name, data, limit in (("heartbeat", heartbeat, HEARTBEAT_LIMIT), ("signature", signature, SIGNATURE_LIMIT)):
            if len(data) > limit:
                raise FrameInvalid.because(name, f"{len(data)} bytes", f"at most {limit}")
        handle = Heartbeat.from_bytes(heartbeat).handle
        trail = Trail("renewal", self._now(), {"handle": handle})
        with self._audit.refusals(trail), self._store.write() as db:
            record = leases.find(db, handle)
            beat = open_heartbeat(heartbeat, signature, read_link_key(record.link_key))
            trail.subject |= {"user": record.user, "instance": record.instance}
            self._require_running(record, users.by_id(db, record.user), instances.by_id(db, record.instance))
            again = leases.answered(record, heartbeat)
            if again is not None:
                return again
            renewed, debited = leases.renew(db, record, beat, self._policy.lease, now=trail.now)
            trail.subject["tokens"] = debited
            head = self._audit.append(db, trail)
            renewal = self._renewal(renewed, beat, head, trail.now)
            leases.store_renewal(db, renewed, heartbeat, renewal)
        self._granted("renewal")
        return renewal

    def refused_instances(self) -> Mapping[str, LeakageRefused]:
        """Registered instances that the policy's leakage maxima refuse, by id, each with the rule it breaks."""
        with self._store.read() as db:
            registered = instances.everything(db)
        refusals = ((instance.id, self._objection(instance)) for instance in registered)
        return {instance: refusal for instance, refusal in refusals if refusal is not None}

    def _issue(self, applicant: Applicant, trail: Trail) -> _Issued:
        with self._store.write() as db:
            user = users.by_key(db, applicant.delegation.user)
            if user is not None:
                trail.subject["user"] = user.id
            user, instance = release.require_entitled(
                applicant.claims, user, instances.find(db, applicant.claims.instance)
            )
            self._policy.require_measured(instance.leakage, instance.preset)
            # Opened before anything is debited or logged as granted: a damaged one is a refusal like any other.
            grant = self._grant(instance) if instance.kind == "dedicated" or applicant.claims.kind == "grant" else None
            record = None
            if applicant.claims.kind == "bundle":
                record = leases.issue(db, applicant, user, instance, self._policy.lease, now=trail.now)
                trail.subject |= {"handle": record.handle, "tokens": record.tokens}
            head = self._audit.append(db, trail)
        return _Issued(instance, record, grant, head)

    def _seal(self, applicant: Applicant, issued: _Issued, now: int) -> tuple[bytes, bytes]:
        instance, record, grant = issued.instance, issued.record, issued.grant
        if record is None:
            assert grant is not None  # a release without a lease is one of the grant alone
            return seal(grant, applicant.claims_bytes, self._home.service)
        bundle = Bundle(
            delegation=applicant.delegation_digest,
            user_key=secrets.token_bytes(32),
            instance=instance.id,
            epoch=instance.epoch,
            manifest_digest=instance.manifest_digest,
            lease=record.sign(self._home.service, _hash_of(issued.head)),
            link_certificate=self._link_certificate(record, now),
            heartbeat_tokens=self._policy.lease.heartbeat_tokens,
            cache_salt=secrets.token_bytes(32),
            policy_digest=self._policy_digest,
            audit_head=issued.head.to_bytes(),
            grant=None if grant is None else grant.to_bytes(),
        )
        return seal(bundle, applicant.claims_bytes, self._home.service)

    def _grant(self, instance: Instance) -> Grant:
        assert instance.sealed_grant is not None  # a constraint of the table: only a removed instance has none
        return vault.unlock(instance.sealed_grant, self._home.storage_key, instance=instance.id, epoch=instance.epoch)

    def _renewal(self, record: LeaseRecord, beat: Heartbeat, head: Signed, now: int) -> bytes:
        renewal = Renewal(
            nonce=beat.nonce,
            lease=record.sign(self._home.service, _hash_of(head)),
            link_certificate=self._link_certificate(record, now),
        )
        return Signed.sign(renewal, self._home.service).to_bytes()

    def _link_certificate(self, record: LeaseRecord, now: int) -> bytes:
        key = read_link_key(record.link_key)
        return issue_link_certificate(self._home.link_ca, key, now=now, expires=record.expires)

    def _require_running(self, record: LeaseRecord, user: users.User, instance: Instance) -> None:
        release.require_present(user)
        if instance.removed_at is not None:
            raise InstanceRefused.because("lease instance", "one that was removed", "a registered instance")
        release.require_member(user, instance)
        self._policy.require_measured(instance.leakage, instance.preset)

    def _objection(self, instance: Instance) -> LeakageRefused | None:
        try:
            self._policy.require_measured(instance.leakage, instance.preset)
        except LeakageRefused as refusal:
            return refusal
        return None

    def _granted(self, kind: str) -> None:
        self._telemetry.counter(RELEASES).labels(kind=kind).inc()

    def _now(self) -> int:
        return int(self._clock())


def _hash_of(head: Signed) -> bytes:
    return AuditHead.from_bytes(head.payload).hash
