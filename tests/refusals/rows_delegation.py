"""Delegations: a user's word for one enclave key, measurement and instance, until a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stip_protocol import canonical
from stip_protocol.documents import Signed
from stip_protocol.release import DELEGATION_LIFE_LIMIT, Delegation
from tests.keyservice.conftest import Person
from tests.refusals.scene import Scene
from tests.refusals.table import Act, Case, Section

WORD, USER, INSTANCE = "delegation_refused", "user_refused", "instance_refused"
Make = Callable[[Scene], bytes]


def word(name: str, told: str, make: Make, code: str = WORD) -> Case:
    """A delegation other than Alice's; the claims digest it as it comes."""

    async def arrange(scene: Scene) -> Act:
        return scene.asking(await scene.request(delegation=make(scene)))

    return Case(name, told, code, arrange)


def altered(field: str, value: Any) -> Make:
    """Alice's genuine delegation with another value in one field, under her signature over the one she signed."""

    def make(scene: Scene) -> bytes:
        signed = Signed.from_bytes(scene.delegate())
        raw = canonical.decode(signed.payload, what="delegation")
        assert raw[field] != value
        return Signed(payload=canonical.encode(raw | {field: value}), signature=signed.signature).to_bytes()

    return make


def tail(cut: int, more: bytes = b"") -> Make:
    def make(scene: Scene) -> bytes:
        data = scene.delegate()
        return data[: len(data) - cut] + more

    return make


def unsigned(scene: Scene) -> bytes:
    return Signed(payload=Signed.from_bytes(scene.delegate()).payload, signature=bytes(64)).to_bytes()


def another_document(scene: Scene) -> bytes:
    """The same fields, signed by Alice as what is no delegation."""
    raw = canonical.decode(Signed.from_bytes(scene.delegate()).payload, what="delegation")
    payload = canonical.encode(raw | {"ctx": "stip/heartbeat"})
    return Signed(payload=payload, signature=scene.alice.key.sign(b"stip/heartbeat\x00" + payload)).to_bytes()


ALTERED: dict[str, tuple[Case, ...]] = {
    field: tuple(
        word(f"a delegation whose {field} was altered after signing", f"`{field}`: {told}", altered(field, value), code)
        for told, value, code in rows
    )
    for field, rows in {
        "ctx": (("a lease's", "stip/lease", WORD),),
        "version": (("another minor", [1, 7], WORD),),
        "user": (("another key", bytes(31) + b"\x01", WORD),),
        "enclave_key": (("another one", b"k" * 32, WORD),),
        "measurement": (("another one", b"m" * 32, WORD),),
        "instance": (("another one", "0" * 32, WORD),),
        "nonce": (("another one", b"n" * 32, WORD),),
        "expires": (("much later", 2**39, WORD),),
    }.items()
}
FIELDS = frozenset(Delegation.model_fields) | {"ctx", "version"}


def mallory(scene: Scene) -> Person:
    return scene.person("mallory")


async def of_another_user(scene: Scene) -> Act:
    """Mallory's own word for a genuine enclave, and Alice's instance."""
    return scene.asking(await scene.request(person=mallory(scene)))


async def stolen_by_another_enclave(scene: Scene) -> Act:
    """Alice's word for her enclave in the hands of another one, as genuine as hers."""
    return scene.asking(await scene.request(enclave=scene.new_enclave(), delegation=scene.delegate()))


async def for_a_shared_instance(scene: Scene) -> Act:
    shared = scene.world.instance(members=(scene.alice,))
    return scene.asking(await scene.request(person=mallory(scene), instance=shared))


async def grant_for_a_stranger(scene: Scene) -> Act:
    shared = scene.world.instance(members=(scene.alice,))
    return scene.asking(await scene.request(person=mallory(scene), instance=shared, kind="grant"))


async def disallowed(scene: Scene) -> Act:
    shared = scene.world.instance(members=(scene.alice,))
    scene.operator("users", "disallow", scene.alice.name, shared.id)
    return scene.asking(await scene.request(instance=shared))


async def of_a_disallowed_member_that_runs(scene: Scene) -> Act:
    shared = scene.world.instance(members=(scene.alice,))
    lease = await scene.lease(instance=shared)
    scene.operator("users", "disallow", scene.alice.name, shared.id)
    return scene.renewing(scene.heartbeat(lease))


async def disabled(scene: Scene) -> Act:
    scene.operator("users", "disable", scene.alice.name)
    return scene.asking(await scene.request())


async def disabled_while_it_runs(scene: Scene) -> Act:
    lease = await scene.lease()
    scene.operator("users", "disable", scene.alice.name)
    return scene.renewing(scene.heartbeat(lease))


async def removed(scene: Scene) -> Act:
    scene.operator("users", "remove", scene.alice.name)
    return scene.asking(await scene.request())


async def removed_while_it_runs(scene: Scene) -> Act:
    lease = await scene.lease()
    scene.operator("users", "remove", scene.alice.name)
    return scene.renewing(scene.heartbeat(lease))


async def shredded(scene: Scene) -> Act:
    scene.operator("users", "shred", scene.alice.name, "--yes")
    return scene.asking(await scene.request())


def laptop(scene: Scene) -> Person:
    """A second device of Alice's."""
    device = Person("laptop")
    scene.operator("users", "devices", "add", scene.alice.name, device.name, "--public-key", device.public.hex())
    return device


async def by_a_removed_device(scene: Scene) -> Act:
    device = laptop(scene)
    await scene.lease(person=device)
    scene.operator("users", "devices", "remove", scene.alice.name, device.name)
    return scene.asking(await scene.request(person=device))


