"""User keys: their owner's alone, never overwritten, never shown."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from stip import keys
from stip_protocol.errors import ConfigurationError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STIP_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_key_is_stored_for_its_owner_alone_and_loads_again(home: Path):
    made = keys.create(keys.locate("mine"))
    assert made.path == home / "keys" / "mine.pem"
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(made.path.parent.stat().st_mode) == 0o700
    assert keys.load(made.path).public == made.public
    assert len(made.public) == 32
    assert keys.stored() == [made.path]


def test_a_key_is_private_whatever_the_umask(home: Path):
    before = os.umask(0)
    try:
        made = keys.create(keys.locate("mine"))
    finally:
        os.umask(before)
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o600


def test_a_key_is_never_overwritten():
    made = keys.create(keys.locate("mine"))
    before = made.path.read_bytes()
    with pytest.raises(ConfigurationError, match="never overwritten"):
        keys.create(made.path)
    assert made.path.read_bytes() == before


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o644, 0o620, 0o666])
def test_a_key_that_others_may_read_or_write_is_refused(mode: int):
    made = keys.create(keys.locate("mine"))
    made.path.chmod(mode)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        keys.load(made.path)


def test_a_link_to_a_key_is_refused(tmp_path: Path):
    made = keys.create(keys.locate("mine"))
    (tmp_path / "link.pem").symlink_to(made.path)
    with pytest.raises(ConfigurationError):
        keys.load(tmp_path / "link.pem")


def test_what_is_no_ed25519_key_is_refused(tmp_path: Path):
    path = tmp_path / "other.pem"
    other = ec.generate_private_key(ec.SECP256R1())
    for content in (b"", b"text", other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())):
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(ConfigurationError, match="Ed25519"):
            keys.load(path)
    with pytest.raises(ConfigurationError, match="stip keys create"):
        keys.load(tmp_path / "missing.pem")
    with pytest.raises(ConfigurationError):
        keys.load(tmp_path)


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 65, "a\n"])
def test_a_key_name_is_a_plain_name(name: str):
    with pytest.raises(ConfigurationError, match="key name"):
        keys.locate(name)


def test_neither_repr_nor_enrolment_shows_the_private_half():
    made = keys.create(keys.locate("mine"))
    private = made.path.read_text().splitlines()[1]
    request = keys.enrolment(made, "ada")
    assert json.loads(request) == {"user": "ada", "public_key": made.public.hex(), "algorithm": "Ed25519"}
    assert private not in request
    assert "private" not in repr(made)
