"""`stip-keyservice policy`."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from stip_keyservice.home import Home, locate
from stip_keyservice.service.commands.room import home_option, json_option, moment, show, table
from stip_keyservice.service.policy import Policy, template
from stip_keyservice.service.policy.diff import Change, diff
from stip_keyservice.service.policy.lint import LEVELS, Finding, lint, lint_host
from stip_keyservice.service.policy.signing import PolicySignature, require_signed, sign, signature_path
from stip_protocol.attestation.hostpolicy import HostPolicy
from stip_protocol.durable import write_atomically
from stip_protocol.errors import ConfigurationError
from stip_protocol.release import service_id
from stip_protocol.runtime.files import read_ed25519, read_file

FILE = click.Path(path_type=Path, dir_okay=False)
EXISTING = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.group("policy")
def group() -> None:
    """Which enclaves get keys, of which instances, how much, for how long.

    \b
    From nothing to a policy in force:
      stip-keyservice policy init policy.toml --measurement MRENCLAVE --manifest SHA256
      stip-keyservice policy lint policy.toml          what is unwise
      stip-keyservice policy sign policy.toml          with the home's developer key
      stip-keyservice serve --config keyservice.toml   refuses an unsigned one
    To change it: edit, raise `serial`, `policy diff OLD NEW`, lint, sign, send the service SIGHUP.
    """


@group.command("init")
@click.argument("file", type=FILE)
@click.option("--development", "chosen", flag_value="development", help="Trust a simulated TEE: nothing is protected.")
@click.option("--production", "chosen", flag_value="production", default="production", help="Intel's root.  [default]")
@click.option("--measurement", "measurements", multiple=True, metavar="HEX", help="MRENCLAVE to accept; repeatable.")
@click.option("--manifest", "manifests", multiple=True, metavar="HEX", help="SHA-256 of a manifest.json to serve.")
@click.option("--simulated-root", "root", metavar="HEX", help="SHA-256 of the simulated root; with --development.")
@json_option
def init(file: Path, chosen: str, measurements: tuple[str, ...], manifests: tuple[str, ...], root: str | None) -> None:
    """Write a commented policy to FILE, which must not exist.

    What is not given stands there as a placeholder, and the file refuses to load until it is filled in.
    """
    if root is not None and chosen != "development":
        raise click.UsageError("--simulated-root is for --development.")
    for name, values in (("--measurement", measurements), ("--manifest", manifests), ("--simulated-root", (root,))):
        for value in values:
            _require_digest(name, value)
    text = (
        template.development(measurements, manifests, root)
        if chosen == "development"
        else template.production(measurements, manifests)
    )
    _write_new(file, text.encode())
    missing = text.count('"<') - text.count('# platforms = ["<')
    document = {"file": str(file), "mode": chosen, "placeholders": missing}
    next_step = f"Fill in {missing} placeholder(s)" if missing else "Read it"
    show(document, lambda: f"{file}: written. {next_step}, then: stip-keyservice policy lint {file}")


@group.command("check")
@click.argument("file", type=EXISTING)
@json_option
def check(file: Path) -> None:
    """Validate a policy FILE, and say what it accepts.

    Exits 2 where a rule is unknown or contradicts another, or where the policy would accept nobody. What loads and is
    unwise is counted; `policy lint` names it.
    """
    policy = Policy.load(file)
    document = _document(policy) | {"findings": _counts(lint(policy))}
    maxima = [] if policy.leakage is None else [maximum.words() for maximum in policy.leakage.maxima]
    rows = [*(document | {"leakage_maxima": "; ".join(maxima) or "none"}).items()]
    show(document, lambda: table(("rule", "value"), rows, empty=""))


@group.command("lint")
@click.argument("file", type=EXISTING)
@click.option("--strict", is_flag=True, help="Exit 1 on warnings, too.")
@click.option("--host", is_flag=True, help="FILE is a policy for TDX hosts, as `evidence examine` takes it.")
@json_option
def lint_policy(file: Path, strict: bool, host: bool) -> None:
    """What loads in FILE and is unwise: errors, warnings, notes.

    Exits 1 where there is an error (with --strict: a warning), 2 where the policy does not load.
    """
    findings = lint_host(HostPolicy.load(file)) if host else lint(Policy.load(file))
    counts = _counts(findings)
    document = {"findings": [asdict(finding) for finding in findings], **counts}
    show(document, lambda: _findings(findings))
    refused = counts["error"] or (strict and counts["warning"])
    click.get_current_context().exit(1 if refused else 0)


@group.command("diff")
@click.argument("old", type=EXISTING)
@click.argument("new", type=EXISTING)
@click.option("--no-widening", is_flag=True, help="Exit 1 where NEW accepts anything that OLD refused.")
@json_option
def diff_policies(old: Path, new: Path, no_widening: bool) -> None:
    """What NEW accepts that OLD did not, and what it no longer does: by meaning, not by text.

    Prints nothing of comments, order or spelling. Every widening is marked.
    """
    changes = diff(Policy.load(old), Policy.load(new))
    widenings = sum(change.widens for change in changes)
    document = {
        "changes": [asdict(change) for change in changes],
        "widens": widenings,
        "narrows": sum(change.narrows for change in changes),
    }
    show(document, lambda: _changes(changes))
    click.get_current_context().exit(1 if no_widening and widenings else 0)


@group.command("sign")
@click.argument("file", type=EXISTING)
@click.option("--key", type=EXISTING, help="Ed25519 private key, PEM.  [default: developer.key of the home]")
@home_option
@json_option
def sign_policy(file: Path, key: Path | None, home: Path | None) -> None:
    """Sign a policy FILE: writes FILE.sig beside it.

    The service accepts it where its `policy_key` is the public half of the key. A changed policy needs a higher
    `serial` than the one that was signed before.
    """
    private = _existing_home(home).developer if key is None else _private_key(key)
    made = sign(file, private, now=int(time.time()))
    counts = _counts(lint(Policy.load(file)))
    if counts["error"] or counts["warning"]:
        said = f"{counts['error']} error(s) and {counts['warning']} warning(s)"
        click.echo(f"Signed, though `policy lint` has {said}.", err=True)
    _show_signature(file, made, service_id(private.public_key()))


@group.command("verify")
@click.argument("file", type=EXISTING)
@click.option("--key", type=EXISTING, help="Ed25519 public key, PEM.  [default: developer.pub of the home]")
@home_option
@json_option
def verify_policy(file: Path, key: Path | None, home: Path | None) -> None:
    """Check the signature of a policy FILE, offline. Exits 1 where it does not hold, 2 where there is none."""
    public = read_ed25519(locate(home) / "developer.pub" if key is None else key, field="key")
    _, signature = require_signed(file, public)
    _show_signature(file, signature, service_id(public))


def _document(policy: Policy) -> dict[str, Any]:
    evidence, lease, release, leakage = policy.evidence, policy.lease, policy.release, policy.leakage
    return {
        "digest": policy.digest().hex(),
        "serial": policy.serial,
        "mode": evidence.mode,
        "simulated": policy.simulated,
        "measurements": [measurement.hex() for measurement in evidence.measurements],
        "signers": [signer.mrsigner.hex() for signer in evidence.signers],
        "accepted_statuses": [accepted.status for accepted in evidence.accepted_statuses],
        "instances": [rule.manifest.hex() for rule in policy.instances],
        "lease_seconds": lease.seconds,
        "lease_tokens": lease.tokens,
        "heartbeat_tokens": lease.heartbeat_tokens,
        "lease_audience": lease.audience,
        "nonce_seconds": release.nonce_seconds,
        "delegation_seconds": release.delegation_seconds,
        "tokens_per_user": policy.budgets.tokens_per_user,
        "tokens_per_day": policy.budgets.tokens_per_day,
        "canaries_per_bundle": policy.canaries.per_bundle,
        "leakage_required": leakage is not None and leakage.required,
        "leakage_maxima": [] if leakage is None else [maximum.model_dump(mode="json") for maximum in leakage.maxima],
    }


def _counts(findings: Sequence[Finding]) -> dict[str, int]:
    found = Counter(finding.level for finding in findings)
    return {level: found[level] for level in LEVELS}


def _findings(findings: Sequence[Finding]) -> Table | str:
    rows = [(one.level, escape(one.rule), escape(one.why), escape(one.advice)) for one in findings]
    return table(("level", "rule", "what", "do"), rows, empty="Nothing to say against it.")


def _changes(changes: Sequence[Change]) -> Group | str:
    if not changes:
        return "Both mean the same."
    parts = (
        ("Accepted now, and not before:", [change for change in changes if change.widens]),
        ("Not accepted any more:", [change for change in changes if change.narrows]),
        ("Changed, and neither:", [change for change in changes if not change.widens and not change.narrows]),
    )
    shown: list[Table | str] = []
    for title, those in parts:
        if those:
            rows = [("WIDENS" if one.widens else "", *map(_cell, (one.rule, one.before, one.after))) for one in those]
            shown += [title, table(("", "rule", "before", "after"), rows, empty=""), ""]
    return Group(*shown[:-1])


def _cell(text: str | None) -> str:
    return "-" if text is None else escape(text)


def _show_signature(file: Path, signature: PolicySignature, signer: bytes) -> None:
    document = {
        "policy": str(file),
        "signature": str(signature_path(file)),
        "serial": signature.serial,
        "digest": signature.policy.hex(),
        "sha256": signature.file.hex(),
        "signed_at": moment(signature.signed_at),
        "signer": signer.hex(),
    }
    show(document, lambda: table(("", ""), document.items(), empty=""))


def _existing_home(home: Path | None) -> Home:
    """Never a new one: what a key signs that was made a moment ago, nobody accepts."""
    path = locate(home)
    if not (path / "developer.pub").is_file():
        raise ConfigurationError.because("home", f"{path}, which holds no developer.pub", "a home, or --key")
    return Home.open(path)


def _private_key(path: Path) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(read_file(path, field="key"), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigurationError.because(f"key: {path}", "something else", "an unencrypted Ed25519 private key in PEM")
    return key


def _require_digest(name: str, value: str | None) -> None:
    if value is not None and not (len(value) == 64 and all(digit in "0123456789abcdefABCDEF" for digit in value)):
        raise click.UsageError(f"{name}: 64 hex digits.")


def _write_new(path: Path, data: bytes) -> None:
    if os.path.lexists(path):
        raise ConfigurationError.because("policy", f"{path}, which exists", "a new file")
    try:
        write_atomically(path, data)
    except OSError as error:
        raise ConfigurationError(f"policy {path}: {error.strerror}") from None
