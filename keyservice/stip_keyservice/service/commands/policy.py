"""`stip-keyservice policy`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from stip_keyservice.service.commands.room import json_option, show, table
from stip_keyservice.service.policy import Policy


@click.group("policy")
def group() -> None:
    """Which enclaves get keys, and of which instances."""


@group.command("check")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@json_option
def check(file: Path) -> None:
    """Validate a policy FILE and say what it accepts.

    Exits 2 where a rule is unknown or contradicts another, or where the policy would accept nobody.
    """
    policy = Policy.load(file)
    document = _document(policy)
    maxima = [] if policy.leakage is None else [maximum.words() for maximum in policy.leakage.maxima]
    rows = [*(document | {"leakage_maxima": "; ".join(maxima) or "none"}).items()]
    show(document, lambda: table(("rule", "value"), rows, empty=""))


def _document(policy: Policy) -> dict[str, Any]:
    evidence, lease, release, leakage = policy.evidence, policy.lease, policy.release, policy.leakage
    return {
        "digest": policy.digest().hex(),
        "mode": evidence.mode,
        "simulated": policy.simulated,
        "measurements": [measurement.hex() for measurement in evidence.measurements],
        "signers": [signer.mrsigner.hex() for signer in evidence.signers],
        "accepted_statuses": [accepted.status for accepted in evidence.accepted_statuses],
        "lease_seconds": lease.seconds,
        "lease_tokens": lease.tokens,
        "heartbeat_tokens": lease.heartbeat_tokens,
        "lease_audience": lease.audience,
        "nonce_seconds": release.nonce_seconds,
        "delegation_seconds": release.delegation_seconds,
        "leakage_required": leakage is not None and leakage.required,
        "leakage_maxima": [] if leakage is None else [maximum.model_dump(mode="json") for maximum in leakage.maxima],
    }
