"""Quotes: every field altered, by its name in Intel's layout; what follows a quote, and what is no quote of SGX."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from stip_protocol.attestation.quote import TEE_TDX
from tests.refusals.scene import Scene
from tests.refusals.table import Act, Case, Section

REPORT = (
    ("CPUSVN", 16),
    ("MISCSELECT", 4),
    ("reserved after MISCSELECT", 12),
    ("ISVEXTPRODID", 16),
    ("ATTRIBUTES.FLAGS", 8),
    ("ATTRIBUTES.XFRM", 8),
    ("MRENCLAVE", 32),
    ("reserved after MRENCLAVE", 32),
    ("MRSIGNER", 32),
    ("reserved after MRSIGNER", 32),
    ("CONFIGID", 64),
    ("ISVPRODID", 2),
    ("ISVSVN", 2),
    ("CONFIGSVN", 2),
    ("reserved after CONFIGSVN", 42),
    ("ISVFAMILYID", 16),
    ("REPORTDATA", 64),
)
"""Intel SDM volume 3D, table 37-21: 384 bytes."""
MALFORMED, REFUSED = "evidence_malformed", "evidence_refused"


class Field(NamedTuple):
    name: str
    offset: int
    size: int
    code: str


def laid_out(*fields: tuple[str, int, str]) -> tuple[Field, ...]:
    """Fields with their offsets, one after the other."""
    made: list[Field] = []
    for name, size, code in fields:
        made.append(Field(name, made[-1].offset + made[-1].size if made else 0, size, code))
    return tuple(made)


QUOTE_V3 = laid_out(
    ("version", 2, MALFORMED),
    ("attestation key type", 2, MALFORMED),
    ("TEE type", 4, MALFORMED),
    ("QE SVN", 2, REFUSED),
    ("PCE SVN", 2, REFUSED),
    ("QE vendor id", 16, MALFORMED),
    ("user data", 20, REFUSED),
    *((name, size, REFUSED) for name, size in REPORT),
    ("signature data length", 4, MALFORMED),
    ("signature", 64, REFUSED),
    ("attestation key", 64, REFUSED),
    *((f"QE report {name}", size, REFUSED) for name, size in REPORT),
    ("QE report signature", 64, REFUSED),
    ("QE authentication data length", 2, MALFORMED),
    ("QE authentication data", 32, REFUSED),
    ("certification data type", 2, MALFORMED),
    ("certification data size", 4, MALFORMED),
)
"""Everything before the PEM of the PCK chain."""
CHAIN = QUOTE_V3[-1].offset + QUOTE_V3[-1].size


def flipped(quote: bytes, offset: int) -> bytes:
    data = bytearray(quote)
    data[offset] ^= 1
    return bytes(data)


def sized(quote: bytes, chain: bytes) -> bytes:
    """The quote with another PCK chain, its lengths in order."""
    signature = CHAIN - 436 + len(chain)
    return quote[:432] + signature.to_bytes(4, "little") + quote[436:1048] + len(chain).to_bytes(4, "little") + chain


Alter = Callable[[bytes, Scene], bytes]


def quoted(name: str, told: str, code: str, alter: Alter, *, says: str = "") -> Case:
    async def arrange(scene: Scene) -> Act:
        request = await scene.request()
        request.quote = alter(request.quote, scene)
        return scene.asking(request)

    return Case(name, told, code, arrange, says=says)


def covered_by(field: Field) -> str:
    """What a verifier says of a field that only a signature or a hash covers."""
    if field.code == MALFORMED:
        return ""
    if field.offset < 500:
        return "ISV enclave report signature"
    return "hash mismatch" if field.name in ("attestation key", "QE authentication data") else "qe_report"


def field_row(field: Field) -> Case:
    return quoted(
        f"a quote whose {field.name} was altered",
        f"{field.name}: bit 0 of byte {field.offset}",
        field.code,
        lambda quote, scene: flipped(quote, field.offset),
        says=covered_by(field),
    )


def pems(quote: bytes) -> list[bytes]:
    """Leaf, CA, root as they stand in the quote."""
    end = b"-----END CERTIFICATE-----\n"
    return [part + end for part in quote[CHAIN:].rstrip(b"\x00").split(end)[:-1]]


def elsewhere_leaf(quote: bytes, scene: Scene) -> bytes:
    """Another platform's certificate over the same key would do; this one has another key."""
    other = scene.stranger_forge.pki
    _, authority, root = pems(quote)
    return sized(quote, other.chain("pck").encode() + authority + root + b"\x00")


def elsewhere_root(quote: bytes, scene: Scene) -> bytes:
    leaf, authority, _ = pems(quote)
    return sized(quote, leaf + authority + scene.stranger_forge.pki.chain("root").encode() + b"\x00")


