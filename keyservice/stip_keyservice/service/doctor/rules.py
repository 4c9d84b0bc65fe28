"""Checks of what is decided by: the configuration, the policy, the collateral."""

from __future__ import annotations

from stip_keyservice.service.collateral import anchor
from stip_keyservice.service.config import KeyServiceSettings, trust
from stip_keyservice.service.doctor.checking import Finding, Patient, failed, passed, warned, worst
from stip_keyservice.service.doctor.state import reading
from stip_keyservice.service.policy.lint import lint
from stip_keyservice.service.policy.loading import recorded
from stip_keyservice.service.policy.signing import read
from stip_protocol.attestation.collateral_cache import CollateralCache, Kept
from stip_protocol.errors import StipError
from stip_protocol.runtime.files import read_ed25519

SOON_SECONDS = 3 * 24 * 3600
NAME_IT = "Name it: --config keyservice.toml."


def configuration(patient: Patient) -> Finding:
    """keyservice.toml can be used."""
    if patient.refusal is not None:
        return failed(patient.refusal.message, "Correct the file; the message names the field and what is allowed.")
    if patient.settings is None:
        return warned("none named: policy, collateral, ports and names are not checked", NAME_IT)
    if patient.settings.simulated:
        return warned(
            "simulated evidence is accepted: nothing is protected", "Never serve this to anybody but yourself."
        )
    return passed("loads")


def policy(patient: Patient) -> Finding:
    """It loads, is signed, is no step back, agrees with the configuration, and lint finds nothing."""
    settings = patient.settings
    if settings is None:
        return warned("not checked: no configuration", NAME_IT)
    key_path = settings.policy_key or patient.home / "developer.pub"
    found = read(settings.policy, read_ed25519(key_path, field="policy_key"))
    trust(settings, found.policy)
    findings = [passed(f"serial {found.policy.serial or 'none'}, {'signed' if found.signature else 'not signed'}")]
    if found.signature is None:
        verdict = warned if settings.simulated else failed
        findings.append(verdict("not signed", "`stip-keyservice policy sign` with the developer key."))
    findings += _step_back(patient, found.policy.serial)
    for one in lint(found.policy):
        if one.level != "note":
            findings.append((failed if one.level == "error" else warned)(f"{one.rule}: {one.why}", one.advice))
    return worst(findings)


def collateral(patient: Patient) -> Finding:
    """What is kept for each platform has not expired and is young enough for the policy."""
    settings = patient.settings
    if settings is None:
        return warned("not checked: no configuration", NAME_IT)
    if settings.collateral is None:
        return passed("none of its own: evidence brings its collateral")
    folder = settings.collateral.cache
    kept = CollateralCache(folder, anchor(settings)).everything() if folder.is_dir() else []
    if not kept:
        found = "none kept yet"
        fetched = "It is fetched with the first platform; `stip-keyservice collateral` fetches it before."
        offline = "Offline and nothing kept: import a bundle, or no release can be decided."
        return warned(found, fetched) if settings.collateral.endpoints else failed(found, offline)
    most = _allowed_age(settings)
    return worst([_of_platform(one, int(patient.wall()), most) for one in kept])


def _of_platform(kept: Kept, now: int, most: int | None) -> Finding:
    age, left = now - kept.issued, kept.expires - now
    found = f"{kept.kind}: {age / 86400:.1f} days old, expires in {left / 86400:.1f} days"
    if left <= 0:
        return failed(f"{kept.kind}: expired", "Check that a source answers, or import a newer bundle.")
    if most is not None and age > most:
        return failed(f"{found}: older than the policy allows", "Fetch it again, or raise the policy's collateral age.")
    soon = "It should have been renewed by now: check the sources, or import a newer bundle."
    return warned(f"{found}: soon", soon) if left < SOON_SECONDS else passed(found)


def _allowed_age(settings: KeyServiceSettings) -> int | None:
    """The policy's, where it can be read: what is wrong with it, its own check says."""
    try:
        home = settings.policy_key
        if home is None:
            return None
        return read(settings.policy, read_ed25519(home, field="policy_key")).policy.evidence.collateral_max_age_seconds
    except StipError:
        return None


def _step_back(patient: Patient, serial: int | None) -> list[Finding]:
    try:
        with reading(patient) as db:
            before = recorded(db)
    except StipError:  # what is wrong with the state, its own checks say
        return []
    if before is None or before.serial is None or (serial is not None and serial >= before.serial):
        return []
    remedy = "Raise `serial` above the last one that was loaded, and sign: an older policy is refused."
    return [failed(f"a step back: serial {serial or 'none'} after {before.serial}", remedy)]
