"""`stip-keyservice serve`."""

from __future__ import annotations

from pathlib import Path

import click

from stip_keyservice.service.config import KeyServiceSettings
from stip_keyservice.service.main import run
from stip_protocol.runtime import loop
from stip_protocol.runtime.config import load


@click.command("serve")
@click.option(
    "--config", type=click.Path(path_type=Path, dir_okay=False), required=True, help="keyservice.toml; see docs/."
)
def serve(config: Path) -> None:
    """Serve until SIGTERM, then finish what is under way.

    Prints one JSON line with the addresses once it listens; logs JSON lines to stderr. Exits 2 where the
    configuration or the policy cannot be used.
    """
    loop.run(run(load(KeyServiceSettings, config)))
