"""`stip-keyservice root-key`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from stip_keyservice.home import locked
from stip_keyservice.rootkey import providers, settings
from stip_keyservice.service.commands.keeping import chosen, keeping_options, made_shares
from stip_keyservice.service.commands.room import home_option, json_option, open_room, show, table
from stip_keyservice.service.state import recovery
from stip_keyservice.service.state.rewrap import rewrap
from stip_protocol.errors import ConfigurationError


@click.group("root-key")
def group() -> None:
    """What everything secret in the home and the database is encrypted under."""


@group.command("rewrap")
@keeping_options("--to", required=False)
@home_option
@json_option
def rewrap_(kind: str | None, home: Path | None, **given: Any) -> None:
    """Move everything under a new root key, and destroy the former one.

    For an upgrade of the enclave, after an incident, and after a user or an instance was shredded. Can be interrupted
    at any point: the same command without --to goes on. Replicas with the same home folder keep running. Recovery
    shares stay good.
    """
    with open_room(home) as room:
        to = None if kind is None else chosen(kind, given, settings.load(room.home.path))
        done = rewrap(room.home, room.store, room.audit, to, now=int(time.time()))
    rows = [
        ("root key", f"{done.identity}, kept by: {done.kind}"),
        ("moved", f"{done.data_keys} data keys, {done.files} private keys"),
        ("former", done.former),
    ]
    show(vars(done), lambda: table(("", ""), rows, empty=""))


@group.group("shares")
def shares() -> None:
    """People who can open the root key together where what keeps it is lost."""


@shares.command("create")
@click.option("--threshold", type=click.IntRange(2, settings.MEMBERS), required=True, help="How many open it.")
@click.option("--shares", "count", type=click.IntRange(2, settings.MEMBERS), required=True, help="How many there are.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="A new folder, one file a share."
)
@home_option
@json_option
def create(threshold: int, count: int, out: Path, home: Path | None) -> None:
    """Make recovery shares (SLIP-39); earlier ones open nothing of this home any more.

    Hand out each file (33 words, it can be written on paper), then delete the folder. The shares are of a recovery key
    to which the root key is sealed: they stay good when the root key is rewrapped. Rehearse them:
    `stip-keyservice recover --dry-run`.
    """
    with open_room(home) as room, room.decision("recovery_shares_made") as trail, locked(room.home.path):
        configured = recovery.present(room.home.path, room.home.root)
        if configured.rewrap is not None:
            raise ConfigurationError("root key: an interrupted rewrap comes first; run `root-key rewrap`")
        if configured.root_key.kind == "shares":
            raise ConfigurationError("shares: they keep this home's root key; rewrap it to something else first")
        made, paths = made_shares(out, threshold, count)
        kept = providers.keep(made, room.home.path, room.home.root.material())
        with room.store.write() as db:
            trail.subject["detail"] = f"{threshold} of {count}"
            room.audit.append(db, trail)
            settings.store(room.home.path, configured.model_copy(update={"recovery": kept}))
    document = {"threshold": threshold, "shares": [str(path) for path in paths]}
    said = f"Hand these out and delete {out}; any {threshold} open the root key. Rehearse: recover --dry-run"
    show(document, lambda: table((said,), [(path,) for path in paths], empty=""))
