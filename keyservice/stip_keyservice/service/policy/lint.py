"""What loads and is unwise. A policy that does not load is refused before anything here is asked.

error    it should not be served in production
warning  it is weaker than the rollout guide has it; sign it where you know why
note     what whoever signs should have in mind
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from stip_keyservice.service.policy.document import Policy
from stip_protocol.attestation.hostpolicy import HostPolicy
from stip_protocol.attestation.policy import EvidenceRules
from stip_protocol.release import CANARIES_LIMIT

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")

DAY = 24 * 3600
OUTDATED = ("OutOfDate", "OutOfDateConfigurationNeeded")
LONG_LEASE_SECONDS = 3600
LONG_GRACE_SECONDS = 900
LARGE_HEARTBEAT_TOKENS = 256
"""Four times the design's bound: seconds of generation that a revocation waits for."""
LARGE_CHUNK_TOKENS = 65_536
OLD_COLLATERAL_SECONDS = 30 * DAY
"""Intel's collateral runs out after 30 days (its `nextUpdate`)."""
MANY_MEASUREMENTS = 4
LONG_NONCE_SECONDS = 300


@dataclass(frozen=True)
class Finding:
    """One thing that is unwise: the rule, why, and what to do."""

    level: Level
    rule: str
    why: str
    advice: str


def lint(policy: Policy) -> tuple[Finding, ...]:
    """All findings, the gravest first."""
    return _sorted(finding for check in CHECKS for finding in check(policy))


def lint_host(policy: HostPolicy) -> tuple[Finding, ...]:
    """All findings about a policy for TDX hosts, the gravest first."""
    shared = (finding for check in SHARED for finding in check(policy, ""))
    return _sorted((*shared, *(finding for check in HOST_CHECKS for finding in check(policy))))


