"""Checks of the home: who can read it, whether the root key opens it, and the certificates."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from stip_keyservice.home import exists
from stip_keyservice.rootkey import files, providers
from stip_keyservice.rootkey import settings as home_settings
from stip_keyservice.rootkey.ring import SoftwareRoot
from stip_keyservice.rootkey.settings import Pkcs11Settings, SharesSettings
from stip_keyservice.service.doctor.checking import Finding, Patient, failed, passed, warned, worst
from stip_keyservice.service.doctor.state import reading
from stip_keyservice.service.vault import Vault
from stip_protocol.errors import StipError
from stip_protocol.runtime.authority import general_name, names_of

SOON = timedelta(days=14)
RESTORE = "Restore the home from its backup, or run the rehearsed recovery (docs/keyservice.md)."


def permissions(patient: Patient) -> Finding:
    """Nobody but the owner reads or writes anything in the home."""
    if not exists(patient.home) and not files.present(patient.home):
        return failed(
            f"{patient.home} is not the home of a key service", "Name it: --home, or `home` in keyservice.toml."
        )
    paths = [patient.home, *sorted(patient.home.iterdir())]
    open_ones = [path.name for path in paths if not path.is_symlink() and path.stat().st_mode & 0o077]
    owners = {path.stat().st_uid for path in paths if not path.is_symlink()}
    links = [path.name for path in paths if path.is_symlink()]
    if open_ones:
        return failed(
            f"open to group or others: {', '.join(open_ones[:8])}", "chmod -R go= the home, then ask who read it."
        )
    if len(owners) > 1:
        return failed("files of several owners", "chown -R the home to the service's user.")
    return (
        warned(f"links: {', '.join(links[:8])}", "Keep the home's files in the home.") if links else passed("private")
    )


def root_key(patient: Patient) -> Finding:
    """It opens every private key of the home and every data key of the database."""
    root = _root(patient)
    if isinstance(root, Finding):
        return root
    missing = [name for name in files.SECRET_FILES if name != "tls.key" and not (patient.home / name).exists()]
    if missing:
        return failed(f"missing: {', '.join(missing)}", RESTORE)
    plain = []
    for path in files.present(patient.home):
        data = path.read_bytes()
        files.unseal(root, path.name, data)
        plain += [path.name] if files.is_plain(data) and path.name != "tls.key" else []
    vault = Vault(root)
    with reading(patient) as db:
        rows = vault.everything(db)
        for row in rows:
            vault.require_opens(db, row.id)
    if plain:
        return warned(f"not wrapped: {', '.join(plain)}", "Run `stip-keyservice state upgrade`.")
    return passed(f"opens {len(files.present(patient.home))} keys of the home and {len(rows)} of the database")


def tls(patient: Patient) -> Finding:
    """The server's certificate is current, for the configured name, and over the key that is there."""
    path = patient.home / "tls.pem"
    if not path.exists():
        return warned(
            "none yet", "The service issues one when it starts, or put tls.key and tls.pem of your own authority."
        )
    chain = x509.load_pem_x509_certificates(path.read_bytes())
    found = [_current(chain[0], patient, "certificate"), _chained(chain)]
    if patient.settings is not None and general_name(patient.settings.dns_name) not in names_of(chain[0]):
        name = patient.settings.dns_name
        found.append(failed(f"not for {name}", "Have it issued for dns_name, or correct that in keyservice.toml."))
    found.append(_over_key(chain[0], patient))
    return worst(found)


def link_authority(patient: Patient) -> Finding:
    """The authority of link certificates is current: gateways trust it by its file."""
    return _current(x509.load_pem_x509_certificate((patient.home / "link-ca.pem").read_bytes()), patient, "link-ca.pem")


def _root(patient: Patient) -> SoftwareRoot | Finding:
    """The root key, or why it is not tried: the doctor asks nobody for a PIN or for shares."""
    configured = home_settings.load(patient.home)
    chosen = configured.root_key
    asked = (isinstance(chosen, Pkcs11Settings) and chosen.pin_file is None) or (
        isinstance(chosen, SharesSettings) and not chosen.files
    )
    if asked:
        return warned(
            f"not tried: {chosen.kind} asks for a secret", "`stip-keyservice recover --dry-run` tries it with you."
        )
    return providers.open_ring(patient.home, configured)


def _current(certificate: x509.Certificate, patient: Patient, what: str) -> Finding:
    now = datetime.fromtimestamp(patient.wall(), UTC)
    ends = certificate.not_valid_after_utc
    found = f"{what} until {ends:%Y-%m-%d}"
    if now >= ends or now < certificate.not_valid_before_utc:
        return failed(f"{found}: not valid now", "Restart the service to renew its own, or have yours issued again.")
    remedy = "It renews its own certificate at the next start; renew one of another authority, or the authority, now."
    return warned(f"{found}: soon", remedy) if ends - now < SOON else passed(found)


def _chained(chain: list[x509.Certificate]) -> Finding:
    for child, parent in pairwise(chain):
        try:
            child.verify_directly_issued_by(parent)
        except Exception:  # noqa: BLE001 - the library raises many kinds; each means the same here
            return failed(
                "a certificate is not issued by the next one", "Put the chain in order: leaf first, then issuers."
            )
    return passed("chain in order")


def _over_key(leaf: x509.Certificate, patient: Patient) -> Finding:
    path = patient.home / "tls.key"
    try:
        root = _root(patient)
        if isinstance(root, Finding):
            return root
        key = load_pem_private_key(files.unseal(root, path.name, path.read_bytes()), None)
    except (OSError, ValueError, StipError):
        return failed("tls.key cannot be opened", RESTORE)
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    same = key.public_key().public_bytes(*form) == leaf.public_key().public_bytes(*form)
    return (
        passed("over tls.key") if same else failed("not over tls.key", "Put the pair of key and certificate together.")
    )
