"""The operator's authority of a stack that lives for minutes: certificates good for both ends, on loopback too."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from stip_protocol.runtime import authority as x509

LIFE = timedelta(days=30)


@dataclass(frozen=True)
class Identity:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    private_key: bytes = field(repr=False)

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """(certificate path, key path); the key is readable by its owner only."""
        certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
        certificate.write_bytes(self.certificate)
        key.touch(mode=0o600)
        key.write_bytes(self.private_key)
        return certificate, key


class Authority:
    """A self-signed authority and the key that it forgets with the process."""

    def __init__(self, name: str) -> None:
        key = x509.generate_key()
        self._authority = x509.Authority.load(key, x509.make_authority(key, name, life=LIFE), name)

    @property
    def pem(self) -> bytes:
        return self._authority.pem

    def issue(self, name: str) -> Identity:
        """A certificate for `name`, `localhost` and 127.0.0.1, good for servers and clients."""
        key = x509.generate_key()
        chain = x509.issue_certificate(
            self._authority,
            key.public_key(),
            names=[name, "localhost", "127.0.0.1"],
            uses=[x509.Use.SERVER, x509.Use.CLIENT],
            common_name=name,
            life=LIFE,
        )
        return Identity(chain, x509.private_pem(key))
