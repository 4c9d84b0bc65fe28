"""Versions of what crosses a boundary. An unknown major is refused; two adjacent minors work together."""

from __future__ import annotations

from stip_protocol.errors import VersionUnsupported

WIRE_MAJOR = 1
WIRE_MINOR = 0
MANIFEST_VERSION = (1, 0)


def require_wire(major: int, *, peer: str) -> None:
    """Raise `VersionUnsupported` where `peer` speaks another major version of the wire."""
    if major != WIRE_MAJOR:
        raise VersionUnsupported.because(f"wire version of the {peer}", major, WIRE_MAJOR)
