"""Two replicas of the real service on one real PostgreSQL, under load, killed at random points.

Whatever a client was answered stands in the audit log; nothing was granted twice; what the budgets lost, the log
explains.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import secrets
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from sqlalchemy import select, text

from stip_keyservice.home import Home
from stip_keyservice.service import canaries, instances, users
from stip_keyservice.service.auditlog import AuditEntry, verify
from stip_keyservice.service.state.schema import audit
from stip_keyservice.service.state.store import Store, open_store
from stip_keyservice.service.vault import open_vault
from stip_protocol import canonical, rpc
from stip_protocol.documents import Signed
from stip_protocol.lease import Lease
from stip_protocol.release import AuditHead, Bundle, Heartbeat, Renewal, sign_heartbeat, unseal
from stip_protocol.wire import keyservice_pb2, keyservice_pb2_grpc

from ..services.postgres import Server
from .conftest import MEASUREMENT, Enclave, Person, make_instance
from .place import COMMAND, Place

KILLS = int(os.environ.get("STIP_KILLS", "50"))
SEED = int(os.environ.get("STIP_SEED", "20261120"))
WORKERS = 6
CALL_SECONDS = 15
START_SECONDS = 60
SMALL_BUDGET = 40_000
CANARIES = 6_000
RATES = """
[limits.rates]
challenge = { per_second = 100000, burst = 100000 }
release = { per_second = 100000, burst = 100000 }
renewal = { per_second = 100000, burst = 100000 }
"""


class Replica:
    """One `stip-keyservice serve`, which can be killed and started again."""

    def __init__(self, config: Path, home: Home, log: Path) -> None:
        self._config, self._home, self._log = config, home, log
        self.stub: Any = None

    async def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - it returns at once
                [COMMAND, "serve", "--config", str(self._config)], stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self._process.stdout is not None
        said = await asyncio.wait_for(asyncio.to_thread(self._process.stdout.readline), START_SECONDS)
        assert said, self._log.read_text()[-2000:]
        self._channel = rpc.channel(json.loads(said)["address"], roots=self._home.tls_ca.pem, server_name="localhost")
        self.stub = keyservice_pb2_grpc.KeyServiceStub(self._channel)

    async def stop(self, how: signal.Signals) -> None:
        self._process.send_signal(how)
        assert await asyncio.to_thread(self._process.wait, START_SECONDS) == (0 if how == signal.SIGTERM else -how)
        await self._channel.close()

    async def restart(self) -> None:
        await self.stop(signal.SIGKILL)
        await self.start()


@dataclass
class Told:
    """What clients were answered."""

    heads: list[AuditHead] = field(default_factory=list)
    leases: list[Lease] = field(default_factory=list)
    renewals: list[Lease] = field(default_factory=list)
    canaries: list[bytes] = field(default_factory=list)
    grants_of_a_nonce: Counter[bytes] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)


@dataclass
class Load:
    """Clients with enclaves, each asking whichever replica."""

    place: Place
    home: Home
    replicas: list[Replica]
    people: list[Person]
    instance: str
    told: Told
    chance: random.Random
    stopped: asyncio.Event = field(default_factory=asyncio.Event)

    async def work(self) -> None:
        while not self.stopped.is_set():
            enclave = Enclave(self.place.platform)
            enclave.provider = self.place.platform.provider(MEASUREMENT)
            lease = await self.release(enclave, self.chance.choice(self.people))
            for _ in range(self.chance.randrange(4)):
                if lease is not None:
                    lease = await self.renew(enclave, lease)

    async def release(self, enclave: Enclave, person: Person) -> Lease | None:
        """One challenge, answered by one replica, spent at another, or at both at once."""
        challenge = await self.answer(self.one(), "Challenge", keyservice_pb2.ChallengeRequest())
        if challenge is None:
            return None
        delegation = person.delegate(enclave, self.instance, expires=int(time.time()) + 3600)
        claims = enclave.claims(challenge, delegation, self.instance)
        request = enclave.request(claims, delegation)
        asked = self.replicas if self.chance.random() < 0.4 else [self.one()]
        replies = await asyncio.gather(*(self.answer(replica, "Release", request) for replica in asked))
        lease = None
        for reply in filter(None, replies):
            key = self.home.service.public_key()
            bundle = unseal(reply.sealed, reply.signature, claims.to_bytes(), enclave.hpke, key)
            assert isinstance(bundle, Bundle)
            lease = Signed.from_bytes(bundle.lease).open(Lease, key)
            self.told.leases.append(lease)
            self.told.canaries += bundle.canaries
            self.told.grants_of_a_nonce[challenge.nonce] += 1
            self.told.heads.append(Signed.from_bytes(bundle.audit_head).open(AuditHead, key))
        return lease

    async def renew(self, enclave: Enclave, lease: Lease) -> Lease | None:
        """The same heartbeat to one replica or both: one answer, however often."""
        beat = Heartbeat(
            handle=lease.handle, serial=lease.serial, nonce=secrets.token_bytes(32), fed=lease.tokens, wanted=50
        )
        request = keyservice_pb2.RenewRequest(heartbeat=beat.to_bytes(), signature=sign_heartbeat(beat, enclave.link))
        asked = self.replicas if self.chance.random() < 0.4 else [self.one()]
        replies = await asyncio.gather(*(self.answer(replica, "Renew", request) for replica in asked))
        answers = {reply.renewal for reply in filter(None, replies)}
        assert len(answers) <= 1
        for answer in answers:
            renewal = Signed.from_bytes(answer).open(Renewal, self.home.service.public_key())
            renewed = Signed.from_bytes(renewal.lease).open(Lease, self.home.service.public_key())
            self.told.renewals.append(renewed)
            self.told.heads.append(
                Signed.from_bytes(renewal.audit_head).open(AuditHead, self.home.service.public_key())
            )
            return renewed
        return None

    async def answer(self, replica: Replica, call: str, request: Any) -> Any | None:
        try:
            return await getattr(replica.stub, call)(request, timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            self.told.refused[rpc.from_rpc(error).code] += 1
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                await asyncio.sleep(0.02)  # it is dead, or comes back: do not spin
        except (asyncio.CancelledError, grpc.aio.UsageError):
            if self.stopped.is_set():
                raise
            self.told.refused["channel closed"] += 1
            await asyncio.sleep(0.02)
        return None

    def one(self) -> Replica:
        return self.chance.choice(self.replicas)


@pytest.fixture
def placed(place: Place, postgres: Server) -> Place:
    url = postgres.url(postgres.database()).render_as_string(hide_password=False)
    place.call_here("home", "init", "--database", url)
    policy = place.folder / "policy.toml"
    policy.write_text(policy.read_text() + "tokens = 100\n[canaries]\nper_bundle = 2\n")
    place.config.write_text(place.config.read_text() + RATES)
    return place


async def under_kills(place: Place, kills: int) -> Told:
    """Load on two replicas, and `kills` of either at random times."""
    home = Home.open(place.home)
    chance = random.Random(SEED)
    people = [Person("rich"), Person("poor")]
    made = make_instance(place.folder / "made", home)
    store = open_store(home)
    with store.write() as db:
        inspected = instances.inspect(made.directory, home.developer.public_key(), home.sealing)
        instances.add(db, inspected, vault=open_vault(home), domain=None, now=int(time.time()))
        for person, budget in zip(people, (2**40, SMALL_BUDGET), strict=True):
            users.add(db, person.name, person.public, budget=budget, now=int(time.time()))
            instances.allow(db, made.id, users.by_name(db, person.name))
        pool = [canonical.encode(["canary", number]) for number in range(CANARIES)]
        canaries.add(db, open_vault(home), made.id, 0, pool)
    store.close()
    replicas = [Replica(place.config, home, place.folder / f"replica{number}.log") for number in range(2)]
    for replica in replicas:
        await replica.start()
    load = Load(place, home, replicas, people, made.id, Told(), chance)
    workers = [asyncio.create_task(load.work()) for _ in range(WORKERS)]
    killing = random.Random(SEED + 1)
    try:
        for _ in range(kills):
            await asyncio.sleep(killing.uniform(0.2, 2.0))
            assert not any(worker.done() for worker in workers), [worker for worker in workers if worker.done()]
            await killing.choice(replicas).restart()
        await asyncio.sleep(1)
        load.stopped.set()
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        for replica in replicas:
            await replica.stop(signal.SIGTERM)
    return load.told


def require_whole(place: Place, told: Told) -> None:
    """The log against what clients hold."""
    home = Home.open(place.home)
    store = open_store(home)
    assert verify(store, home.service.public_key()).sequence > 0
    entries, hashes = _entries(store)
    released = [entry for entry in entries if entry.event == "release" and entry.code == "granted"]
    renewed = [entry for entry in entries if entry.event == "renewal" and entry.code == "granted"]
    # no lost audit entry: every answer is in the log, in the place that its signed head says
    for head in told.heads:
        assert hashes[head.sequence] == head.hash
    logged = {entry.handle: entry.tokens for entry in released}
    assert len(logged) == len(released)
    for lease in told.leases:
        assert logged[lease.handle] == lease.tokens
    renewals = Counter(entry.handle for entry in renewed)
    for lease in told.renewals:
        assert renewals[lease.handle] >= lease.serial
    # no double grant: of a nonce, of a canary, of a token
    assert set(told.grants_of_a_nonce.values()) == {1}
    assert len(set(told.canaries)) == len(told.canaries) > 0
    debited: Counter[str | None] = Counter()
    for entry in (*released, *renewed):
        debited[entry.user] += entry.tokens or 0
    with store.read() as db:
        spent = {user.id: (user.spent, user.budget) for user in users.everyone(db)}
        held = db.execute(text("SELECT count(*) FROM spent_nonces")).scalar()
        left = db.execute(text("SELECT count(*) FROM canaries")).scalar_one()
        rows = db.execute(text("SELECT count(*) FROM leases")).scalar()
    assert {user: amount for user, (amount, _) in spent.items()} == dict(debited)
    assert all(amount <= budget for amount, budget in spent.values())
    assert rows == len(released)
    assert held is not None
    assert CANARIES - left == min(2 * len(released), CANARIES)
    store.close()


def _entries(store: Store) -> tuple[list[AuditEntry], dict[int, bytes]]:
    with store.read() as db:
        rows = db.execute(select(audit).order_by(audit.c.sequence)).all()
    return [AuditEntry.from_bytes(row.entry) for row in rows], {row.sequence: row.hash for row in rows}


@pytest.mark.long
@pytest.mark.timeout(3600)
async def test_replicas_killed_at_random_under_load_lose_nothing_and_grant_nothing_twice(placed: Place) -> None:
    told = await under_kills(placed, KILLS)
    require_whole(placed, told)
    assert len(told.leases) > 10 * KILLS
    assert told.refused["nonce_refused"] > 0, "no nonce was ever sent twice"
    print(
        f"{KILLS} kills, seed {SEED}: {len(told.leases)} releases, {len(told.renewals)} renewals, "
        f"{len(told.canaries)} canaries; refused: {dict(told.refused)}"
    )