def _sorted(found: Iterable[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(found, key=lambda finding: LEVELS.index(finding.level)))


def _mode(policy: Policy) -> Iterator[Finding]:
    if policy.simulated:
        why = "a simulated TEE is trusted: nothing is protected"
        yield Finding("warning", "evidence.simulated_root_sha256", why, "Use it for trials alone, with a home apart.")
    elif policy.evidence.mode == "development":
        why = "a policy for development accepts Intel's evidence: real keys go out under rules that are not for it"
        yield Finding("error", "evidence.mode", why, 'Say mode = "production".')


def _outdated(rules: EvidenceRules, table: str) -> Iterator[Finding]:
    for accepted in rules.accepted_statuses:
        if accepted.status in OUTDATED:
            why = f"{accepted.status}: platforms with published, unpatched vulnerabilities get keys"
            advice = "Have the platform updated; drop the status."
            yield Finding("error", f"{table}accepted_statuses", why, advice)


def _advisories(rules: EvidenceRules, table: str) -> Iterator[Finding]:
    for accepted in rules.accepted_statuses:
        if accepted.status != "UpToDate" and not accepted.advisories:
            why = f"{accepted.status} without advisories: it comes with some, and each that is not listed refuses"
            advice = "List the advisories that you have read and accept."
            yield Finding("warning", f"{table}accepted_statuses", why, advice)


def _evaluation_number(rules: EvidenceRules, table: str) -> Iterator[Finding]:
    if rules.minimum_tcb_evaluation_number == 0:
        why = "0: a host may present the collateral of an older TCB recovery, which calls old platforms up to date"
        advice = "Name the tcbEvaluationDataNumber of Intel's current round, and raise it with each."
        yield Finding("warning", f"{table}minimum_tcb_evaluation_number", why, advice)


def _collateral(rules: EvidenceRules, table: str) -> Iterator[Finding]:
    age = rules.collateral_max_age_seconds
    if age > OLD_COLLATERAL_SECONDS:
        why = f"{age // DAY} days: a platform that was revoked since counts as good for so long"
        yield Finding("warning", f"{table}collateral_max_age_seconds", why, "30 days or less.")


def _platforms(rules: EvidenceRules, table: str) -> Iterator[Finding]:
    if rules.platforms is None:
        why = "none: any genuine platform gets keys, also one whose owner solders an interposer to its memory"
        advice = "Enrol platforms (PPID or platform instance id), above all where the operator hosts the enclave."
        yield Finding("warning", f"{table}platforms", why, advice)


def _signers(policy: Policy) -> Iterator[Finding]:
    for signer in policy.evidence.signers:
        why = f"product {signer.isv_prod_id}: whoever holds that signing key makes enclaves that get keys"
        yield Finding("warning", "evidence.signers", why, "List measurements instead, wherever you can.")
        if signer.minimum_isv_svn == 0:
            why = f"product {signer.isv_prod_id} from SVN 0: every old release stays accepted"
            yield Finding("error", "evidence.signers", why, "Name the oldest release without known holes.")


def _measurements(policy: Policy) -> Iterator[Finding]:
    count = len(policy.evidence.measurements)
    if count > MANY_MEASUREMENTS:
        why = f"{count} at once: the oldest decides what protects"
        yield Finding("note", "evidence.measurements", why, "Drop releases that are not in use.")


def _lease(policy: Policy) -> Iterator[Finding]:
    lease = policy.lease
    for rule, got, most, level, why, advice in (
        ("seconds", lease.seconds, LONG_LEASE_SECONDS, "warning",
         "s: so long may an idle enclave hold what it was given", "An hour or less; leases are renewed by heartbeat."),
        ("grace_seconds", lease.grace_seconds, LONG_GRACE_SECONDS, "note",
         "s after its end a lease is still renewed", "15 minutes or less."),
        ("heartbeat_tokens", lease.heartbeat_tokens, LARGE_HEARTBEAT_TOKENS, "warning",
         "tokens: so late may a revocation reach a running enclave", "64, unless the network is slow."),
        ("tokens", lease.tokens, LARGE_CHUNK_TOKENS, "note",
         "tokens are debited at once, and lost where an enclave dies", "A few thousand."),
    ):  # fmt: skip
        if got > most:
            yield Finding("warning" if level == "warning" else "note", f"lease.{rule}", f"{got} {why}", advice)


def _nonce(policy: Policy) -> Iterator[Finding]:
    seconds = policy.release.nonce_seconds
    if seconds > LONG_NONCE_SECONDS:
        why = f"{seconds} s: so old may evidence be that counts as fresh"
        yield Finding("note", "release.nonce_seconds", why, "A minute.")


def _budgets(policy: Policy) -> Iterator[Finding]:
    if policy.budgets.tokens_per_user is None and policy.budgets.tokens_per_day is None:
        why = "none: what a user may take is what an administrator grants; theft of the model is paid in tokens"
        yield Finding("note", "budgets", why, "Cap what a user gets a day.")


def _instances(policy: Policy) -> Iterator[Finding]:
    if not policy.instances:
        why = "none: whatever is registered is served"
        yield Finding("note", "instances", why, "List the signed manifests, as production must.")
    for rule in policy.instances:
        name = f"instances[{rule.manifest.hex()[:16]}…]"
        if rule.kind == "shared" and rule.users is None and rule.domains is None:
            why = "shared, and for whoever is made a member: any member who helps the operator reads the others"
            yield Finding("note", name, why, "Name the users or domains that trust each other.")


def _leakage(policy: Policy) -> Iterator[Finding]:
    if policy.leakage is None:
        why = "none: instances are served whatever leaks from them, audited or not"
        yield Finding("warning", "leakage", why, "Say required = true, and maxima for the attackers that you expect.")
        return
    if not policy.leakage.required:
        why = "false: an instance that no maximum speaks of needs no audit"
        yield Finding("warning", "leakage.required", why, "Say required = true.")
    if not policy.leakage.maxima:
        why = "none: an audit must be there, and may have found anything"
        yield Finding("warning", "leakage.maxima", why, "State how much each attacker may get.")


def _maxima(policy: Policy) -> Iterator[Finding]:
    maxima = () if policy.leakage is None else policy.leakage.maxima
    if maxima and not any("server" in maximum.knowledge for maximum in maxima):
        why = "no rule for `server`: what the operator reads alone is not bounded"
        yield Finding("warning", "leakage.maxima", why, 'Add a maximum with knowledge = ["server"].')
    for number, maximum in enumerate(maxima, start=1):
        name = f"leakage.maxima[{number}]"
        if maximum.at_most >= 1:
            yield Finding("error", name, f"{maximum.words()}: refuses nothing", "State a share below 1, or drop it.")
        if maximum.attacks is None:
            why = f"{maximum.words()}: no attacks named, so an audit that ran fewer of them passes"
            yield Finding("warning", name, why, "Name the attacks that must have been run.")
        why = f"{maximum.words()}: holds where every attack says not applicable, which is the developer's word"
        yield Finding("note", name, why, "Read the reasons (`instances show`) before you list a manifest.")


def _canaries(policy: Policy) -> Iterator[Finding]:
    if policy.canaries.per_bundle == 0:
        why = "0: no enclave tries the server with sessions whose results are known"
        yield Finding("note", "canaries.per_bundle", why, f"1 to {CANARIES_LIMIT}, where instances have canaries.")


def _firmware(policy: HostPolicy) -> Iterator[Finding]:
    for name, values in (("rtmr1", policy.rtmr1), ("rtmr2", policy.rtmr2)):
        if values is None:
            why = "not pinned: any kernel and any command line that this firmware starts"
            yield Finding("error", name, why, "List the values of the images that you trust.")
    if policy.rtmr0 is None:
        why = "not pinned: whatever virtual hardware and boot order the operator gives the firmware"
        yield Finding("note", "rtmr0", why, "List the values of the machine shapes in use.")


def _features(policy: HostPolicy) -> Iterator[Finding]:
    if "PERFMON" not in policy.forbidden_attributes:
        why = "PERFMON is allowed: performance counters are a side channel"
        yield Finding("warning", "forbidden_attributes", why, "Forbid it.")
    if policy.xfam_mask is None:
        why = "none: any extended feature of the processor may be enabled"
        yield Finding("note", "xfam_mask", why, "State the features that your image uses.")


def _host_mode(policy: HostPolicy) -> Iterator[Finding]:
    if policy.simulated_root_sha256 is not None:
        why = "a simulated TEE is trusted: nothing is protected"
        yield Finding("warning", "simulated_root_sha256", why, "Use it for trials alone.")
    elif policy.mode == "development":
        yield Finding("error", "mode", "a policy for development accepts Intel's evidence", 'Say mode = "production".')


def _evidence(policy: Policy) -> Iterator[Finding]:
    for check in SHARED:
        yield from check(policy.evidence, "evidence.")


SHARED: tuple[Callable[[EvidenceRules, str], Iterator[Finding]], ...] = (
    _outdated,
    _advisories,
    _evaluation_number,
    _collateral,
    _platforms,
)
"""Of the evidence of any TEE; told the table that the rules stand in."""
HOST_CHECKS: tuple[Callable[[HostPolicy], Iterator[Finding]], ...] = (_host_mode, _firmware, _features)
CHECKS: tuple[Callable[[Policy], Iterator[Finding]], ...] = (
    _mode,
    _evidence,
    _signers,
    _measurements,
    _lease,
    _nonce,
    _budgets,
    _instances,
    _leakage,
    _maxima,
    _canaries,
)
