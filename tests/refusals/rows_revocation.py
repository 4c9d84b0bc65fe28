"""What was taken back: revocations of every kind, instances and epochs that are not served, policies that changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.keyservice.conftest import MEASUREMENT, MadeInstance, cell, no_cell
from tests.refusals.rows_enclave import OTHER
from tests.refusals.scene import Scene
from tests.refusals.table import Act, Case, Rules, Section

REVOKED, INSTANCE, LEAKAGE = "lease_revoked", "instance_refused", "leakage_refused"
SUBJECTS: dict[str, tuple[Callable[[Scene], str], str]] = {
    "user": (lambda scene: scene.alice.name, "user_refused"),
    "device": (lambda scene: scene.world.user(scene.alice).devices[0].id, "user_refused"),
    "enclave": (lambda scene: scene.enclave.tls_key.hex(), "enclave_revoked"),
    "measurement": (lambda scene: MEASUREMENT.hex(), "enclave_revoked"),
    "instance": (lambda scene: scene.instance.id, INSTANCE),
    "epoch": (lambda scene: f"{scene.instance.id}/0", INSTANCE),
}
"""By kind of `stip-keyservice revoke`: who it is in a scene, and what a release is refused with."""


def revoke(scene: Scene, kind: str) -> None:
    """As an operator; lifted again when the case is over, for the neighbour runs the same code."""
    made = scene.operator("revoke", kind, SUBJECTS[kind][0](scene), "--reason", "a row of the table")
    number = str(made["revocation"] if "revocation" in made else made["number"])
    scene.finally_(lambda: scene.operator("revocations", "lift", number))


def release_after(kind: str) -> Case:
    async def arrange(scene: Scene) -> Act:
        await scene.lease()
        request = await scene.request()
        revoke(scene, kind)
        return scene.asking(request)

    return Case(f"a release after its {kind} was revoked", f"`revoke {kind}`", SUBJECTS[kind][1], arrange)


def heartbeat_after(kind: str) -> Case:
    async def arrange(scene: Scene) -> Act:
        lease = await scene.lease()
        revoke(scene, kind)
        return scene.renewing(scene.heartbeat(lease))

    return Case(f"a heartbeat after its {kind} was revoked", f"`revoke {kind}`", REVOKED, arrange, event="renewal")


async def after_lifting(scene: Scene) -> Act:
    """Lifting lets new releases through; what was ended stays so."""
    lease = await scene.lease()
    revoke(scene, "user")
    scene.repair()
    await scene.lease()
    return scene.renewing(scene.heartbeat(lease))


REVOCATIONS = Section(
    "Revocations",
    "`stip-keyservice revoke` refuses new releases at once and ends every lease of its subject. Lifting it brings back "
    "none of them.",
    "service",
    (
        *(release_after(kind) for kind in SUBJECTS),
        *(heartbeat_after(kind) for kind in SUBJECTS),
        Case("a heartbeat after its user's revocation was lifted", "`revocations lift`", REVOKED, after_lifting,
             event="renewal"),
    ),
    own=True,
)  # fmt: skip


def next_epoch(scene: Scene, *, activate: bool = False, drain: int | None = 0) -> MadeInstance:
    """A second epoch of Alice's instance; with `activate`, the first one drains for `drain` seconds."""
    made = scene.world.instance(owner=scene.alice, instance=scene.instance.id, epoch=1)
    if activate:
        drained = [] if drain is None else ["--drain-seconds", str(drain)]
        scene.operator("epochs", "activate", scene.instance.id, "1", *drained)
    return made


async def unknown(scene: Scene) -> Act:
    nobody = MadeInstance(scene.instance.directory, "0" * 32, b"", "hardened")
    return scene.asking(await scene.request(instance=nobody))


async def removed(scene: Scene) -> Act:
    request = await scene.request()
    scene.operator("instances", "remove", scene.instance.id)
    return scene.asking(request)


async def removed_while_it_runs(scene: Scene) -> Act:
    lease = await scene.lease()
    scene.operator("instances", "remove", scene.instance.id)
    return scene.renewing(scene.heartbeat(lease))


async def standby(scene: Scene) -> Act:
    next_epoch(scene)
    return scene.asking(await scene.request(epochs=(1,)))


async def drained(scene: Scene) -> Act:
    next_epoch(scene, activate=True)
    return scene.asking(await scene.request(epochs=(0,)))


async def drained_while_it_runs(scene: Scene) -> Act:
    lease = await scene.lease()
    next_epoch(scene, activate=True)
    return scene.renewing(scene.heartbeat(lease))


async def retired(scene: Scene) -> Act:
    next_epoch(scene, activate=True)
    scene.operator("epochs", "retire", scene.instance.id, "0")
    return scene.asking(await scene.request(epochs=(0,)))


