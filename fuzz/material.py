"""Keys, evidence and documents that seeds are made of. Each is made once a process."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from stip_protocol.attestation import ratls
from stip_protocol.attestation.evidence import bind
from stip_stack.tee import SimulatedPlatform
from stip_stack.tee.platform import SimulatedProvider

NOW = 1_800_000_000
"""Unix seconds at which everything here is good."""
MEASUREMENT = bytes(range(32))
MRTD = bytes(range(48))
INSTANCE = "cd" * 16
REPORT_DATA = bind(b"claims of the fuzzer")
# Fixed keys: a corpus that was found in one run is as good in the next.
SIGNING = Ed25519PrivateKey.from_private_bytes(b"\x11" * 32)
OPENING = X25519PrivateKey.from_private_bytes(b"\x22" * 32)
LINK = ec.derive_private_key(0x3333, ec.SECP256R1())
LINK_SPKI = LINK.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


@cache
def scratch() -> Path:
    """A folder of this process, in memory where the machine has that, for readers that want files."""
    shared = Path("/dev/shm")  # noqa: S108 - a folder of our own is made in it
    return Path(tempfile.mkdtemp(prefix="stip-fuzz-", dir=shared if os.access(shared, os.W_OK) else None))


@cache
def platform() -> SimulatedPlatform:
    with tempfile.TemporaryDirectory() as folder:
        return SimulatedPlatform.create(Path(folder) / "tee", now=NOW)


@cache
def provider() -> SimulatedProvider:
    return platform().provider(MEASUREMENT, clock=lambda: NOW)


@cache
def sgx_quote() -> bytes:
    return provider().quote(REPORT_DATA)


@cache
def tdx_quote() -> bytes:
    return platform().host_quote(MRTD, REPORT_DATA)


@cache
def collateral() -> bytes:
    return platform().collateral(NOW)


@cache
def identity() -> ratls.Identity:
    """An RA-TLS certificate with the DICE extension."""
    return ratls.issue(provider(), dns_name="enclave.stip", lifetime=3600, now=NOW)


def vectors(pattern: str) -> list[bytes]:
    """Real quotes and collateral, where `STIP_DCAP_VECTORS` names their folder."""
    folder = os.environ.get("STIP_DCAP_VECTORS")
    return [path.read_bytes() for path in sorted(Path(folder).glob(pattern))] if folder else []
