"""`stip-keyservice doctor`."""

from __future__ import annotations

from pathlib import Path

import click

from stip_keyservice.home import locate
from stip_keyservice.service.commands.room import home_option, json_option, show, table
from stip_keyservice.service.config import KeyServiceSettings
from stip_keyservice.service.doctor.checking import Finding, Patient, Verdict, examine
from stip_keyservice.service.doctor.table import CHECKS
from stip_protocol.errors import ConfigurationError
from stip_protocol.runtime.config import load


@click.command("doctor")
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False), help="keyservice.toml of the service.")
@home_option
@json_option
def doctor(config: Path | None, home: Path | None) -> None:
    """Check clock, home, root key, database, audit log, policy, collateral, certificates, ports and machine.

    Changes nothing, asks for nothing, and works while the service runs and while it is broken. Each check passes,
    warns or fails, and says what to do. Exits 1 where one fails.

    \b
      stip-keyservice doctor --config /etc/stip/keyservice.toml
    """
    findings = examine(_patient(config, home), CHECKS)
    show(
        [
            {"check": name, "verdict": found.verdict, "found": found.found, "remedy": found.remedy}
            for name, found in findings
        ],
        lambda: table(("check", "", "found", "what to do"), [_row(*each) for each in findings], empty="No checks."),
    )
    if any(found.verdict is Verdict.FAIL for _, found in findings):
        click.get_current_context().exit(1)


def _patient(config: Path | None, home: Path | None) -> Patient:
    settings = refusal = None
    if config is not None:
        try:
            settings = load(KeyServiceSettings, config)
        except ConfigurationError as error:
            refusal = error
    named = home if home is not None or settings is None else settings.home
    return Patient(locate(named), settings, refusal)


def _row(name: str, found: Finding) -> tuple[str, str, str, str]:
    return name, found.verdict, found.found, found.remedy
