"""The Gramine provider over a stand-in for /dev/attestation: named pipes with one state, as the device has."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stip_protocol.attestation.evidence import COLLATERAL_LIMIT
from stip_protocol.attestation.gramine import GramineProvider
from stip_protocol.attestation.quote import QUOTE_LIMIT
from stip_protocol.errors import ConfigurationError, EvidenceMalformed

QUOTES = 24


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """Answers each 64 bytes written with a quote that names them, one after the other."""
    directory = tmp_path / "attestation"
    directory.mkdir()
    for name in ("user_report_data", "quote"):
        os.mkfifo(directory / name)

    def serve() -> None:
        for _ in range(QUOTES):
            report_data = (directory / "user_report_data").read_bytes()
            (directory / "quote").write_bytes(b"quote over " + report_data)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield directory
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_each_of_many_threads_gets_the_quote_over_its_own_report_data(device: Path, tmp_path: Path) -> None:
    providers = [GramineProvider(tmp_path / "collateral", device=device) for _ in range(3)]
    wanted = [bytes([index]) * 64 for index in range(QUOTES)]
    with ThreadPoolExecutor(8) as pool:
        quotes = list(pool.map(lambda pair: pair[0].quote(pair[1]), zip(providers * 8, wanted, strict=True)))
    assert quotes == [b"quote over " + report_data for report_data in wanted]


def plain(tmp_path: Path, quote: bytes = b"q", collateral: bytes = b"c") -> GramineProvider:
    (tmp_path / "quote").write_bytes(quote)
    (tmp_path / "user_report_data").touch()
    (tmp_path / "collateral.json").write_bytes(collateral)
    return GramineProvider(tmp_path / "collateral.json", device=tmp_path)


def test_collateral_is_read_anew_each_time(tmp_path: Path) -> None:
    provider = plain(tmp_path, collateral=b"old")
    assert provider.collateral() == b"old"
    (tmp_path / "collateral.json").write_bytes(b"new")
    assert provider.collateral() == b"new"
    assert not provider.simulated


@pytest.mark.parametrize("length", [0, 63, 65])
def test_report_data_of_another_length_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(EvidenceMalformed):
        plain(tmp_path).quote(bytes(length))


def test_oversize_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvidenceMalformed):
        plain(tmp_path, quote=bytes(QUOTE_LIMIT + 1)).quote(bytes(64))
    with pytest.raises(EvidenceMalformed):
        plain(tmp_path, quote=b"").quote(bytes(64))
    with pytest.raises(EvidenceMalformed):
        plain(tmp_path, collateral=bytes(COLLATERAL_LIMIT + 1)).collateral()


def test_a_missing_device_or_file_is_a_configuration_error(tmp_path: Path) -> None:
    provider = GramineProvider(tmp_path / "absent", device=tmp_path / "nowhere")
    with pytest.raises(ConfigurationError):
        provider.quote(bytes(64))
    with pytest.raises(ConfigurationError):
        provider.collateral()
