"""Scenes: a key service on a real socket, a person with an instance and an enclave, and a neighbour to be served."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from typing import Any

from stip_keyservice.service import auditlog, users
from stip_keyservice.service.auditlog import AuditLog
from stip_protocol import canonical
from stip_protocol.documents import Signed
from stip_protocol.lease import Lease
from stip_protocol.release import Bundle, Claims, Heartbeat, Watch, sign_heartbeat, sign_watch
from stip_protocol.wire import keyservice_pb2
from tests.keyservice.conftest import Enclave, MadeInstance, Person, World, refusal
from tests.refusals.forge import Forge
from tests.refusals.table import Act, Case

MINUTE = 61
"""Seconds between cases: what strangers are refused in one minute does not fold what they are refused in the next."""
BUDGET = 1_000_000
TOKENS = 100
"""Tokens that claims ask for."""


class Service:
    """A key service with a neighbour who has nothing to do with any of it."""

    def __init__(self, world: World, forge: Forge, stranger: Forge) -> None:
        """`stranger` holds the keys of a simulated platform with a root of its own."""
        self.world, self.forge, self.stranger = world, forge, stranger
        self.audit = AuditLog(world.store, world.home.service)
        self._numbers = itertools.count()
        self._neighbour = world.person("neighbour", budget=1_000_000_000)
        self._instance = world.instance(owner=self._neighbour)

    def scene(self) -> Scene:
        """A new one, a minute later."""
        self.world.clock.now += MINUTE
        return Scene(self, next(self._numbers))

    async def judge(self, case: Case) -> None:
        """Do what a case does: it is refused, recorded, counted, costs nobody anything, and disturbs nobody."""
        scene = self.scene()
        try:
            act = await case.arrange(scene)
            spent, counted, length = self.spent(), self.counted(case.code), self.audit.length()
            assert await refusal(act()) == case.code
            assert self.spent() == spent, "something was debited"
            assert self.counted(case.code) == counted + case.counted
            entries = self.audit.latest(self.audit.length() - length)
            expected = [] if case.event is None else [(case.event, case.code, None)]
            assert [(entry.event, entry.code, entry.tokens) for entry in entries] == expected
            auditlog.verify(self.world.store, self.world.home.service.public_key())
        finally:
            scene.repair()
        await self.serve_neighbour()

    async def serve_neighbour(self) -> None:
        """A genuine enclave of somebody else gets what it asks for."""
        enclave = Enclave(self.world.platform)
        before = self.world.user(self._neighbour).spent
        delegation = self._neighbour.delegate(enclave, self._instance.id, expires=self.world.clock.now + 3600)
        bundle, _ = await self.world.release(enclave, delegation, self._instance.id)
        assert isinstance(bundle, Bundle)
        assert self.world.lease(bundle.lease).tokens == TOKENS
        assert self.world.user(self._neighbour).spent - before == TOKENS

    def spent(self) -> int:
        """Tokens debited from anybody."""
        with self.world.store.read() as db:
            return sum(user.spent for user in users.everyone(db, removed=True))

    def counted(self, code: str) -> float:
        value = self.world.telemetry.registry.get_sample_value("stip_refusals_total", {"code": code})
        return value or 0.0


class Scene:
    """Alice, with an instance of her own and an enclave: everything is in order."""

    def __init__(self, service: Service, number: int) -> None:
        self.service, self.world = service, service.world
        self.forge, self.stranger_forge = service.forge, service.stranger
        self.number = number
        self.alice = self.person("alice")
        self.instance = self.world.instance(owner=self.alice)
        self.enclave = self.new_enclave()
        self._repairs: list[Callable[[], None]] = []

    @property
    def now(self) -> int:
        return self.world.clock.now

    def person(self, name: str, *, budget: int = BUDGET) -> Person:
        return self.world.person(f"{name}-{self.number}", budget=budget)

    def new_enclave(self, **options: Any) -> Enclave:
        return Enclave(self.world.platform, **options)

    def finally_(self, repair: Callable[[], None]) -> None:
        """Done after the case, so that the neighbour can be served."""
        self._repairs.append(repair)

    def repair(self) -> None:
        while self._repairs:
            self._repairs.pop()()

    def delegate(
        self, person: Person | None = None, *, enclave: Enclave | None = None, instance: str | None = None, **other: Any
    ) -> bytes:
        """Alice's word for her enclave and instance, unless told otherwise."""
        fields = {"expires": self.now + 3600} | other
        return (person or self.alice).delegate(enclave or self.enclave, instance or self.instance.id, **fields)

    async def request(
        self,
        *,
        enclave: Enclave | None = None,
        delegation: bytes | None = None,
        instance: MadeInstance | None = None,
        person: Person | None = None,
        **claims: Any,
    ) -> keyservice_pb2.ReleaseRequest:
        """A release request that would be granted, with what is given instead."""
        made, word, enclave = await self.claims(
            enclave=enclave, delegation=delegation, instance=instance, person=person, **claims
        )
        return enclave.request(made, word)

    async def claims(
        self,
        *,
        enclave: Enclave | None = None,
        delegation: bytes | None = None,
        instance: MadeInstance | None = None,
        person: Person | None = None,
        **other: Any,
    ) -> tuple[Claims, bytes, Enclave]:
        enclave, wanted = enclave or self.enclave, (instance or self.instance).id
        word = self.delegate(person, enclave=enclave, instance=wanted) if delegation is None else delegation
        challenge = await self.world.challenge()
        return enclave.claims(challenge, word, wanted, **other), word, enclave

    def asking(self, request: keyservice_pb2.ReleaseRequest, *, stub: Any = None) -> Act:
        return lambda: (stub or self.world.stub).Release(request)

    async def lease(self, *, person: Person | None = None, enclave: Enclave | None = None, **claims: Any) -> Lease:
        """A genuine one."""
        enclave = enclave or self.enclave
        instance = claims.pop("instance", self.instance)
        word = self.delegate(person, enclave=enclave, instance=instance.id, **claims.pop("word", {}))
        bundle, _ = await self.world.release(enclave, word, instance.id, **claims)
        assert isinstance(bundle, Bundle)
        return self.world.lease(bundle.lease)

    def heartbeat(self, lease: Lease, *, signer: Any = None, **other: Any) -> keyservice_pb2.RenewRequest:
        """A genuine one over a lease, with what is given instead."""
        fields = {"handle": lease.handle, "serial": lease.serial, "nonce": bytes(32), "fed": 0, "wanted": 10}
        beat = Heartbeat.model_validate(fields | other)
        return keyservice_pb2.RenewRequest(
            heartbeat=beat.to_bytes(), signature=sign_heartbeat(beat, (signer or self.enclave).link)
        )

    def renewing(self, request: keyservice_pb2.RenewRequest, *, stub: Any = None) -> Act:
        return lambda: (stub or self.world.stub).Renew(request)

    async def renewed(self, request: keyservice_pb2.RenewRequest) -> Any:
        return await self.world.stub.Renew(request)

    async def watch(
        self, *, signer: Enclave | None = None, link_key: bytes | None = None, **other: Any
    ) -> keyservice_pb2.WatchRequest:
        """A genuine one over the enclave's link key, with what is given instead."""
        fields = {
            "nonce": (await self.world.challenge()).nonce,
            "link_key": hashlib.sha256(self.enclave.link_spki).digest(),
        }
        made = Watch.model_validate(fields | other)
        return keyservice_pb2.WatchRequest(
            watch=made.to_bytes(),
            signature=sign_watch(made, (signer or self.enclave).link),
            link_key=link_key or self.enclave.link_spki,
        )

    def watching(self, request: keyservice_pb2.WatchRequest, *, stub: Any = None) -> Act:
        return lambda: (stub or self.world.stub).Watch(request).read()


def altered(claims: Claims, field: str, value: Any) -> bytes:
    """Canonical claims with another value in one field, whether that is a value of the field or not."""
    raw = canonical.decode(claims.to_bytes(), what="claims")
    return canonical.encode(raw | {field: value})


def resigned(document: Any, person: Person, **fields: Any) -> bytes:
    """A signed document with other raw values in its fields, signed by its own signer."""
    signed = Signed.from_bytes(document)
    raw = canonical.encode(canonical.decode(signed.payload, what="document") | fields)
    context = str(canonical.decode(signed.payload, what="document")["ctx"])
    return Signed(payload=raw, signature=person.key.sign(context.encode() + b"\x00" + raw)).to_bytes()