async def by_a_removed_device_that_runs(scene: Scene) -> Act:
    device = laptop(scene)
    lease = await scene.lease(person=device)
    scene.operator("users", "devices", "remove", scene.alice.name, device.name)
    return scene.renewing(scene.heartbeat(lease))


async def by_a_rotated_key(scene: Scene) -> Act:
    device, new = laptop(scene), Person("new")
    scene.operator("users", "devices", "rotate", scene.alice.name, device.name, "--public-key", new.public.hex())
    await scene.lease(person=new)
    return scene.asking(await scene.request(person=device))


async def not_in_the_policy(scene: Scene) -> Act:
    """The registry lets Alice; the policy's rule for the instance is for somebody else."""
    digest = await manifest(scene)
    replica = await scene.replica(instances=[{"manifest": digest, "users": ["somebody-else"]}])
    return scene.asking(await scene.request(), stub=replica.stub)


async def not_listed(scene: Scene) -> Act:
    replica = await scene.replica(instances=[{"manifest": "ab" * 32}])
    return scene.asking(await scene.request(), stub=replica.stub)


async def of_another_kind(scene: Scene) -> Act:
    replica = await scene.replica(instances=[{"manifest": await manifest(scene), "kind": "shared"}])
    return scene.asking(await scene.request(), stub=replica.stub)


async def manifest(scene: Scene) -> str:
    """SHA-256 of the signed manifest of Alice's instance."""
    return (await scene.lease()).manifest_digest.hex()


async def outside_of_the_domain(scene: Scene) -> Act:
    """An instance of a domain that several share, and Alice, who is not one of them."""
    others = scene.world.instance(owner=mallory(scene))
    return scene.asking(await scene.request(instance=others))


DELEGATIONS = Section(
    "Delegations",
    "A user's signed word for one enclave. A genuine enclave in the wrong hands gets nobody's keys, and nobody's word "
    "works for another enclave, instance or time.",
    "service",
    (
        *(case for rows in ALTERED.values() for case in rows),
        word(
            "a delegation for another enclave's key", "`enclave_key`, and signed so",
            lambda scene: scene.delegate(enclave_key=b"k" * 32),
        ),
        word(
            "a delegation for another measurement", "`measurement`, and signed so",
            lambda scene: scene.delegate(measurement=b"m" * 32),
        ),
        word(
            "a delegation for another instance", "`instance`, and signed so",
            lambda scene: scene.delegate(instance="0" * 32),
        ),
        word("an expired delegation", "`expires`: now", lambda scene: scene.delegate(expires=scene.now)),
        word(
            "an endless delegation", "`expires`: beyond what the policy allows",
            lambda scene: scene.delegate(expires=scene.now + DELEGATION_LIFE_LIMIT + 61),
        ),
        word(
            "a delegation that names Alice, signed by Mallory", "the signer",
            lambda scene: mallory(scene).delegate(
                scene.enclave, scene.instance.id, user=scene.alice.public, expires=scene.now + 60
            ),
        ),
        word("a delegation without a signature", "64 zeros", unsigned),
        word("another document of the same fields, signed by Alice", "`ctx`, and signed so", another_document),
        word("a delegation cut by a byte", "one byte less", tail(1)),
        word("a delegation with a byte after it", "one byte more", tail(0, b"\x00")),
        word("no delegation", "nothing", lambda scene: b""),
        word("a delegation larger than any", "4,097 bytes", lambda scene: bytes(4097)),
        Case("Alice's delegation in the hands of another genuine enclave", "the enclave", WORD,
             stolen_by_another_enclave),
        word(
            "a delegation of somebody who was never registered", "the user",
            lambda scene: scene.delegate(Person("eve")), USER,
        ),
        Case("another user's delegation for Alice's instance", "the user", USER, of_another_user),
        Case("a delegation for the instance of somebody else's domain", "the instance", USER, outside_of_the_domain),
        Case("a delegation for a shared instance by somebody who is no member", "the user", USER,
             for_a_shared_instance),
        Case("the grant of a shared instance for somebody who is no member", "the user", USER, grant_for_a_stranger),
        Case("a delegation of a member who was disallowed", "`users disallow`", USER, disallowed),
        Case("a heartbeat for a member who was disallowed", "`users disallow`", USER,
             of_a_disallowed_member_that_runs, event="renewal"),
        Case("a delegation of a disabled user", "`users disable`", USER, disabled),
        Case("a heartbeat for a disabled user", "`users disable`", USER, disabled_while_it_runs, event="renewal"),
        Case("a delegation of a removed user", "`users remove`", USER, removed),
        Case("a heartbeat for a removed user", "`users remove`", USER, removed_while_it_runs, event="renewal"),
        Case("a delegation of a shredded user", "`users shred`", USER, shredded),
        Case("a delegation signed by a removed device", "`users devices remove`", USER, by_a_removed_device),
        Case("a heartbeat under a removed device's word", "`users devices remove`", USER,
             by_a_removed_device_that_runs, event="renewal"),
        Case("a delegation signed by a key that was rotated away", "`users devices rotate`", USER, by_a_rotated_key),
        Case("a delegation of a user whom the policy's rule does not name", "`[[instances]] users`", USER,
             not_in_the_policy),
        Case("a delegation for an instance that the policy does not list", "`[[instances]] manifest`", INSTANCE,
             not_listed),
        Case("a delegation for an instance that the policy lists as another kind", "`[[instances]] kind`", INSTANCE,
             of_another_kind),
    ),
    own=True,
)  # fmt: skip
