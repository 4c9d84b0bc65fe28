"""Budgets: tokens are debited before they are used, and nobody gets more than there are, at once or one by one."""

from __future__ import annotations

import asyncio
import secrets

import grpc.aio

from stip_protocol import rpc
from stip_protocol.lease import Lease
from tests.keyservice.conftest import Enclave, Person
from tests.refusals.scene import TOKENS, Scene
from tests.refusals.table import Act, Case, Section

SPENT = "budget_spent"
CLONES, BUDGET = 20, 730
"""A budget that is no multiple of what a clone asks for: the last one that gets something gets less."""


async def codes(calls: list[grpc.aio.UnaryUnaryCall]) -> list[str]:
    """How each of many calls ended: "granted", or its stable code."""

    async def ended(call: grpc.aio.UnaryUnaryCall) -> str:
        try:
            await call
        except grpc.aio.AioRpcError as error:
            return rpc.from_rpc(error).code
        return "granted"

    return list(await asyncio.gather(*(ended(call) for call in calls)))


async def cloned(scene: Scene) -> Act:
    """Twenty copies of one enclave, keys and all, ask at once over connections of their own."""
    poor = scene.person("poor", budget=BUDGET)
    instance = scene.world.instance(owner=poor)
    requests = [await scene.request(person=poor, instance=instance) for _ in range(CLONES + 1)]
    stubs = [await scene.service.stub() for _ in range(4)]
    before = scene.service.spent()
    ended = await codes([stubs[at % 4].Release(request) for at, request in enumerate(requests[:-1])])
    granted = -(-BUDGET // TOKENS)
    assert (ended.count("granted"), ended.count(SPENT)) == (granted, CLONES - granted)
    assert scene.service.spent() - before == BUDGET
    return scene.asking(requests[-1])


async def leased(scene: Scene, poor: Person, count: int) -> list[tuple[Enclave, Lease]]:
    """Leases of one token each, on enclaves of their own."""
    instance = scene.world.instance(owner=poor)
    made = []
    for _ in range(count):
        enclave = scene.new_enclave()
        made.append((enclave, await scene.lease(person=poor, enclave=enclave, instance=instance, tokens=1)))
    return made


async def by_heartbeats(scene: Scene) -> Act:
    """Twenty enclaves with leases of one user renew at once, each for more than its share."""
    poor = scene.person("poor", budget=CLONES + BUDGET)
    running = await leased(scene, poor, CLONES)
    beats = [
        scene.heartbeat(lease, signer=enclave, fed=1, wanted=TOKENS, nonce=secrets.token_bytes(32))
        for enclave, lease in running
    ]
    before = scene.service.spent()
    ended = await codes([scene.world.stub.Renew(beat) for beat in beats])
    granted = -(-BUDGET // TOKENS)
    assert (ended.count("granted"), ended.count(SPENT)) == (granted, CLONES - granted)
    assert scene.service.spent() - before == BUDGET
    return scene.renewing(beats[ended.index(SPENT)])


async def at_two_replicas(scene: Scene) -> Act:
    """Half of the clones ask another process over the same state."""
    poor = scene.person("poor", budget=BUDGET)
    instance = scene.world.instance(owner=poor)
    requests = [await scene.request(person=poor, instance=instance) for _ in range(CLONES + 1)]
    stubs = [scene.world.stub, (await scene.replica()).stub]
    scene.asked = scene.world
    before = scene.service.spent()
    ended = await codes([stubs[at % 2].Release(request) for at, request in enumerate(requests[:-1])])
    assert set(ended) == {"granted", SPENT}
    assert scene.service.spent() - before == BUDGET
    return scene.asking(requests[-1])


async def nothing_left(scene: Scene) -> Act:
    poor = scene.person("poor", budget=0)
    return scene.asking(await scene.request(person=poor, instance=scene.world.instance(owner=poor)))


async def lowered(scene: Scene) -> Act:
    lease = await scene.lease()
    scene.operator("users", "budget", scene.alice.name, str(lease.tokens))
    return scene.renewing(scene.heartbeat(lease, fed=lease.tokens))


async def beyond_the_day(scene: Scene) -> Act:
    await scene.lease(tokens=1000)
    return scene.asking(await scene.request())


async def beyond_the_day_by_heartbeat(scene: Scene) -> Act:
    lease = await scene.lease(tokens=1000)
    return scene.renewing(scene.heartbeat(lease, fed=lease.tokens))


async def more_than_the_mark(scene: Scene) -> Act:
    lease = await scene.lease()
    return scene.renewing(scene.heartbeat(lease, fed=lease.tokens + 1))


BUDGETS = Section(
    "Budgets",
    "Tokens are debited in chunks before an enclave uses them, in the transaction of the decision. Clones of one "
    "enclave, however many at once, are granted exactly the budget.",
    "service",
    (
        Case("a release for a user without tokens", "the budget: 0", SPENT, nothing_left),
        Case("twenty clones of an enclave at once, and one more", "how many ask", SPENT, cloned),
        Case("twenty clones of an enclave at two replicas, and one more", "how many ask, and whom", SPENT,
             at_two_replicas),
        Case("heartbeats of twenty enclaves of one user at once", "how many ask", SPENT, by_heartbeats,
             event="renewal"),
        Case("a heartbeat after the budget was lowered to what is spent", "`users budget`", SPENT, lowered,
             event="renewal"),
        Case("a heartbeat that reports more tokens than were granted", "`fed`", "lease_spent", more_than_the_mark,
             event="renewal"),
        Case("a release beyond the policy's cap of a day", "`[budgets] tokens_per_day`", SPENT, beyond_the_day,
             rules={"budgets": {"tokens_per_day": 1000}}),
        Case("a heartbeat beyond the policy's cap of a day", "`[budgets] tokens_per_day`", SPENT,
             beyond_the_day_by_heartbeat, event="renewal", rules={"budgets": {"tokens_per_day": 1000}}),
        Case("a release beyond the policy's cap of a user", "`[budgets] tokens_per_user`", SPENT, beyond_the_day,
             rules={"budgets": {"tokens_per_user": 1000}}),
    ),
    own=True,
)  # fmt: skip
