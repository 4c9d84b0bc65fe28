"""A root key under one of Gramine's sealing keys.

`/dev/attestation/keys/_sgx_mrenclave` and `_sgx_mrsigner` are 16 raw bytes that the CPU derives (EGETKEY, SEAL_KEY) for
this very enclave, or for every enclave of its signer (Gramine, "Attestation and Secret Provisioning"). The wrapping key
is HKDF-SHA256 (RFC 5869) of them; a new MRENCLAVE, and another machine, has others.
"""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from stip_keyservice.rootkey.envelope import KEY_BYTES, lock, unlock
from stip_keyservice.rootkey.settings import GramineSettings
from stip_protocol import canonical
from stip_protocol.errors import ConfigurationError

SEALING_KEY_BYTES = 16
_INFO = b"stip/root-key/gramine/"


class GramineProvider:
    def __init__(self, settings: GramineSettings, home: Path) -> None:
        self._settings, self._path = settings, home / settings.keys / settings.key

    def keep(self, key: bytes) -> GramineSettings:
        wrapped = lock(self._wrapping_key(), key, self._context())
        return self._settings.model_copy(update={"wrapped": wrapped.hex()})

    def load(self) -> bytes:
        if self._settings.wrapped is None:
            raise ConfigurationError("root_key: no wrapped key; see `stip-keyservice recover`")
        wrapped = bytes.fromhex(self._settings.wrapped)
        return unlock(self._wrapping_key(), wrapped, self._context(), f"root key under {self._settings.key}")

    def discard(self) -> str:
        return "the CPU still derives the former sealing key: destroy copies of home.toml from before, also in backups"

    def _wrapping_key(self) -> bytes:
        try:
            with self._path.open("rb") as file:
                sealing = file.read(SEALING_KEY_BYTES + 1)
        except OSError as error:
            raise ConfigurationError(f"sealing key {self._path}: {error.strerror}; is this Gramine with SGX?") from None
        if len(sealing) != SEALING_KEY_BYTES or not any(sealing):
            raise ConfigurationError.because("sealing key", "something else", f"{SEALING_KEY_BYTES} bytes from the CPU")
        info = _INFO + self._settings.key.encode()
        return HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=info).derive(sealing)

    def _context(self) -> bytes:
        return canonical.encode(["stip/root-key", "gramine", self._settings.key])
