"""A collateral bundle: the collateral of several platforms in one file, for machines without a way to a source.

    {"version": [1, 0], "collateral": [<QuoteCollateralV3>, ...]}

It is carried by hand and needs no protection: everything in it is signed and dated.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from stip_protocol.attestation.collateral_cache import Kept
from stip_protocol.attestation.evidence import COLLATERAL_LIMIT
from stip_protocol.documents import explain
from stip_protocol.errors import EvidenceMalformed, VersionUnsupported
from stip_protocol.runtime.files import read_file

PLATFORMS = 256
"""Platform kinds in one bundle, at most."""
BUNDLE_LIMIT = PLATFORMS * COLLATERAL_LIMIT
VERSION = (1, 0)


class _Bundle(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    version: tuple[int, int]
    collateral: tuple[dict[str, Any], ...]


def encode(kept: Iterable[Kept]) -> bytes:
    """A bundle of what is kept. Raises `EvidenceMalformed` where it is too much, or nothing."""
    documents = [json.loads(one.data) for one in kept]
    if not 0 < len(documents) <= PLATFORMS:
        raise EvidenceMalformed.because("collateral bundle", f"{len(documents)} platforms", f"1 to {PLATFORMS}")
    return json.dumps({"version": VERSION, "collateral": documents}, indent=1).encode() + b"\n"


def decode(data: bytes) -> list[Kept]:
    """The collateral in a bundle, or a single `QuoteCollateralV3`. Raises `EvidenceMalformed`, `VersionUnsupported`."""
    if len(data) > BUNDLE_LIMIT:
        raise EvidenceMalformed.because("collateral bundle", f"{len(data)} bytes", f"at most {BUNDLE_LIMIT}")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise EvidenceMalformed("collateral bundle: not JSON", field="collateral bundle") from None
    if isinstance(value, dict) and "collateral" not in value:
        return [Kept.parse(data)]
    try:
        bundle = _Bundle.model_validate(value)
    except ValidationError as error:
        raise EvidenceMalformed(f"collateral bundle: {explain(error)}", field="collateral bundle") from None
    if bundle.version[0] != VERSION[0]:
        raise VersionUnsupported.because("collateral bundle version", list(bundle.version), f"major {VERSION[0]}")
    if not 0 < len(bundle.collateral) <= PLATFORMS:
        raise EvidenceMalformed.because("collateral bundle", f"{len(bundle.collateral)} platforms", f"1 to {PLATFORMS}")
    return [Kept.parse(json.dumps(one).encode()) for one in bundle.collateral]


def load(path: Path) -> list[Kept]:
    """The collateral in a bundle file. Raises also `ConfigurationError`."""
    return decode(read_file(path, field="collateral bundle", limit=BUNDLE_LIMIT))
