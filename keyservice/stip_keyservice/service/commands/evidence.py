"""`stip-keyservice evidence`."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from stip_keyservice.service.collateral import require_source
from stip_keyservice.service.commands.collateral import read_quote
from stip_keyservice.service.commands.room import json_option, show, table
from stip_keyservice.service.config import ROOT_LIMIT, KeyServiceSettings
from stip_keyservice.service.policy import Policy
from stip_protocol import toml
from stip_protocol.attestation import hosts, verifier
from stip_protocol.attestation.evidence import COLLATERAL_LIMIT, REPORT_DATA, Evidence, bind
from stip_protocol.attestation.gates import Status, Step
from stip_protocol.attestation.hostpolicy import HostPolicy
from stip_protocol.attestation.policy import POLICY_LIMIT, EvidencePolicy
from stip_protocol.attestation.quote import TEE_SGX, SgxQuote, tee_type
from stip_protocol.attestation.tdx import TdxQuote
from stip_protocol.errors import PolicyInvalid
from stip_protocol.runtime.config import load
from stip_protocol.runtime.files import read_file

REPORT_DATA_STEP = "report data"
_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.group("evidence")
def group() -> None:
    """Quotes of enclaves and hosts, held against a policy step by step."""


@group.command("examine")
@click.argument("quote_file", metavar="QUOTE", type=_FILE)
@click.option("--policy", "policy_file", type=_FILE, required=True,
              help="A key service's policy, an evidence policy, or for a TDX quote a host policy.")  # fmt: skip
@click.option("--collateral", "collateral_file", type=_FILE, help="QuoteCollateralV3 JSON.")
@click.option("--config", type=_FILE, help="keyservice.toml whose [collateral] gives it, where no file does.")
@click.option("--claims", type=_FILE, help="What the quote must vouch for: report data = SHA-256(claims), then zeros.")
@click.option("--report-data", metavar="HEX",
              help="The 64 bytes the quote must carry, instead of --claims; any: whatever it carries.")  # fmt: skip
@click.option("--simulated-root", type=_FILE, help="DER of a simulated TEE's root, which the policy pins.")
@click.option("--at", "now", type=int, help="Unix seconds to verify at.  [default: now]")
@json_option
def examine(
    quote_file: Path,
    policy_file: Path,
    collateral_file: Path | None,
    config: Path | None,
    claims: Path | None,
    report_data: str | None,
    simulated_root: Path | None,
    now: int | None,
) -> None:
    """Hold a QUOTE (SGX version 3 or TDX version 4) against a policy, and tell every condition.

    With --report-data any, what the quote carries is shown and compared with nothing: that verifies the platform and
    the measurement, and not who talks to you. Zeros after the quote, as devices write them, are cut.

    Exits 0 only where every condition holds that was asked for; 1 where one does not, or was skipped.
    """
    if (collateral_file is None) == (config is None):
        raise click.UsageError("Say where collateral comes from: either --collateral FILE or --config FILE.")
    if (claims is None) == (report_data is None):
        raise click.UsageError("Say what the quote must vouch for: either --claims FILE or --report-data HEX (or any).")
    quote = read_quote(quote_file)
    sgx = tee_type(quote) == TEE_SGX
    wanted = _wanted(claims, report_data)
    bound = wanted if wanted is not None else (SgxQuote if sgx else TdxQuote).parse(quote).report_data
    evidence = Evidence(quote, _collateral(quote, collateral_file, config))
    root = None if simulated_root is None else read_file(simulated_root, field="simulated root", limit=ROOT_LIMIT)
    moment = int(time.time()) if now is None else now
    if sgx:
        enclaves = _enclave_policy(policy_file)
        steps = verifier.examine(evidence, enclaves, report_data=bound, now=moment, root_der=root)
    else:
        steps = hosts.examine(evidence, HostPolicy.load(policy_file), report_data=bound, now=moment, root_der=root)
    if wanted is None:
        steps = [_not_compared(step) if step.name == REPORT_DATA_STEP else step for step in steps]
    _tell(steps, tee="SGX" if sgx else "TDX", compared=wanted is not None)


def _not_compared(step: Step) -> Step:
    """The quote's report data held against itself is no condition."""
    return replace(step, status=Status.SKIPPED, expected="any: not compared") if step.error is None else step


def _wanted(claims: Path | None, report_data: str | None) -> bytes | None:
    if claims is not None:
        return bind(read_file(claims, field="claims"))
    if report_data is None or report_data == "any":
        return None
    try:
        data = bytes.fromhex(report_data)
    except ValueError:
        data = b""
    if len(data) != REPORT_DATA:
        raise click.BadParameter(f"{2 * REPORT_DATA} hexadecimal digits, or any", param_hint="--report-data")
    return data


def _collateral(quote: bytes, file: Path | None, config: Path | None) -> bytes:
    if file is not None:
        return read_file(file, field="collateral", limit=COLLATERAL_LIMIT)
    assert config is not None
    with closing(require_source(load(KeyServiceSettings, config))) as source:
        return source.for_quote(quote)


def _enclave_policy(path: Path) -> EvidencePolicy:
    """The evidence part of a key service's policy, or an evidence policy by itself."""
    try:
        parsed = toml.read(read_file(path, field="policy", limit=POLICY_LIMIT))
    except ValueError as error:
        raise PolicyInvalid(f"policy {path}: {error}") from None
    return Policy.load(path).evidence if "evidence" in parsed else EvidencePolicy.load(path)


def _tell(steps: list[Step], *, tee: str, compared: bool) -> None:
    asked = steps if compared else [step for step in steps if step.name != REPORT_DATA_STEP]
    verified = all(step.status is Status.PASSED for step in asked)
    document: dict[str, Any] = {
        "verified": verified,
        "tee": tee,
        "report_data_compared": compared,
        "steps": [
            {
                "name": step.name,
                "status": step.status,
                "expected": step.expected,
                "got": step.got,
                "remedy": step.remedy,
                "code": None if step.error is None else step.error.code,
            }
            for step in steps
        ],
    }
    rows = [[escape(text) for text in (step.name, step.status, step.expected, step.got, step.remedy)] for step in steps]
    show(document, lambda: table(("condition", "", "expected", "got", "what to do"), rows, empty=""))
    verdict = f"The {tee} evidence is verified." if verified else f"The {tee} evidence is REFUSED."
    if verified and not compared:
        verdict += " Its report data was compared with nothing: give --claims to know what it vouches for."
    click.echo(verdict, err=True)
    if not verified:
        click.get_current_context().exit(1)
