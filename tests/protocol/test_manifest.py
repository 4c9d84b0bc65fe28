"""Signed manifests and the files they list."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from stip_protocol.errors import ManifestMismatch, SignatureInvalid, VersionUnsupported
from stip_protocol.manifest import ClientManifest, Manifest, check_files, file_digest

KEY = Ed25519PrivateKey.generate()


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "instance": "ab" * 16, "epoch": 0, "preset": "paper", "dtype": "float32", "width": 8, "vocabulary": 11,
        "max_positions": 64, "output": "top", "server": {}, "enclave": {}, "certificate": {"top1_agreement": 1.0},
    }  # fmt: skip
    return Manifest(**{**fields, **changes})


def test_a_written_manifest_loads_with_the_digest_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    digest = manifest().write(path, KEY)
    assert Manifest.load(path, KEY.public_key()) == (manifest(), digest)
    assert digest == hashlib.sha256(path.read_bytes()).digest()


def test_an_edited_manifest_another_signer_and_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    manifest().write(path, KEY)
    with pytest.raises(SignatureInvalid):
        Manifest.load(path, Ed25519PrivateKey.generate().public_key())
    with pytest.raises(SignatureInvalid):
        ClientManifest.load(path, KEY.public_key())
    path.write_bytes(path.read_bytes().replace(b'"epoch": 0', b'"epoch": 1'))
    with pytest.raises(SignatureInvalid):
        Manifest.load(path, KEY.public_key())


def test_a_missing_signature_and_a_foreign_major_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    manifest(version=(2, 0)).write(path, KEY)
    with pytest.raises(VersionUnsupported):
        Manifest.load(path, KEY.public_key())
    path.with_name("manifest.json.sig").unlink()
    with pytest.raises(ManifestMismatch):
        Manifest.load(path, KEY.public_key())


def test_a_file_that_differs_is_missing_or_was_added_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"content")
    listed = {"a.bin": file_digest(tmp_path / "a.bin")}
    check_files(tmp_path, listed)
    (tmp_path / "a.bin").write_bytes(b"CONTENT")
    with pytest.raises(ManifestMismatch, match="sha256"):
        check_files(tmp_path, listed)
    (tmp_path / "a.bin").write_bytes(b"longer content")
    with pytest.raises(ManifestMismatch, match="size"):
        check_files(tmp_path, listed)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(ManifestMismatch, match="no such file"):
        check_files(tmp_path, listed)
    (tmp_path / "b.bin").write_bytes(b"")
    with pytest.raises(ManifestMismatch, match="unlisted"):
        check_files(tmp_path, listed)


def test_a_folder_that_is_not_there_is_a_mismatch_and_no_crash(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "server", tmp_path / "file"):
        with pytest.raises(ManifestMismatch, match=folder.name):
            check_files(folder, {})


@pytest.mark.parametrize("name", ["../escape", "a/b", ".hidden", ""])
def test_a_manifest_cannot_name_a_file_outside_its_folder(name: str) -> None:
    with pytest.raises(ValueError, match="server"):
        manifest(server={name: {"sha256": "0" * 64, "size": 0}})
