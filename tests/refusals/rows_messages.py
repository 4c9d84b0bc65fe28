"""Messages: heartbeats and watches altered, documents of the wrong type, sizes beyond all bounds, and too many."""

from __future__ import annotations

import secrets
from typing import Any

import grpc.aio

from stip_protocol import canonical
from stip_protocol.release import Heartbeat, Watch
from stip_protocol.rpc import MESSAGE_BYTES
from stip_protocol.wire import keyservice_pb2
from tests.refusals.scene import Scene, refused
from tests.refusals.table import Act, Case, Section

SIGNATURE, FRAME, OVERLOADED = "signature_invalid", "frame_invalid", "overloaded"


def beat_altered(field: str, value: Any, code: str = SIGNATURE) -> Case:
    """One field of a heartbeat, under the signature of the one that the enclave made."""

    async def arrange(scene: Scene) -> Act:
        request = scene.heartbeat(await scene.lease(), nonce=secrets.token_bytes(32))
        raw = canonical.decode(request.heartbeat, what="heartbeat")
        assert raw[field] != value
        request.heartbeat = canonical.encode(raw | {field: value})
        return scene.renewing(request)

    readable = code not in (FRAME, "version_unsupported")
    return Case(
        f"a heartbeat whose {field} was altered after signing", f"`{field}`", code, arrange,
        event="renewal" if readable else None,
    )  # fmt: skip


BEATS = {
    "ctx": beat_altered("ctx", "stip/watch", FRAME),
    "version": beat_altered("version", [2, 0], "version_unsupported"),
    "handle": beat_altered("handle", bytes(16), "lease_foreign"),
    "serial": beat_altered("serial", 1),
    "nonce": beat_altered("nonce", bytes(32)),
    "fed": beat_altered("fed", 7),
    "wanted": beat_altered("wanted", 1000),
}
BEAT_FIELDS = frozenset(Heartbeat.model_fields) | {"ctx", "version"}


def watch_altered(field: str, value: Any, code: str = SIGNATURE) -> Case:
    async def arrange(scene: Scene) -> Act:
        await scene.lease()
        request = await scene.watch()
        raw = canonical.decode(request.watch, what="watch")
        request.watch = canonical.encode(raw | {field: value})
        return scene.watching(request)

    return Case(f"a watch whose {field} was altered after signing", f"`{field}`", code, arrange, event=None)


WATCHES = {
    "ctx": watch_altered("ctx", "stip/heartbeat"),
    "version": watch_altered("version", [2, 0]),
    "nonce": watch_altered("nonce", bytes(32)),
    "link_key": watch_altered("link_key", bytes(32)),
}
WATCH_FIELDS = frozenset(Watch.model_fields) | {"ctx", "version"}


async def anothers_lease(scene: Scene) -> Act:
    """Mallory's enclave has learned the handle of Alice's lease."""
    lease = await scene.lease()
    return scene.renewing(scene.heartbeat(lease, signer=scene.new_enclave()))


async def anothers_handle(scene: Scene) -> Act:
    """A good heartbeat of Mallory's over Alice's handle."""
    alices = await scene.lease()
    mallory, enclave = scene.person("mallory"), scene.new_enclave()
    await scene.lease(person=mallory, enclave=enclave, instance=scene.world.instance(owner=mallory))
    return scene.renewing(scene.heartbeat(alices, signer=enclave))


async def watch_by_another(scene: Scene) -> Act:
    await scene.lease()
    return scene.watching(await scene.watch(signer=scene.new_enclave()))


async def watch_of_anothers_key(scene: Scene) -> Act:
    """Mallory signs with a key of her own, and names Alice's."""
    await scene.lease()
    thief = scene.new_enclave()
    return scene.watching(await scene.watch(signer=thief, link_key=thief.link_spki))


async def watch_of_nobody(scene: Scene) -> Act:
    """A link key that no lease names."""
    scene.enclave = scene.new_enclave()
    return scene.watching(await scene.watch())


