"""`stip-stack`: the whole system on one machine, with a simulated TEE."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from types import FrameType

import click
from rich.console import Console

from stip_protocol.errors import Action, StipError

PLAIN_WIDTH = 118
"""Columns where the output is no terminal."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Run every part of STIP on this machine, with simulated evidence: for demos, tests and benchmarks only."""


@main.command()
@click.option("--model", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True,
              help="A local Hugging Face directory of a supported family, with safetensors.")  # fmt: skip
@click.option("--preset", type=click.Choice(["paper", "hardened"]), default="hardened", show_default=True)
@click.option("--prompt", help="What to continue. A model without a tokenizer gets made-up ids instead.")
@click.option("--max-tokens", type=click.IntRange(1, 4096), default=48, show_default=True)
@click.option("--runs", type=click.Path(path_type=Path, file_okay=False), default=Path(".run"), show_default=True,
              help="Where the working folder (keys, instance, logs) is made; it is removed at the end.")  # fmt: skip
def demo(model: Path, preset: str, prompt: str | None, max_tokens: int, runs: Path) -> None:
    """Protect MODEL, start every part, verify, stream an answer, compare it with the plain model.

    Ends with a chat on a terminal. Exits 0 where the answers agree, 1 where they do not, 2 on a configuration
    error, 130 on Ctrl-C; no process is left behind.
    """
    from stip_stack.demo import Request, run  # torch and transformers load here, not for --help

    def terminated(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminated)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    try:
        status = run(Request(model, preset, prompt, max_tokens, runs), console)
    except StipError as error:
        click.echo(f"stip-stack: {error} ({error.action})", err=True)
        raise SystemExit(2 if error.action is Action.FIX_CONFIGURATION else 1) from None
    except KeyboardInterrupt:
        click.echo("stip-stack: interrupted; every part was stopped", err=True)
        raise SystemExit(130) from None
    raise SystemExit(status)


@main.command("simulated-platform")
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
def simulated_platform(directory: Path) -> None:
    """Make a simulated TEE in DIRECTORY, for a rollout that is rehearsed. IT PROTECTS NOTHING.

    Beside its keys lie simulated-root.der (key service, clients) and collateral.json (enclave; good for 30 days: run
    again for a fresh one). Prints the hash of the root, which development policies pin.
    """
    from stip_stack.tee import SimulatedPlatform

    try:
        made = (directory / "simulated-root.der").exists()
        platform = SimulatedPlatform.load(directory) if made else SimulatedPlatform.create(directory)
    except StipError as error:
        click.echo(f"stip-stack: {error} ({error.action})", err=True)
        raise SystemExit(2) from None
    (directory / "simulated-root.der").write_bytes(platform.root_der)
    (directory / "collateral.json").write_bytes(platform.collateral(int(time.time())))
    click.echo("simulated: this protects nothing", err=True)
    click.echo(platform.root_sha256.hex())
