"""`stip-gateway`."""

from __future__ import annotations

from pathlib import Path

import click

from stip_gateway.config import GatewaySettings
from stip_gateway.main import run
from stip_protocol.errors import ConfigurationError
from stip_protocol.runtime import loop
from stip_protocol.runtime.config import load


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Route keyed embeddings to model servers. The gateway sees envelopes and leases, never a key or a prompt."""


@main.command()
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="gateway.toml; see docs/operate.md.",
)
def serve(config: Path) -> None:
    """Serve until SIGTERM, then drain.

    Prints one JSON line with the addresses once it listens. Exits 2 where the configuration cannot be used.
    """
    try:
        loop.run(run(load(GatewaySettings, config)))
    except ConfigurationError as error:
        click.echo(f"stip-gateway: {error} ({error.action})", err=True)
        raise SystemExit(2) from None
