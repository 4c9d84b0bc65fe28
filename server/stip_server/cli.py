"""`stip-server`: the command line of the model server."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from stip_protocol.errors import StipError
from stip_protocol.runtime import loop
from stip_protocol.runtime.config import load
from stip_server.config import ServerSettings


@click.group()
@click.version_option(package_name="stip")
def main() -> None:
    """The model server of STIP: steps a protected model, and holds nothing that opens it."""


@main.command()
@click.option("--config", required=True, type=click.Path(dir_okay=False, path_type=Path), help="server.toml")
def serve(config: Path) -> None:
    """Serve one instance until SIGTERM."""
    try:
        settings = load(ServerSettings, config)
        # Imported late: a wrong configuration is told without loading torch.
        from stip_server.main import run

        loop.run(run(settings))
    except StipError as error:
        click.echo(f"stip-server: {error} ({error.action})", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
