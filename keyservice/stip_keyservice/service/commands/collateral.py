"""`stip-keyservice collateral`."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from stip_keyservice.service.collateral import anchor, require_source
from stip_keyservice.service.commands.room import json_option, moment, show, table
from stip_keyservice.service.config import KeyServiceSettings
from stip_protocol.attestation import collateral_bundle
from stip_protocol.attestation.collateral_cache import replace_public
from stip_protocol.attestation.collateral_source import Shelf
from stip_protocol.attestation.platforms import PlatformKind
from stip_protocol.attestation.quote import QUOTE_LIMIT, without_padding
from stip_protocol.runtime.config import load
from stip_protocol.runtime.files import read_file

COLUMNS = ("platform", "TCB evaluation", "issued", "expires", "refresh due")

config_option = click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="keyservice.toml with a table [collateral]; see docs/attestation.md.",
)


@click.group("collateral")
def group() -> None:
    """What Intel says of platforms today: fetch it, carry it, see when it runs out.

    \b
    A machine without a way to a source gets it by hand:
      stip-keyservice collateral fetch --config online.toml --quote quote.bin
      stip-keyservice collateral bundle --config online.toml bundle.json
      stip-keyservice collateral import --config keyservice.toml bundle.json
    """


@group.command("fetch")
@click.option("--quote", "quotes", type=click.Path(path_type=Path, exists=True, dir_okay=False), multiple=True,
              help="A quote (SGX or TDX) of the platform. Repeatable.")  # fmt: skip
@click.option("--platform", "names", multiple=True, metavar="TEE-FMSPC-CA",
              help="The platform by name, as in sgx-00a067110000-platform. Repeatable.")  # fmt: skip
@config_option
@json_option
def fetch(quotes: tuple[Path, ...], names: tuple[str, ...], config: Path) -> None:
    """Fetch collateral now from the configured endpoints, and keep it.

    Without --quote and --platform: of every platform that is kept already. Exits 1 where no source gives it.
    """
    settings = load(KeyServiceSettings, config)
    with closing(require_source(settings)) as source:
        kinds = [PlatformKind.from_name(name) for name in names]
        kinds += [_kind(path, anchor(settings)) for path in quotes]
        for kind in kinds or [shelf.kept.kind for shelf in source.shelves()]:
            source.renew(kind)
        _show(source.shelves())


@group.command("show")
@config_option
@json_option
def show_kept(config: Path) -> None:
    """What is kept, whose it is, and when it runs out."""
    with closing(require_source(load(KeyServiceSettings, config))) as source:
        _show(source.shelves())


@group.command("bundle")
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@config_option
@json_option
def bundle(out: Path, config: Path) -> None:
    """Write everything that is kept to one file OUT, for machines without a way to a source."""
    with closing(require_source(load(KeyServiceSettings, config))) as source:
        shelves = source.shelves()
    replace_public(out, collateral_bundle.encode(shelf.kept for shelf in shelves))
    _show(shelves)


@group.command("import")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@config_option
@json_option
def take(file: Path, config: Path) -> None:
    """Keep what is in FILE: a bundle, or the collateral of one platform.

    Refused whole where anything in it is not signed under the trust anchor, or ran out.
    """
    with closing(require_source(load(KeyServiceSettings, config))) as source:
        source.take(collateral_bundle.load(file))
        _show(source.shelves())


def read_quote(path: Path) -> bytes:
    """The quote in a file, without the zeros that a device's buffer ends with. Raises also `ConfigurationError`."""
    return without_padding(read_file(path, field="quote", limit=QUOTE_LIMIT))


def _kind(path: Path, root: bytes) -> PlatformKind:
    return PlatformKind.of_quote(read_quote(path), root)


def _show(shelves: Iterable[Shelf]) -> None:
    documents = [_document(shelf) for shelf in shelves]
    empty = "No collateral is kept. Fetch some with `stip-keyservice collateral fetch`."
    show(documents, lambda: table(COLUMNS, [list(document.values()) for document in documents], empty=empty))


def _document(shelf: Shelf) -> dict[str, Any]:
    kept = shelf.kept
    return {
        "platform": str(kept.kind),
        "tcb_evaluation_number": kept.collateral.evaluation_number,
        "issued": moment(kept.issued),
        "expires": moment(kept.expires),
        "refresh_due": moment(shelf.refresh_due),
    }
