"""`stip-gateway tls`: what an operator without a PKI issues, and what the parts then accept."""

from __future__ import annotations

import json
import os
import ssl
import stat
import threading
from pathlib import Path
from socket import socketpair

import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from stip_gateway.cli import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "tls"
    tls(made, "init")
    return made


def tls(folder: Path, *arguments: str, exit_code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["tls", *arguments, "--folder", str(folder)], catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result


def leaf(folder: Path, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / f"{name}.pem").read_bytes())


def handshake(folder: Path, *, server: str, client: str, name: str) -> None:
    """A TLS handshake with client authentication over a pair of sockets; raises `ssl.SSLError` on either side."""
    accepting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    accepting.load_cert_chain(folder / f"{server}.pem", folder / f"{server}.key")
    accepting.load_verify_locations(folder / "operator-ca.pem")
    accepting.verify_mode = ssl.CERT_REQUIRED
    calling = ssl.create_default_context(cafile=str(folder / "operator-ca.pem"))
    calling.load_cert_chain(folder / f"{client}.pem", folder / f"{client}.key")
    left, right = socketpair()
    refused: list[ssl.SSLError] = []

    def accept() -> None:
        try:
            with accepting.wrap_socket(left, server_side=True) as connection:
                connection.sendall(b"1")
        except ssl.SSLError as error:
            refused.append(error)
            left.close()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        with calling.wrap_socket(right, server_hostname=name) as connection:
            connection.recv(1)
    finally:
        right.close()
        thread.join()
    if refused:
        raise refused[0]


def test_keys_are_closed_to_others_and_certificates_are_over_p256(folder: Path) -> None:
    tls(folder, "issue", "replica-1", "--name", "10.0.0.11", "--name", "replica-1.example")
    for name in ("operator-ca", "replica-1"):
        assert stat.S_IMODE((folder / f"{name}.key").stat().st_mode) == 0o600
        key = leaf(folder, name).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        assert isinstance(key.curve, ec.SECP256R1)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_names_and_uses_are_those_asked_for(folder: Path) -> None:
    tls(folder, "issue", "gateway", "--name", "gateway.example", "--name", "10.0.0.2")
    tls(folder, "issue", "gateway-client", "--use", "client")
    names = leaf(folder, "gateway").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["gateway.example"]
    assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.2"]
    for name, use in (
        ("gateway", ExtendedKeyUsageOID.SERVER_AUTH),
        ("gateway-client", ExtendedKeyUsageOID.CLIENT_AUTH),
    ):
        assert list(leaf(folder, name).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [use]


def test_gateway_and_server_meet_with_what_was_issued(folder: Path) -> None:
    tls(folder, "issue", "replica-1", "--name", "10.0.0.11")
    tls(folder, "issue", "gateway-client", "--use", "client")
    handshake(folder, server="replica-1", client="gateway-client", name="10.0.0.11")


@pytest.mark.parametrize(
    ("server", "client", "name"),
    [
        pytest.param("replica-1", "replica-2", "10.0.0.11", id="a server's certificate used as a client's"),
        pytest.param("gateway-client", "gateway-client", "gateway-client", id="a client's certificate used to serve"),
        pytest.param("replica-1", "gateway-client", "10.0.0.12", id="another name than the one that was issued"),
    ],
)
def test_a_certificate_is_refused_where_it_was_not_issued_for(
    folder: Path, server: str, client: str, name: str
) -> None:
    tls(folder, "issue", "replica-1", "--name", "10.0.0.11")
    tls(folder, "issue", "replica-2", "--name", "10.0.0.12")
    tls(folder, "issue", "gateway-client", "--use", "client")
    with pytest.raises(ssl.SSLError):
        handshake(folder, server=server, client=client, name=name)


@pytest.mark.parametrize("arguments", [("issue", "replica-1"), ("init",)])
def test_nothing_that_exists_is_overwritten(folder: Path, arguments: tuple[str, ...]) -> None:
    tls(folder, "issue", "replica-1")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "nothing is overwritten" in tls(folder, *arguments, exit_code=2).output
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["operator-ca", "../gateway", "a/b", "", "-x"])
def test_a_name_that_is_no_plain_file_name_is_refused(folder: Path, name: str) -> None:
    before = sorted(folder.parent.rglob("*"))
    result = CliRunner().invoke(main, ["tls", "issue", "--folder", str(folder), "--", name])
    assert result.exit_code == 2
    assert sorted(folder.parent.rglob("*")) == before


