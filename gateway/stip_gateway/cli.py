"""`stip-gateway`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from stip_gateway.config import GatewaySettings
from stip_gateway.main import run
from stip_gateway.tls_commands import group as tls
from stip_protocol.errors import ConfigurationError
from stip_protocol.runtime import loop
from stip_protocol.runtime.config import load


class _Refusing(click.Group):
    """Turns refusals into messages and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigurationError as error:
            click.echo(f"stip-gateway: {error} ({error.action})", err=True)
            ctx.exit(2)


@click.group(cls=_Refusing, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Route keyed embeddings to model servers. The gateway sees envelopes and leases, never a key or a prompt.

    Exit codes: 0 done, 1 a certificate ends soon (tls show), 2 wrong usage or configuration.
    """


main.add_command(tls)


@main.command()
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="gateway.toml; see docs/operate.md.",
)
def serve(config: Path) -> None:
    """Serve until SIGTERM, then drain. SIGHUP reads the routing table again, and nothing else of the file.

    Prints one JSON line with the addresses once it listens. Exits 2 where the configuration cannot be used.
    """
    reread = partial(load, GatewaySettings, config)
    loop.run(run(reread(), reread))
