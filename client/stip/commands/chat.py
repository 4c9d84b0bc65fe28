"""`stip chat`: a conversation over one session."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

import stip
from stip.commands import options

QUIT = "/quit"
YOU = "you> "


@click.command("chat")
@options.profile
@click.option("--system", help="A system message that opens the conversation.")
@options.sampling
@options.connect_timeout
def chat(profile: Path, system: str | None, connect_timeout: float, **sampling: Any) -> None:
    """Talk with the model. /quit or end of input leaves; Ctrl-C stops an answer, and at the prompt leaves.

    The conversation lives in this process and in one session of the enclave, and ends with them. Where standard
    input is no terminal, each line is one round.
    """
    interactive = sys.stdin.isatty()
    messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
    with stip.connect(profile, timeout=connect_timeout) as connection, connection.session() as session:
        if interactive:
            found = connection.verification
            measurement = found.measurement.hex()[:16] if found.measurement else ""
            click.echo(f"verified: enclave {found.enclave}, measurement {measurement}…; /quit leaves", err=True)
        for line in _lines(interactive):
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": _answer(session, messages, sampling)})


def _lines(interactive: bool) -> Iterator[str]:
    """What the user says, until /quit or the end of input."""
    while True:
        if interactive:
            try:
                line = input(YOU)
            except (EOFError, KeyboardInterrupt):
                click.echo()
                return
        else:
            line = sys.stdin.readline()
            if not line:
                return
        line = line.strip()
        if line == QUIT:
            return
        if line:
            yield line


def _answer(session: stip.Session, messages: list[dict[str, str]], sampling: dict[str, Any]) -> str:
    """Stream one answer. Ctrl-C cancels it; what was said stays part of the conversation."""
    said: list[str] = []
    try:
        for chunk in session.chat(messages, **sampling):
            said.append(chunk.text)
            click.echo(chunk.text, nl=False)
    except KeyboardInterrupt:
        click.echo(" [cancelled]", nl=False, err=True)
    click.echo()
    return "".join(said)
