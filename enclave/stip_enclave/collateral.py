"""The host's side of an enclave's collateral: a process beside the enclave that keeps the file fresh.

It runs outside of the enclave and is not trusted with anything: what it writes is signed by Intel and dated. It needs
no torch, and nothing of `enclave.toml` but the name of the file.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import threading
import time
from pathlib import Path

import click
from pydantic import ValidationError

from stip_enclave.config import EnclaveSettings
from stip_protocol.attestation.authenticity import require_authentic
from stip_protocol.attestation.collateral_cache import Kept, replace_public
from stip_protocol.attestation.evidence import COLLATERAL_LIMIT
from stip_protocol.attestation.pccs import INTEL_PCS, Endpoint, PccsClient
from stip_protocol.attestation.platforms import PlatformKind
from stip_protocol.attestation.quote import QUOTE_LIMIT, without_padding
from stip_protocol.attestation.roots import intel_sgx_root
from stip_protocol.documents import explain
from stip_protocol.errors import AttestationError, CollateralUnavailable, ConfigurationError, StipError
from stip_protocol.runtime.config import load
from stip_protocol.runtime.files import read_file

ROOT_LIMIT = 16 << 10
FETCH_SECONDS = 60.0
JITTER = 0.1
"""Share by which the time between two looks varies, so that many hosts do not ask at once."""


@click.command("collateral")
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False), required=True,
              help="enclave.toml, whose `collateral` names the file.")  # fmt: skip
@click.option("--endpoint", "urls", multiple=True, metavar="URL",
              help=f"A PCCS, or PCS. Repeatable, tried in order.  [default: {INTEL_PCS}]")  # fmt: skip
@click.option("--ca", type=click.Path(path_type=Path, dir_okay=False),
              help="PEM roots of the endpoints' TLS certificates.  [default: the system's]")  # fmt: skip
@click.option("--proxy", metavar="URL", help="An HTTP proxy. Proxies in the environment are not looked at.")
@click.option("--quote", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="Any quote of this platform.")  # fmt: skip
@click.option("--platform", metavar="TEE-FMSPC-CA", help="This platform by name, as in sgx-00a067110000-platform.")
@click.option("--refresh-share", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.9,
              show_default=True, help="Share of its life that is left when it is renewed.")  # fmt: skip
@click.option("--every-minutes", type=click.FloatRange(0.01, 24 * 60), default=60.0, show_default=True,
              help="How often to look whether it is due, and to try again after a failure.")  # fmt: skip
@click.option("--once", is_flag=True, help="Renew now, whether it is due or not, and leave.")
@click.option("--simulated-root", type=click.Path(path_type=Path, exists=True, dir_okay=False), hidden=True)
def command(
    config: Path,
    urls: tuple[str, ...],
    ca: Path | None,
    proxy: str | None,
    quote: Path | None,
    platform: str | None,
    refresh_share: float,
    every_minutes: float,
    once: bool,
    simulated_root: Path | None,
) -> None:
    """Keep the enclave's collateral file fresh. Runs on the enclave's host, outside of Gramine.

    Which platform: --quote or --platform, or else what the file that lies there is about. A new file replaces it in
    one step, and only where it is signed under Intel's root, valid, and newer. Runs until SIGTERM; the enclave reads
    the file whenever it attests, so nothing is restarted.

    Exits 0 once stopped or, with --once, renewed; 1 where no source gives collateral; 2 on a configuration error.
    """
    try:
        settings = load(EnclaveSettings, config)
        anchor = _anchor(settings, simulated_root)
        client = PccsClient(_endpoints(urls, ca, proxy), anchor)
        kind = _kind(settings.collateral, quote, platform, anchor)
        keeper = Keeper(settings.collateral, kind, client, anchor, refresh_share)
        if once:
            _say("renewed", keeper.renew())
        else:
            _run(keeper, client, every_minutes * 60)
    except StipError as error:
        click.echo(f"stip-enclave: {error} ({error.action})", err=True)
        raise SystemExit(2 if isinstance(error, ConfigurationError) else 1) from None


class Keeper:
    """One collateral file and where it comes from."""

    def __init__(self, path: Path, kind: PlatformKind, client: PccsClient, anchor: bytes, refresh_share: float) -> None:
        self._path, self._kind, self._client, self._anchor, self._share = path, kind, client, anchor, refresh_share

    def due(self, now: float) -> bool:
        """Nothing usable lies there, or no more than the share of its life is left."""
        kept = _kept(self._path, self._anchor)
        if kept is None or kept.kind != self._kind:
            return True
        return now >= kept.expires - (kept.expires - kept.issued) * self._share

    def renew(self) -> Kept:
        """Fetch, and replace the file where this is newer. Raises `CollateralUnavailable`, `ConfigurationError`."""
        new = Kept.parse(self._client.fetch(self._kind, seconds=FETCH_SECONDS))
        kept = _kept(self._path, self._anchor)
        if kept is not None and kept.kind == new.kind and not kept.yields_to(new, now=int(time.time())):
            return kept
        replace_public(self._path, new.data)
        return new


def _run(keeper: Keeper, client: PccsClient, every: float) -> None:
    stop = threading.Event()

    def leave(*_: object) -> None:
        stop.set()
        client.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    while not stop.is_set():
        if keeper.due(time.time()):
            try:
                _say("renewed", keeper.renew())
            except CollateralUnavailable as error:
                click.echo(f"stip-enclave: {error} ({error.action})", err=True)
        stop.wait(every * random.uniform(1 - JITTER, 1 + JITTER))  # noqa: S311 - spreads load, guards nothing


def _say(event: str, kept: Kept) -> None:
    """One JSON line, for logs."""
    document = {"event": event, "platform": str(kept.kind), "issued": kept.issued, "expires": kept.expires}
    click.echo(json.dumps(document))
    sys.stdout.flush()


def _endpoints(urls: tuple[str, ...], ca: Path | None, proxy: str | None) -> list[Endpoint]:
    try:
        return [Endpoint(url=url, ca=ca, proxy=proxy) for url in urls or (INTEL_PCS,)]
    except ValidationError as error:
        raise ConfigurationError(f"--endpoint, --proxy: {explain(error)}", field="endpoint") from None


def _anchor(settings: EnclaveSettings, simulated_root: Path | None) -> bytes:
    if settings.simulated != (simulated_root is not None):
        raise ConfigurationError.because("--simulated-root", "given, or not", "given where simulated = true, else not")
    if simulated_root is None:
        return intel_sgx_root()
    return read_file(simulated_root, field="simulated root", limit=ROOT_LIMIT)


def _kind(path: Path, quote: Path | None, platform: str | None, anchor: bytes) -> PlatformKind:
    try:
        if platform is not None:
            return PlatformKind.from_name(platform)
        if quote is not None:
            data = without_padding(read_file(quote, field="quote", limit=QUOTE_LIMIT))
            return PlatformKind.of_quote(data, anchor)
    except AttestationError as error:
        raise ConfigurationError(error.message, field=error.field) from None
    kept = _kept(path, anchor)
    if kept is None:
        raise ConfigurationError.because("platform", f"{path} does not say which", "--quote or --platform")
    return kept.kind


def _kept(path: Path, anchor: bytes) -> Kept | None:
    """What lies there, where it can be used."""
    try:
        with path.open("rb") as file:
            kept = Kept.parse(file.read(COLLATERAL_LIMIT + 1))
        require_authentic(kept.collateral, kept.kind, anchor)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}", field="collateral") from None
    except AttestationError:
        return None
    return kept
