"""`stip verify`: the verification document, for people and for programs."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

import stip
from stip.commands import options
from stip.verification import SIMULATION_WARNING, Verification
from stip_protocol.attestation.verifier import Status

REFUSED = 3
STYLES = {Status.PASSED: "green", Status.FAILED: "bold red", Status.SKIPPED: "dim"}
PLAIN_WIDTH = 160
"""Columns of the table where the output is no terminal."""


@click.command("verify")
@options.profile
@options.connect_timeout
@click.option("--json", "as_json", is_flag=True, help="The whole document as JSON.")
def verify(profile: Path, connect_timeout: float, as_json: bool) -> int:
    """Verify the enclave of a profile, step by step. Nothing of yours is sent.

    Every step shows what was expected, what was found, and what to do where they differ; what could not be
    reached is "skipped". Exit code 0 only if everything passed, 3 if the enclave is refused.
    """
    document = stip.verify(profile, timeout=connect_timeout)
    if as_json:
        click.echo(document.to_json())
    else:
        _print(document)
    return 0 if document.verified else REFUSED


def _print(document: Verification) -> None:
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, soft_wrap=False)
    table = Table("step", "status", "expected", "got", "remedy", title=f"enclave {document.enclave}", pad_edge=False)
    for step in document.steps:
        status = Text(step.status.value, STYLES[step.status])
        table.add_row(*map(Text, (step.name,)), status, *map(Text, (step.expected, step.got, step.remedy)))
    console.print(table)
    if document.simulated:
        console.print(Text(SIMULATION_WARNING, "bold red"))
    console.print(Text(f"audit log of the key service: {document.audit_log}", "dim"))
    if document.verified:
        measurement = document.measurement.hex() if document.measurement else ""
        console.print(Text(f"VERIFIED: measurement {measurement}, TCB {document.tcb_status}", "bold green"))
    else:
        console.print(Text(f"REFUSED: {document.refusal}", "bold red"))
