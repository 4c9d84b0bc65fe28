"""`stip-enclave`: hardware evidence only. A simulated enclave is started by the development stack, never from here."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from stip_enclave.collateral import command as collateral
from stip_enclave.config import EnclaveSettings
from stip_protocol.attestation.gramine import GramineProvider
from stip_protocol.errors import ConfigurationError, IntegrityError
from stip_protocol.runtime import loop
from stip_protocol.runtime.config import load


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Sessions over a model whose server sees neither prompt nor answer nor weights. Runs under Gramine, on SGX."""


@main.command()
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="enclave.toml; see docs/operate.md.",
)
def serve(config: Path) -> None:
    """Serve until SIGTERM, then drain. SIGHUP reads the list of instances again, and nothing else of the file.

    Prints one JSON line with the addresses once it listens. Exits 2 where the configuration cannot be used.
    """
    from stip_enclave.main import run  # torch loads here, and not for what runs beside the enclave

    try:
        reread = partial(load, EnclaveSettings, config)
        settings = reread()
        loop.run(run(settings, GramineProvider(settings.collateral), reread))
    except (ConfigurationError, IntegrityError) as error:
        click.echo(f"stip-enclave: {error} ({error.action})", err=True)
        raise SystemExit(2) from None


main.add_command(collateral)