HEARTBEATS = Section(
    "Heartbeats and watches",
    "Signed by the link key that the lease names: one field altered is another message than the signed one.",
    "service",
    (
        *BEATS.values(),
        Case("a heartbeat over Alice's lease by another enclave", "who signs", SIGNATURE, anothers_lease,
             event="renewal"),
        Case("a heartbeat over Alice's lease by an enclave that has a lease of its own", "the handle", SIGNATURE,
             anothers_handle, event="renewal"),
        *WATCHES.values(),
        Case("a watch over Alice's link key by another enclave", "who signs", SIGNATURE, watch_by_another, event=None),
        Case("a watch by a key of one's own that names Alice's", "`link_key`", SIGNATURE, watch_of_anothers_key,
             event=None),
        Case("a watch by a key that no lease names", "the link key", "lease_foreign", watch_of_nobody, event=None),
    ),
)  # fmt: skip


def release_part(name: str, told: str, code: str, **parts: Any) -> Case:
    async def arrange(scene: Scene) -> Act:
        request = await scene.request()
        for part, value in parts.items():
            setattr(request, part, value)
        return scene.asking(request)

    return Case(name, told, code, arrange, event=None if code == FRAME else "release")


def renewal_part(name: str, told: str, code: str = FRAME, **parts: Any) -> Case:
    async def arrange(scene: Scene) -> Act:
        request = scene.heartbeat(await scene.lease())
        for part, value in parts.items():
            setattr(request, part, value)
        return scene.renewing(request)

    return Case(name, told, code, arrange, event=None if code == FRAME else "renewal")


def watch_part(name: str, told: str, code: str = FRAME, **parts: Any) -> Case:
    async def arrange(scene: Scene) -> Act:
        await scene.lease()
        request = await scene.watch()
        for part, value in parts.items():
            setattr(request, part, value)
        return scene.watching(request)

    return Case(name, told, code, arrange, event=None)


async def delegation_as_claims(scene: Scene) -> Act:
    request = await scene.request()
    request.claims = scene.delegate()
    return scene.asking(request)


async def watch_as_heartbeat(scene: Scene) -> Act:
    request = scene.heartbeat(await scene.lease())
    watch = await scene.watch()
    request.heartbeat, request.signature = watch.watch, watch.signature
    return scene.renewing(request)


async def heartbeat_as_watch(scene: Scene) -> Act:
    beat = scene.heartbeat(await scene.lease())
    request = await scene.watch()
    request.watch, request.signature = beat.heartbeat, beat.signature
    return scene.watching(request)


async def beyond_the_transport(scene: Scene) -> Act:
    request = await scene.request()
    request.collateral = bytes(MESSAGE_BYTES)
    channel = grpc.aio.secure_channel(
        f"127.0.0.1:{scene.world.port}",
        grpc.ssl_channel_credentials(scene.world.home.tls_ca.pem),
        options=[
            ("grpc.ssl_target_name_override", "localhost"),
            ("grpc.max_send_message_length", -1),
            ("grpc.use_local_subchannel_pool", 1),
        ],
    )
    call = channel.unary_unary("/stip.keyservice.v1.KeyService/Release")
    data = request.SerializeToString()
    return lambda: call(data)


async def raw(scene: Scene, method: str, data: bytes) -> Act:
    channel = await scene.service.channel()
    call = channel.unary_unary(f"/stip.keyservice.v1.KeyService/{method}")
    return lambda: call(data)


