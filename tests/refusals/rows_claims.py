"""Claims: every field altered, once behind the quote's back and once before quoting."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from stip_protocol.release import Claims
from tests.refusals.forge import spki
from tests.refusals.scene import Scene, altered
from tests.refusals.table import Act, Case, Section

Value = Callable[[Scene], Awaitable[Any]]


def given(value: Any) -> Value:
    """A value that does not depend on the scene."""

    async def of(scene: Scene) -> Any:
        return value

    return of


async def another_challenge(scene: Scene) -> bytes:
    return bytes((await scene.world.challenge()).nonce)


async def another_link_key(scene: Scene) -> bytes:
    return scene.new_enclave().link_spki


async def another_instance(scene: Scene) -> str:
    return scene.world.instance(owner=scene.alice).id


def after_quoting(field: str, told: str, value: Value, code: str = "report_data_mismatch") -> Case:
    async def arrange(scene: Scene) -> Act:
        claims, word, enclave = await scene.claims()
        sent = altered(claims, field, await value(scene))
        assert sent != claims.to_bytes()
        return scene.asking(enclave.request(sent, word, quoted=claims.to_bytes()))

    readable = code not in ("frame_invalid", "version_unsupported")
    return Case(
        f"claims whose {field} was altered after quoting",
        f"`{field}`: {told}, under the quote of the claims as they were",
        code,
        arrange,
        event="release" if readable else None,
    )


def before_quoting(field: str, told: str, value: Value, code: str) -> Case:
    async def arrange(scene: Scene) -> Act:
        claims, word, enclave = await scene.claims()
        sent = altered(claims, field, await value(scene))
        return scene.asking(enclave.request(sent, word))

    readable = code not in ("frame_invalid", "version_unsupported")
    return Case(
        f"quoted claims with {told} as {field}",
        f"`{field}`: {told}, and quoted so",
        code,
        arrange,
        event="release" if readable else None,
    )


P384 = spki(ec.generate_private_key(ec.SECP384R1()))

AFTER: dict[str, Case] = {
    field: after_quoting(field, told, value, *code)
    for field, told, value, *code in (
        ("ctx", "of another document", given("stip/delegation"), "frame_invalid"),
        ("version", "another major version", given([2, 0]), "version_unsupported"),
        ("nonce", "another challenge of the service", another_challenge),
        ("hpke_key", "a thief's key", given(bytes([9]) + bytes(31))),
        ("tls_key", "another enclave's key", given(b"k" * 32)),
        ("link_key", "another enclave's key", another_link_key),
        ("service", "another key service", given(b"s" * 32), "release_refused"),
        ("delegation", "another delegation's digest", given(b"d" * 32)),
        ("kind", "the grant instead of the bundle", given("grant")),
        ("instance", "another instance of the same user", another_instance),
        ("tokens", "more tokens", given(999)),
        ("epochs", "an epoch that the enclave did not name", given([0])),
    )
}
"""By field, so that a test can say that none is missing."""

BEFORE: dict[str, tuple[Case, ...]] = {
    field: tuple(before_quoting(field, told, value, code) for told, value, code in rows)
    for field, rows in {
        "ctx": (("the context of a delegation", given("stip/delegation"), "frame_invalid"),),
        "version": (
            ("another major version", given([2, 0]), "version_unsupported"),
            ("no version number", given("1.1"), "frame_invalid"),
        ),
        "nonce": (
            ("a nonce that nobody issued", given(bytes(32)), "nonce_refused"),
            ("31 bytes", given(bytes(31)), "frame_invalid"),
        ),
        "hpke_key": (
            ("a point of small order", given(bytes(32)), "request_invalid"),
            ("33 bytes", given(bytes(33)), "frame_invalid"),
        ),
        "tls_key": (
            ("the key of an enclave that nobody delegated to", given(b"k" * 32), "delegation_refused"),
            ("no bytes", given(b""), "frame_invalid"),
        ),
        "link_key": (
            ("bytes that are no key", given(bytes(91)), "request_invalid"),
            ("a P-384 key", given(P384), "request_invalid"),
            ("more bytes than a key has", given(bytes(4097)), "frame_invalid"),
        ),
        "service": (("another key service", given(b"s" * 32), "release_refused"),),
        "delegation": (("another delegation's digest", given(b"d" * 32), "delegation_refused"),),
        "kind": (
            ("the grant of a dedicated instance", given("grant"), "instance_refused"),
            ("a kind that does not exist", given("everything"), "frame_invalid"),
        ),
        "instance": (
            ("another instance than the delegation's", another_instance, "delegation_refused"),
            ("a path instead of an id", given("../../etc/shadow"), "frame_invalid"),
        ),
        "tokens": (
            ("a negative number", given(-1), "frame_invalid"),
            ("a number beyond all bounds", given(2**41), "frame_invalid"),
            ("text", given("100"), "frame_invalid"),
        ),
        "epochs": (
            ("an epoch that was never released", given([7]), "instance_refused"),
            ("seventeen epochs", given(list(range(17))), "frame_invalid"),
        ),
    }.items()
}

FIELDS = frozenset(Claims.model_fields) | {"ctx", "version"}


async def an_unknown_field(scene: Scene) -> Act:
    claims, word, enclave = await scene.claims()
    return scene.asking(enclave.request(altered(claims, "debug", True), word, quoted=claims.to_bytes()))


async def not_canonical(scene: Scene) -> Act:
    claims, word, enclave = await scene.claims()
    data = claims.to_bytes()
    assert data[0] & 0xE0 == 0xA0
    count = data[0] & 0x1F
    longer = bytes([0xB8, count]) + data[1:]
    return scene.asking(enclave.request(longer, word))


async def trailing(scene: Scene) -> Act:
    claims, word, enclave = await scene.claims()
    return scene.asking(enclave.request(claims.to_bytes() + b"\x00", word))


async def of_another_enclave(scene: Scene) -> Act:
    """Evidence for the claims of another one, both genuine."""
    claims, word, _ = await scene.claims()
    other, other_word, enclave = await scene.claims(enclave=scene.new_enclave())
    request = enclave.request(other, other_word)
    request.claims, request.delegation = claims.to_bytes(), word
    return scene.asking(request)


CLAIMS = Section(
    "Claims",
    "What an enclave's quote vouches for. A field that is altered after quoting is another claim than the quoted one; "
    "a field that the enclave itself filled wrongly is refused for what it says.",
    "service",
    (
        *AFTER.values(),
        *(case for cases in BEFORE.values() for case in cases),
        Case(
            "claims with a field added after quoting",
            "an unknown field more",
            "report_data_mismatch",
            an_unknown_field,
        ),
        Case(
            "claims in another CBOR form of the same meaning",
            "the map's head",
            "frame_invalid",
            not_canonical,
            event=None,
        ),
        Case("claims with a byte after them", "one byte more", "frame_invalid", trailing, event=None),
        Case(
            "genuine claims under another enclave's genuine quote",
            "claims and delegation of one, evidence of another",
            "report_data_mismatch",
            of_another_enclave,
        ),
    ),
)