async def retired_while_it_runs(scene: Scene) -> Act:
    lease = await scene.lease()
    next_epoch(scene, activate=True, drain=None)
    scene.operator("epochs", "retire", scene.instance.id, "0", "--now")
    return scene.renewing(scene.heartbeat(lease))


async def retired_standby(scene: Scene) -> Act:
    next_epoch(scene)
    scene.operator("epochs", "retire", scene.instance.id, "1")
    return scene.asking(await scene.request(epochs=(1,)))


INSTANCES = Section(
    "Instances and epochs",
    "An instance is released by its active epoch, and while an earlier one drains, by that to enclaves that hold no "
    "other.",
    "service",
    (
        Case("a release of an instance that nobody knows", "the instance", INSTANCE, unknown),
        Case("a release of an instance that was removed", "`instances remove`", INSTANCE, removed),
        Case("a heartbeat for an instance that was removed", "`instances remove`", INSTANCE, removed_while_it_runs,
             event="renewal"),
        Case("a release of an epoch that stands by", "`epochs`", INSTANCE, standby),
        Case("a release of an epoch that has drained", "`epochs activate`", INSTANCE, drained),
        Case("a heartbeat for an epoch that has drained", "`epochs activate`", INSTANCE, drained_while_it_runs,
             event="renewal"),
        Case("a release of an epoch that was retired", "`epochs retire`", INSTANCE, retired),
        Case("a heartbeat for an epoch that was retired", "`epochs retire --now`", INSTANCE, retired_while_it_runs,
             event="renewal"),
        Case("a release of an epoch that was retired before it was ever released", "`epochs retire`", INSTANCE,
             retired_standby),
    ),
    own=True,
)  # fmt: skip
MAXIMUM: dict[str, Any] = {"knowledge": ["server"], "metric": "token_top1", "at_most": 0.2}
MAXIMA: Rules = {"leakage": {"maxima": [MAXIMUM]}}


def leaky(name: str, told: str, *cells: Any, rules: Rules = MAXIMA) -> Case:
    async def arrange(scene: Scene) -> Act:
        made = scene.world.instance(owner=scene.alice, measured=cells or None)
        return scene.asking(await scene.request(instance=made))

    return Case(name, told, LEAKAGE, arrange, rules=rules)


async def stricter_leakage(scene: Scene) -> Act:
    lease = await scene.lease()
    replica = await scene.replica(leakage={"required": True})
    return scene.renewing(scene.heartbeat(lease), stub=replica.stub)


def stricter(name: str, told: str, code: str, **rules: Any) -> Case:
    """A lease of yesterday's policy, and a heartbeat under today's."""

    async def arrange(scene: Scene) -> Act:
        lease = await scene.lease()
        replica = await scene.replica(**rules)
        return scene.renewing(scene.heartbeat(lease), stub=replica.stub)

    return Case(name, told, code, arrange, event="renewal")


LEAKS = Section(
    "Leakage",
    "What an audit of the instance measured, in its signed manifest, against the policy's maxima.",
    "service",
    (
        leaky("a release of an instance that nobody audited", "`[leakage] required`",
              rules={"leakage": {"required": True}}),
        leaky("a release of an instance without the figure that the policy bounds", "no audit"),
        leaky("a release of an instance above a maximum", "`token_top1`: 0.41 where 0.2 is allowed",
              cell("server", "A", token_top1=0.41)),
        leaky("a release of an instance whose audit tried one attack above the maximum", "one of two attacks",
              cell("server", "A", token_top1=0.1), cell("server", "B", token_top1=0.21)),
        leaky("a release of an instance whose audit left out who is bounded", "the knowledge `server`",
              no_cell("base", "D")),
        leaky("a release of an instance whose audit measured something else", "the metric",
              cell("server", "A", rouge_l=0.1)),
        Case("a heartbeat for an instance that nobody audited, under a policy that asks for it", "the policy", LEAKAGE,
             stricter_leakage, event="renewal"),
    ),
    own=True,
)  # fmt: skip
POLICIES = Section(
    "Policies of today",
    "Each heartbeat is held against the policy in force, not against the one of the release.",
    "service",
    (
        stricter("a heartbeat of code that the policy does not accept any more", "`measurements`",
                 "measurement_refused", evidence={"measurements": [OTHER.hex()]}),
        stricter("a heartbeat from a platform that is not enrolled any more", "`platforms`", "evidence_refused",
                 evidence={"platforms": ["ab" * 16]}),
        stricter("a heartbeat from a platform whose TCB status is not accepted any more", "`accepted_statuses`",
                 "evidence_refused", evidence={"accepted_statuses": [{"status": "SWHardeningNeeded"}]}),
        stricter("a heartbeat for an instance that is not listed any more", "`[[instances]]`", INSTANCE,
                 instances=[{"manifest": "ab" * 32}]),
    ),
    own=True,
)  # fmt: skip
