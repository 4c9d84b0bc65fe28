"""The key service's home: made once, whole, and closed to everybody else."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_public_key,
)

from stip_keyservice.certificates import issue_server_certificate
from stip_keyservice.home import HOME_VARIABLE, Home
from stip_protocol.errors import ConfigurationError, IntegrityError, StipError
from stip_protocol.runtime.authority import Authority, make_authority

FILES = {
    *(f"{name}.{end}" for name in ("developer", "service", "sealing") for end in ("key", "pub")),
    *(f"{name}.{end}" for name in ("link-ca", "tls-ca") for end in ("key", "pem")),
    "root.key",
    "home.toml",
    ".lock",
}


def raw(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())


def test_a_first_use_makes_everything_private_and_a_second_finds_the_same(tmp_path: Path) -> None:
    first = Home.open(tmp_path / "deep" / "home")
    assert {path.name for path in first.path.iterdir()} == FILES
    assert first.path.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in first.path.iterdir()} == {0o600}
    second = Home.open(tmp_path / "deep" / "home")
    assert raw(second.developer) == raw(first.developer) != raw(first.service)
    assert second.root.material() == first.root.material()
    assert second.link_ca.certificate == first.link_ca.certificate
    published = load_pem_public_key((first.path / "sealing.pub").read_bytes())
    assert published == first.sealing.public_key()


def test_the_environment_names_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "elsewhere"))
    assert Home.open().path == tmp_path / "elsewhere"


def test_processes_that_open_a_new_home_at_once_agree_on_its_keys(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from stip_keyservice.home import Home;"
        "print(Home.open(Path(sys.argv[1])).root.material().hex())"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "home")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(4)]
    assert len({process.communicate()[0] for process in running}) == 1
    assert all(process.returncode == 0 for process in running)


@pytest.mark.parametrize("name", ["", "developer.key", "root.key", "sealing.pub"])
def test_a_home_that_others_can_read_is_refused(tmp_path: Path, name: str) -> None:
    home = Home.open(tmp_path / "home")
    (home.path / name).chmod(0o755 if not name else 0o640)
    with pytest.raises(ConfigurationError, match="no access for group and others"):
        Home.open(home.path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("developer.key", b"no key", "developer.key: got something else"),
        ("sealing.key", None, "sealing.key: altered, another file, or under another root key"),
        ("root.key", bytes(31), "root.key: got 31 bytes, allowed: 32 bytes"),
        ("service.pub", b"another", "service.pub: got another key"),
        ("link-ca.pem", b"no certificate", "link-ca.pem: got something else"),
        ("developer.key", bytes((1 << 20) + 1), "at most 1048576 bytes"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(
    tmp_path: Path, name: str, content: bytes | None, says: str
) -> None:
    home = Home.open(tmp_path / "home")
    (home.path / name).write_bytes((home.path / "service.key").read_bytes() if content is None else content)
    with pytest.raises(StipError, match=says):
        Home.open(home.path)


def test_an_authority_over_another_key_is_refused(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "home")
    (home.path / "link-ca.pem").write_bytes(home.tls_ca.pem)
    with pytest.raises(ConfigurationError, match="another key"):
        Home.open(home.path)


def test_a_home_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    with pytest.raises(ConfigurationError, match="File exists"):
        Home.open(tmp_path / "home")


def test_the_repr_shows_no_key(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "home")
    assert repr(home) == f"Home(path={str(tmp_path / 'home')!r})"
    assert "PRIVATE" not in repr(home.tls("localhost"))
    assert "key=" not in repr(home.link_ca)


async def test_a_client_that_pins_the_local_authority_reaches_the_server(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "home")
    identity = home.tls("localhost")
    (tmp_path / "chain.pem").write_bytes(identity.chain)
    (tmp_path / "key.pem").write_bytes(identity.private_key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "chain.pem", tmp_path / "key.pem")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"here")
        writer.close()

    listener = socket.create_server(("127.0.0.1", 0))
    async with await asyncio.start_server(answer, sock=listener, ssl=context):
        for name in ("localhost", "127.0.0.1"):
            trust = ssl.create_default_context(cadata=home.tls_ca.pem.decode())
            reader, writer = await asyncio.open_connection(*listener.getsockname(), ssl=trust, server_hostname=name)
            assert await reader.read() == b"here"
            writer.close()


def test_a_certificate_is_kept_until_its_name_changes(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "home")
    assert home.tls("localhost") == home.tls("localhost")
    other = home.tls("keys.example")
    assert other != home.tls("localhost")
    leaf = x509.load_pem_x509_certificate(other.chain)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["keys.example"]


def test_a_configured_certificate_is_kept_and_refused_for_another_name(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "home")
    home.tls("localhost")
    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority = Authority.load(authority_key, make_authority(authority_key, "Corporate authority"), "authority")
    chain = issue_server_certificate(authority, key, "keys.example")
    (home.path / "tls.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(IntegrityError, match=r"tls\.key also your own, beside its tls\.pem"):
        home.tls("keys.example")
    (home.path / "tls.pem").write_bytes(chain)
    assert home.tls("keys.example").chain == chain
    with pytest.raises(ConfigurationError, match=r"tls\.pem: got a certificate for other names, allowed: localhost"):
        home.tls("localhost")
    assert (home.path / "tls.pem").read_bytes() == chain


def test_public_files_are_subject_public_key_info(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "home")
    for name, key in (("developer", home.developer), ("service", home.service)):
        stored = (home.path / f"{name}.pub").read_bytes()
        assert stored == key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
