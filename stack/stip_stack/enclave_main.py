"""The enclave's own program with simulated evidence: `python -m stip_stack.enclave_main`.

What `stip-enclave serve` is under Gramine, but quotes come from a simulated platform. It lives here so that no
production part can be talked into simulated evidence by an option.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from stip_enclave.config import EnclaveSettings
from stip_enclave.main import run
from stip_protocol.errors import ConfigurationError
from stip_protocol.runtime import loop
from stip_protocol.runtime.config import load
from stip_stack.tee import load_provider


@click.command()
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False), required=True, help="Path of enclave.toml.")
@click.option("--insecure-simulated-tee", type=click.Path(path_type=Path, file_okay=False), required=True)
@click.option("--measurement", required=True, help="MRENCLAVE to claim, 64 hex digits.")
def main(config: Path, insecure_simulated_tee: Path, measurement: str) -> None:
    """Serve with simulated evidence. Protects nothing; for demos and tests."""
    try:
        provider = load_provider(insecure_simulated_tee, bytes.fromhex(measurement))
        reread = partial(load, EnclaveSettings, config)
        loop.run(run(reread(), provider, reread))
    except ConfigurationError as error:
        click.echo(f"stip-enclave (simulated): {error} ({error.action})", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