MESSAGES = Section(
    "Messages",
    "Sizes and types, at every call. Nothing is allocated, parsed or verified for what is larger than it can be; what "
    "the transport itself refuses has no code of ours.",
    "service",
    (
        release_part("a release with claims larger than any", "8,193 bytes", FRAME, claims=bytes(8193)),
        release_part("a release without claims", "nothing", FRAME, claims=b""),
        release_part("a release with claims that are no CBOR", "every byte", FRAME, claims=b"\xff" * 64),
        release_part("a release with claims nested without end", "every byte", FRAME, claims=b"\x81" * 4000),
        Case("a delegation as claims", "the document", FRAME, delegation_as_claims, event=None),
        renewal_part("a heartbeat larger than any", "1,025 bytes", heartbeat=bytes(1025)),
        renewal_part("a heartbeat's signature larger than any", "129 bytes", signature=bytes(129)),
        renewal_part("a heartbeat without a signature", "nothing", SIGNATURE, signature=b""),
        renewal_part("no heartbeat", "nothing", heartbeat=b""),
        renewal_part("a heartbeat that is no CBOR", "every byte", heartbeat=b"\xff" * 64),
        Case("a watch as a heartbeat, as it was signed", "the document", FRAME, watch_as_heartbeat, event=None),
        watch_part("a watch larger than any", "1,025 bytes", watch=bytes(1025)),
        watch_part("a watch's signature larger than any", "129 bytes", signature=bytes(129)),
        watch_part("a watch's link key larger than any", "4,097 bytes", link_key=bytes(4097)),
        watch_part("a watch with a link key that is none", "91 zeros", "request_invalid", link_key=bytes(91)),
        watch_part("a watch without a signature", "nothing", SIGNATURE, signature=b""),
        Case("a heartbeat as a watch, as it was signed", "the document", SIGNATURE, heartbeat_as_watch, event=None),
        Case("a message larger than any", "beyond the transport's limit", "unavailable", beyond_the_transport,
             event=None, counted=False),
        Case("bytes that are no message", "every byte", "unavailable",
             lambda scene: raw(scene, "Release", b"\xff" * 64), event=None, counted=False),
        Case("a call that does not exist", "the method", "unavailable",
             lambda scene: raw(scene, "Grant", b""), event=None, counted=False),
    ),
)  # fmt: skip
BURST = 2
FEW = {"per_second": 0.01, "burst": BURST}


async def many_challenges(scene: Scene) -> Act:
    stub = await scene.service.stub("127.0.0.2")
    for _ in range(BURST):
        await stub.Challenge(keyservice_pb2.ChallengeRequest())
    return lambda: stub.Challenge(keyservice_pb2.ChallengeRequest())


async def many_releases(scene: Scene) -> Act:
    stub = await scene.service.stub("127.0.0.2")
    for _ in range(BURST):
        await stub.Release(await scene.request())
    return scene.asking(await scene.request(), stub=stub)


async def many_renewals(scene: Scene) -> Act:
    """Of a lease that the attacker does not hold: nothing proves that they may."""
    lease = await scene.lease()
    stub, thief = await scene.service.stub("127.0.0.2"), scene.new_enclave()
    for at in range(BURST):
        error = await refused(stub.Renew(scene.heartbeat(lease, signer=thief, serial=at)))
        assert error.code == SIGNATURE
    return scene.renewing(scene.heartbeat(lease, signer=thief, serial=9), stub=stub)


async def many_watches(scene: Scene) -> Act:
    await scene.lease()
    stub = await scene.service.stub("127.0.0.2")
    for _ in range(BURST):
        call = stub.Watch(await scene.watch())
        await call.read()
        scene.finally_(call.cancel)
    return scene.watching(await scene.watch(), stub=stub)


async def open_watches(scene: Scene) -> Act:
    await scene.lease()
    call = scene.world.stub.Watch(await scene.watch())
    await call.read()
    scene.finally_(call.cancel)
    other, enclave = scene.person("other"), scene.new_enclave()
    await scene.lease(person=other, enclave=enclave, instance=scene.world.instance(owner=other))
    scene.enclave = enclave
    return scene.watching(await scene.watch())


RATES = Section(
    "Limits",
    "One peer asks for more than its share, and everybody else is served. The refusal says when to try again.",
    "service",
    (
        Case("more challenges than a peer may ask for", "how many", OVERLOADED, many_challenges, event=None,
             limits={"rates": {"challenge": FEW}}),
        Case("more releases than a peer may ask for", "how many", OVERLOADED, many_releases, event=None,
             limits={"rates": {"release": FEW}}),
        Case("more heartbeats of others' leases than a peer may send", "how many", OVERLOADED, many_renewals,
             event=None, limits={"rates": {"renewal": FEW}}),
        Case("more watches than a peer may ask for", "how many", OVERLOADED, many_watches, event=None,
             limits={"rates": {"watch": FEW}}),
        Case("more open watches than the process keeps", "how many", OVERLOADED, open_watches, event=None,
             limits={"watches": 1}),
    ),
)  # fmt: skip