def elsewhere_authority(quote: bytes, scene: Scene) -> bytes:
    leaf, _, root = pems(quote)
    return sized(quote, leaf + scene.stranger_forge.pki.chain("pck_ca").encode() + root + b"\x00")


def reordered(quote: bytes, scene: Scene) -> bytes:
    leaf, authority, root = pems(quote)
    return sized(quote, root + authority + leaf + b"\x00")


def tdx(quote: bytes, scene: Scene) -> bytes:
    return scene.world.platform.host_quote(bytes(48), quote[368:432])


CHAIN_ROWS = (
    quoted("a quote whose PCK certificate is another platform's", "the PEM of the leaf", REFUSED, elsewhere_leaf),
    quoted("a quote whose PCK CA is another hierarchy's", "the PEM of the CA", REFUSED, elsewhere_authority),
    quoted("a quote whose embedded root is another hierarchy's", "the PEM of the root", REFUSED, elsewhere_root),
    quoted("a quote whose PCK chain stands in another order", "root first", REFUSED, reordered),
    quoted(
        "a quote without the root in its PCK chain", "the PEM of the root, left out", REFUSED,
        lambda quote, scene: sized(quote, b"".join(pems(quote)[:2]) + b"\x00"),
    ),
    quoted(
        "a quote with a fourth certificate in its PCK chain", "the PEM of the root, twice", MALFORMED,
        lambda quote, scene: sized(quote, b"".join([*pems(quote), pems(quote)[2]]) + b"\x00"),
    ),
    quoted(
        "a quote with text between the certificates of its PCK chain", "a line more", MALFORMED,
        lambda quote, scene: sized(quote, b"\n# debug\n".join(pems(quote)) + b"\x00"),
    ),
    quoted(
        "a quote whose PCK chain has other line breaks", "CRLF in the PEM", MALFORMED,
        lambda quote, scene: sized(quote, quote[CHAIN:].replace(b"\n", b"\r\n")),
    ),
    quoted(
        "a quote whose PCK chain ends with two NULs", "a NUL more", MALFORMED,
        lambda quote, scene: sized(quote, quote[CHAIN:] + b"\x00"),
    ),
    quoted(
        "a quote without a PCK chain", "no PEM", MALFORMED, lambda quote, scene: sized(quote, b"")
    ),
)  # fmt: skip


def labelled_tdx(quote: bytes, scene: Scene) -> bytes:
    return quote[:4] + TEE_TDX.to_bytes(4, "little") + quote[8:]


def version(number: int) -> Alter:
    return lambda quote, scene: number.to_bytes(2, "little") + quote[2:]


QUOTES = Section(
    "SGX quotes, field by field",
    "One bit of every field of a genuine version 3 quote, by its name in Intel's layout, and the PCK chain that lies "
    "in it as PEM. What the parser can see is malformed; what only a signature can see is refused.",
    "service",
    tuple(field_row(field) for field in QUOTE_V3) + CHAIN_ROWS,
)
FORMS = Section(
    "What is no SGX quote",
    "Lengths, versions and other TEEs.",
    "service",
    (
        quoted("a quote with a byte after it", "one byte more", MALFORMED, lambda quote, scene: quote + b"\n"),
        quoted(
            "a quote in a buffer filled with zeros", "zeros up to 8 KiB", MALFORMED,
            lambda quote, scene: quote.ljust(8192, b"\x00"),
        ),
        quoted("a quote cut by a byte", "one byte less", MALFORMED, lambda quote, scene: quote[:-1]),
        quoted("a quote cut after its report", "432 bytes", MALFORMED, lambda quote, scene: quote[:432]),
        quoted("a quote cut within its signatures", "700 bytes", MALFORMED, lambda quote, scene: quote[:700]),
        quoted("no quote", "nothing", MALFORMED, lambda quote, scene: b""),
        quoted("a quote larger than any", "8,193 bytes", MALFORMED, lambda quote, scene: bytes(8193)),
        quoted("random bytes as a quote", "every byte", MALFORMED, lambda quote, scene: bytes(range(256)) * 16),
        quoted("a quote labelled version 2", "version", MALFORMED, version(2)),
        quoted("a quote labelled version 4", "version", MALFORMED, version(4)),
        quoted("a quote labelled version 5", "version", MALFORMED, version(5)),
        quoted("an SGX quote labelled as of TDX", "TEE type", MALFORMED, labelled_tdx),
        quoted("a genuine TDX quote over the claims", "the TEE", MALFORMED, tdx),
    ),
)  # fmt: skip
