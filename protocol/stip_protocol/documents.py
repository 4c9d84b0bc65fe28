"""Documents: frozen pydantic models with a canonical CBOR form, a context string and a version.

`Document` is what leases, delegations, claims, grants and bundles are made of. The context string stands
inside the bytes (domain separation: a signature over a lease can never be read as one over a delegation),
the version is `[major, minor]`; an unknown major is refused, and unknown fields of a newer minor of the
same major are ignored, so that two adjacent minors work together.
"""

from __future__ import annotations

import hashlib
from typing import ClassVar, Self, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, ValidationError

from stip_protocol import canonical
from stip_protocol.errors import FrameInvalid, SignatureInvalid, VersionUnsupported

D = TypeVar("D", bound="Document")


def explain(error: ValidationError) -> str:
    """The first finding of a validation, without the offending value: it may be secret."""
    first = error.errors(include_input=False, include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "document"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {first['msg']}{more}"


class Document(BaseModel):
    """Base of every signed or hashed document. Subclasses set `context` and `version`."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", hide_input_in_errors=True)

    context: ClassVar[str]
    version: ClassVar[tuple[int, int]] = (1, 0)

    def to_bytes(self) -> bytes:
        """Canonical CBOR map `{"ctx": context, "version": [major, minor], ...fields}`."""
        return canonical.encode({"ctx": self.context, "version": list(self.version), **self.model_dump(mode="python")})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Parse strictly. Raises `FrameInvalid` (form, fields) or `VersionUnsupported` (major version)."""
        value = canonical.decode(data, what=cls.context)
        if not isinstance(value, dict) or value.get("ctx") != cls.context:
            raise FrameInvalid.because("ctx", "another document", cls.context)
        version = value.pop("version", None)
        if not (isinstance(version, list) and len(version) == 2 and all(type(v) is int for v in version)):
            raise FrameInvalid.because(f"{cls.context} version", "no version", "[major, minor]")
        if version[0] != cls.version[0]:
            raise VersionUnsupported.because(f"{cls.context} version", version, f"major {cls.version[0]}")
        del value["ctx"]
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise FrameInvalid(f"{cls.context}: {explain(error)}", field=cls.context) from None

    def digest(self) -> bytes:
        """SHA-256 of `to_bytes()`."""
        return hashlib.sha256(self.to_bytes()).digest()


class Signed(BaseModel):
    """A document's bytes with an Ed25519 signature (RFC 8032) over `context ‖ 0x00 ‖ payload`."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", hide_input_in_errors=True)

    payload: bytes
    signature: bytes

    @classmethod
    def sign(cls, document: Document, key: Ed25519PrivateKey) -> Signed:
        payload = document.to_bytes()
        return cls(payload=payload, signature=key.sign(_signed_bytes(document.context, payload)))

    def to_bytes(self) -> bytes:
        return canonical.encode({"payload": self.payload, "signature": self.signature})

    @classmethod
    def from_bytes(cls, data: bytes) -> Signed:
        value = canonical.decode(data, what="signed document")
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise FrameInvalid(f"signed document: {explain(error)}", field="signed document") from None

    def open(self, kind: type[D], key: Ed25519PublicKey) -> D:
        """Verify and parse. Raises `SignatureInvalid` before anything of the payload is looked at."""
        try:
            key.verify(self.signature, _signed_bytes(kind.context, self.payload))
        except InvalidSignature:
            raise SignatureInvalid(f"{kind.context}: the signature is not by the expected key") from None
        return kind.from_bytes(self.payload)

    def digest(self) -> bytes:
        """SHA-256 of `to_bytes()`."""
        return hashlib.sha256(self.to_bytes()).digest()


def _signed_bytes(context: str, payload: bytes) -> bytes:
    return context.encode() + b"\x00" + payload