def test_a_certificate_name_that_is_no_dns_name_is_refused(folder: Path) -> None:
    assert "DNS name" in tls(folder, "issue", "gateway", "--name", "bücher.example", exit_code=2).output


def test_a_renewal_keeps_key_names_and_uses_and_has_a_new_term(folder: Path) -> None:
    tls(folder, "issue", "gateway", "--name", "gateway.example", "--name", "10.0.0.2", "--days", "5")
    key, old = (folder / "gateway.key").read_bytes(), leaf(folder, "gateway")
    tls(folder, "renew", "gateway", "--days", "90")
    new = leaf(folder, "gateway")
    assert (folder / "gateway.key").read_bytes() == key
    assert new.public_key() == old.public_key()
    assert (new.not_valid_after_utc - old.not_valid_after_utc).days in (84, 85)
    for kind in (x509.SubjectAlternativeName, x509.ExtendedKeyUsage):
        assert set(new.extensions.get_extension_for_class(kind).value) == set(
            old.extensions.get_extension_for_class(kind).value
        )


def test_a_certificate_never_outlives_its_authority(tmp_path: Path) -> None:
    folder = tmp_path / "short"
    tls(folder, "init", "--days", "10")
    tls(folder, "issue", "gateway", "--days", "90")
    assert leaf(folder, "gateway").not_valid_after_utc == leaf(folder, "operator-ca").not_valid_after_utc


def test_a_renewal_of_another_authoritys_certificate_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tls(other, "init", "--subject", "Another authority")
    tls(other, "issue", "gateway")
    for name in ("gateway.pem", "gateway.key"):
        (folder / name).write_bytes((other / name).read_bytes())
    assert "another authority" in tls(folder, "renew", "gateway", exit_code=2).output


def test_show_lists_days_left_and_fails_where_something_ends_soon(folder: Path) -> None:
    tls(folder, "issue", "gateway", "--days", "90")
    tls(folder, "issue", "replica-1", "--days", "20")
    lines = tls(folder, "show", exit_code=1).output.splitlines()
    assert lines[0].split()[:2] == ["name", "good"]
    assert [line.split()[0] for line in lines[1:]] == ["replica-1", "gateway", "operator-ca"]
    assert lines[1].endswith("renew")
    tls(folder, "show", "--within", "10")
    shown = json.loads(tls(folder, "show", "--json", "--within", "10").output)
    assert [one["days_left"] for one in shown["certificates"][:2]] == [19, 89]


def test_show_names_a_key_that_others_can_read_and_a_foreign_certificate(folder: Path, tmp_path: Path) -> None:
    tls(folder, "issue", "gateway")
    os.chmod(folder / "gateway.key", 0o644)
    assert "chmod go=" in tls(folder, "show", exit_code=1).output
    os.chmod(folder / "gateway.key", 0o600)
    tls(folder, "show")
    tls(tmp_path / "other", "init", "--subject", "STIP operator authority")
    tls(tmp_path / "other", "issue", "stranger")
    (folder / "stranger.pem").write_bytes((tmp_path / "other" / "stranger.pem").read_bytes())
    assert "not issued by" in tls(folder, "show", exit_code=1).output


def test_a_folder_without_an_authority_exits_2_and_says_which_file(tmp_path: Path) -> None:
    assert "operator-ca.key" in tls(tmp_path, "issue", "gateway", exit_code=2).output
    tls(tmp_path, "show", exit_code=2)
