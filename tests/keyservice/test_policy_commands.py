"""`stip-keyservice policy`: from an empty folder to a signed policy, and what a reviewer is told."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from stip_keyservice.home import Home
from stip_keyservice.service.policy import Policy
from stip_keyservice.service.policy.lint import lint

from .conftest import MEASUREMENT, make_instance
from .place import Place, told_here
from .policies import CHANGES, A, B, Edit, drop, edited, put


def write(path: Path, *edits: Edit) -> Path:
    path.write_bytes(tomli_w.dumps(edited(*edits)).encode())
    return path


def told(*arguments: object, code: int = 0) -> Any:
    """The JSON document of one command."""
    done = told_here("policy", *map(str, arguments), "--json")
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def pem(folder: Path, key: Ed25519PrivateKey | X25519PrivateKey) -> tuple[Path, Path]:
    private, public = folder / "key.pem", folder / "key.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


def test_init_writes_a_production_policy_that_loads_and_has_no_errors(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    said = told("init", path, "--measurement", A, "--manifest", B)
    assert (said["mode"], said["placeholders"]) == ("production", 0)
    loaded = Policy.load(path)
    assert loaded.evidence.measurements == (bytes.fromhex(A),)
    assert [rule.manifest.hex() for rule in loaded.instances] == [B]
    assert (loaded.serial, loaded.leakage is not None) == (1, True)
    assert {finding.level for finding in lint(loaded)} == {"warning", "note"}
    assert [finding.rule for finding in lint(loaded) if finding.level == "warning"] == ["evidence.platforms"]


def test_init_leaves_placeholders_that_refuse_to_load(tmp_path: Path) -> None:
    for mode, count in (("--production", 2), ("--development", 2)):
        path = tmp_path / f"{mode}.toml"
        assert told("init", path, mode)["placeholders"] == count
        assert path.read_text().count('"<') - path.read_text().count('# platforms = ["<') == count
        assert told("lint", path, code=2)["error"]["code"] == "policy_invalid"


def test_init_for_development_trusts_the_simulated_root_that_is_named(place: Place) -> None:
    path, root = place.folder / "new.toml", place.platform.root_sha256.hex()
    told("init", path, "--development", "--measurement", MEASUREMENT.hex(), "--simulated-root", root)
    loaded = Policy.load(path)
    assert (loaded.simulated, loaded.instances, loaded.serial) == (True, (), None)
    (place.folder / "policy.toml").write_bytes(path.read_bytes())
    with place.service() as (announced, _):
        assert announced["part"] == "keyservice"


def test_init_overwrites_nothing(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("mine")
    assert told("init", path, code=2)["error"]["code"] == "configuration_invalid"
    (tmp_path / "link.toml").symlink_to(tmp_path / "nowhere")
    assert told("init", tmp_path / "link.toml", code=2)["error"]["code"] == "configuration_invalid"
    assert told("init", tmp_path / "none" / "policy.toml", code=2)["error"]["code"] == "configuration_invalid"
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--measurement", "aa"],
        ["--manifest", "zz" * 32],
        ["--simulated-root", A],
        ["--development", "--simulated-root", "short"],
        ["--measurement", f'{"a" * 62}"]'],
    ],
)
def test_init_refuses_what_is_no_digest(tmp_path: Path, arguments: list[str]) -> None:
    path = tmp_path / "policy.toml"
    assert told_here("policy", "init", str(path), *arguments).exit_code == 2
    assert not path.exists()


def test_lint_exits_by_the_gravest_finding(tmp_path: Path) -> None:
    sound = write(tmp_path / "sound.toml", drop("evidence", "signers"))
    assert told("lint", sound, "--strict")["warning"] == 0
    weak = write(tmp_path / "weak.toml", drop("evidence", "platforms"))
    assert told("lint", weak)["warning"] == 2
    told("lint", weak, "--strict", code=1)
    bad = write(tmp_path / "bad.toml", put("evidence", "accepted_statuses", [{"status": "OutOfDate"}]))
    found = told("lint", bad, code=1)
    assert found["error"] == 1
    assert found["findings"][0]["rule"] == "evidence.accepted_statuses"
    shown = told_here("policy", "lint", str(bad))
    assert shown.exit_code == 1
    assert "error" in shown.stdout
    assert "OutOfDate" in shown.stdout


def test_check_counts_what_lint_finds(tmp_path: Path) -> None:
    document = told("check", write(tmp_path / "policy.toml"))
    assert document["findings"] == {"error": 0, "warning": 1, "note": 1}
    assert (document["serial"], document["instances"], document["tokens_per_day"]) == (7, [A, B], 50_000)


def test_diff_marks_every_widening_and_can_refuse_it(tmp_path: Path) -> None:
    old = write(tmp_path / "old.toml")
    again = tmp_path / "again.toml"
    again.write_bytes(b"# the same, reviewed\n" + old.read_bytes())
    assert told("diff", old, again) == {"changes": [], "widens": 0, "narrows": 0}
    assert "Both mean the same." in told_here("policy", "diff", str(old), str(again)).stdout
    new = write(
        tmp_path / "new.toml",
        CHANGES["a higher serial"][0], CHANGES["longer leases"][0], CHANGES["an instance less"][0],
    )  # fmt: skip
    found = told("diff", old, new)
    assert (found["widens"], found["narrows"], len(found["changes"])) == (1, 1, 3)
    told("diff", old, new, "--no-widening", code=1)
    told("diff", new, old, "--no-widening", code=1)
    narrower = write(tmp_path / "narrower.toml", CHANGES["an instance less"][0])
    told("diff", old, narrower, "--no-widening")
    shown = told_here("policy", "diff", str(old), str(new)).stdout
    widened, narrowed = shown.split("Not accepted any more:")
    assert "WIDENS" in widened
    assert "lease.seconds" in widened
    assert f"instances[manifest={B}]" in narrowed


def test_sign_and_verify_with_the_home_s_key(place: Place) -> None:
    Home.open(place.home)
    path = write(place.folder / "policy.toml")
    assert told("verify", path, "--home", place.home, code=2)["error"]["code"] == "policy_invalid"
    made = told("sign", path, "--home", place.home)
    assert (made["serial"], made["digest"]) == (7, Policy.load(path).digest().hex())
    assert made["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert told("verify", path, "--home", place.home) == made
    path.write_bytes(path.read_bytes() + b"\n")
    assert told("verify", path, "--home", place.home, code=1)["error"]["code"] == "signature_invalid"


def test_sign_and_verify_with_any_ed25519_key_need_no_home(tmp_path: Path) -> None:
    private, public = pem(tmp_path, Ed25519PrivateKey.generate())
    path = write(tmp_path / "policy.toml")
    made = told("sign", path, "--key", private)
    assert told("verify", path, "--key", public) == made
    (tmp_path / "other").mkdir()
    _, other = pem(tmp_path / "other", Ed25519PrivateKey.generate())
    assert told("verify", path, "--key", other, code=1)["error"]["code"] == "signature_invalid"


def test_sign_takes_no_other_key_and_makes_no_home(tmp_path: Path) -> None:
    private, _ = pem(tmp_path, X25519PrivateKey.generate())
    path = write(tmp_path / "policy.toml")
    assert told("sign", path, "--key", private, code=2)["error"]["code"] == "configuration_invalid"
    assert told("sign", path, "--home", tmp_path / "mistyped", code=2)["error"]["code"] == "configuration_invalid"
    assert told("verify", path, "--home", tmp_path / "mistyped", code=2)["error"]["code"] == "configuration_invalid"
    assert not (tmp_path / "mistyped").exists()
    assert not (tmp_path / "policy.toml.sig").exists()


def test_sign_says_what_lint_would(tmp_path: Path) -> None:
    private, _ = pem(tmp_path, Ed25519PrivateKey.generate())
    path = write(tmp_path / "policy.toml", drop("leakage"))
    done = told_here("policy", "sign", str(path), "--key", str(private))
    assert done.exit_code == 0
    assert "0 error(s) and 2 warning(s)" in done.stderr


def test_add_with_a_policy_refuses_an_instance_that_it_does_not_list(place: Place) -> None:
    made = make_instance(place.folder / "instance", Home.open(place.home))
    digest = hashlib.sha256((made.directory / "manifest.json").read_bytes()).hexdigest()
    path = place.folder / "listed.toml"
    text = (place.folder / "policy.toml").read_text()
    arguments = ["instances", "add", str(made.directory), "--shared", "--policy", str(path)]
    for rule in (f'manifest = "{A}"', f'manifest = "{digest}"\nkind = "dedicated"'):
        path.write_text(f"{text}\n[[instances]]\n{rule}\n")
        assert place.call_here(*arguments, code=1)["error"]["code"] == "instance_refused"
    path.write_text(f'{text}\n[[instances]]\nmanifest = "{digest}"\n')
    added = place.call_here(*arguments)
    assert added["epochs"][0]["manifest_digest"] == digest
