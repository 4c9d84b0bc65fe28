"""`stip keys`: the user's key pairs."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from stip import keys
from stip.keys import UserKey


@click.group("keys")
def group() -> None:
    """Your own key pairs: what makes an enclave act for you and for nobody else.

    A key signs short delegations for enclaves that were verified. It stays on this machine, in STIP_HOME/keys
    (default ~/.stip/keys), readable by you alone. The key service learns its public half when you are enrolled.
    """


@group.command("create")
@click.argument("name", default="default")
@click.option("--user", default="NAME", help="The name under which the key service shall know you.")
def create(name: str, user: str) -> None:
    """Draw a key pair called NAME (default: "default") and print how to have it enrolled."""
    key = keys.create(keys.locate(name))
    click.echo(f"user_key   {key.path}")
    click.echo(f"public key {key.public.hex()}")
    click.echo("The operator of the key service enrols you with:")
    click.echo(f"  {_line(key, user)}")


@group.command("list")
def list_() -> None:
    """The stored keys with their public halves."""
    for path in keys.stored():
        click.echo(f"{path.stem}\t{keys.load(path).public.hex()}")


@group.command("show")
@click.argument("name", default="default")
def show(name: str) -> None:
    """The public half of key NAME, as 64 hex digits."""
    click.echo(keys.load(keys.locate(name)).public.hex())


@group.command("enrol")
@click.argument("name", default="default")
@click.option("--user", default="NAME", help="The name under which the key service shall know you.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write an enrolment request (JSON) there instead."
)
def enrol(name: str, user: str, out: Path | None) -> None:
    """Print the line that the key service's operator runs to enrol key NAME. Nothing of it is secret."""
    key = keys.load(keys.locate(name))
    if out is None:
        click.echo(_line(key, user))
    else:
        out.write_text(keys.enrolment(key, user) + "\n")
        click.echo(f"wrote {out}")


def _line(key: UserKey, user: str) -> str:
    return f"stip-keyservice users add {shlex.quote(user)} --public-key {key.public.hex()} --budget TOKENS"
