"""Signatures of policies, and no way back to an older one: on real files, a real home, a real state."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from sqlalchemy import update

from stip_keyservice.home import Home
from stip_keyservice.service.auditlog import AuditEntry, AuditLog
from stip_keyservice.service.config import KeyServiceSettings
from stip_keyservice.service.policy.loading import InForce, recorded
from stip_keyservice.service.policy.reloading import PolicyLoader
from stip_keyservice.service.policy.signing import PolicySignature, read, require_signed, sign, signature_path
from stip_keyservice.service.state.schema import meta
from stip_keyservice.service.state.store import Store
from stip_protocol.documents import Signed
from stip_protocol.errors import ConfigurationError, IntegrityError, PolicyInvalid, SignatureInvalid
from stip_protocol.telemetry import Telemetry
from stip_stack.tee import SimulatedPlatform

from .policies import A, Edit, Tables, drop, edited, put

NOW = 1_800_000_000


class Room:
    """A home, its state, and a policy file: what a key service starts from."""

    def __init__(self, folder: Path, platform: SimulatedPlatform) -> None:
        self.home = Home.open(folder / "home")
        self.store = Store(self.home.database)
        self.path = folder / "policy.toml"
        self.root = folder / "root.der"
        self.root.write_bytes(platform.root_der)
        self.simulated = {
            "evidence": {
                "mode": "development",
                "measurements": [A],
                "simulated_root_sha256": platform.root_sha256.hex(),
            }
        }
        self.telemetry = Telemetry("keyservice", simulated=False)

    def write(self, *edits: Edit, tables: Tables | None = None) -> None:
        made = edited(*edits) if tables is None else edited(*edits, tables=tables)
        self.path.write_bytes(tomli_w.dumps(made).encode())

    def sign(self, key: Ed25519PrivateKey | None = None) -> PolicySignature:
        return sign(self.path, key or self.home.developer, now=NOW)

    def unsign(self) -> None:
        signature_path(self.path).unlink(missing_ok=True)

    def loader(self, **settings: Any) -> PolicyLoader:
        made = KeyServiceSettings(policy=self.path, **settings)
        return PolicyLoader(made, self.home, self.store, self.telemetry)

    def load(self, **settings: Any) -> InForce:
        return self.loader(**settings).load()

    def load_simulated(self) -> InForce:
        return self.load(simulated=True, simulated_root=self.root)

    def entries(self) -> list[AuditEntry]:
        return list(AuditLog(self.store, self.home.service).latest(100))

    def loads(self, result: str) -> float | None:
        return self.telemetry.registry.get_sample_value("stip_policy_loads_total", {"result": result})


@pytest.fixture
def room(tmp_path: Path, platform: SimulatedPlatform) -> Iterator[Room]:
    made = Room(tmp_path, platform)
    with closing(made.store):
        yield made


def test_a_signed_policy_for_production_is_in_force(room: Room) -> None:
    room.write()
    signature = room.sign()
    found = room.load()
    assert (found.digest, found.signed, found.root_der) == (signature.policy, True, None)
    assert (found.policy.serial, signature.serial, signature.signed_at) == (7, 7, NOW)
    (entry,) = room.entries()
    assert (entry.event, entry.code, entry.detail) == ("policy_loaded", "granted", found.digest.hex())
    assert room.loads("loaded") == 1
    assert room.telemetry.registry.get_sample_value("stip_policy_serial") == 7


def test_a_signature_says_file_serial_and_meaning_under_a_context_of_its_own(room: Room) -> None:
    room.write()
    made = room.sign()
    signed = Signed.from_bytes(signature_path(room.path).read_bytes())
    assert signed.open(PolicySignature, room.home.developer.public_key()) == made
    room.home.developer.public_key().verify(signed.signature, b"stip/policy\x00" + signed.payload)


def altered(room: Room, where: str, position: int) -> None:
    path = {"policy": room.path, "signature": signature_path(room.path)}[where]
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("position", [0, 3, 40, 90, -1, -40, -100])
@pytest.mark.parametrize("where", ["policy", "signature"])
def test_one_bit_of_either_file_undoes_the_signature(room: Room, where: str, position: int) -> None:
    room.write()
    room.sign()
    altered(room, where, position)
    with pytest.raises(SignatureInvalid):
        room.load()


def test_a_comment_added_after_signing_undoes_the_signature(room: Room) -> None:
    room.write()
    room.sign()
    room.path.write_bytes(room.path.read_bytes() + b"# harmless\n")
    with pytest.raises(SignatureInvalid, match="changed since it was signed"):
        room.load()


@pytest.mark.parametrize("content", [b"", b"\xa0", b"\xff" * 100, bytes(5000)])
def test_what_is_no_signature_is_refused(room: Room, content: bytes) -> None:
    room.write()
    signature_path(room.path).write_bytes(content)
    with pytest.raises(SignatureInvalid, match="not a signature of a policy"):
        room.load()


def test_a_policy_is_not_read_before_its_signature_holds(room: Room) -> None:
    room.path.write_bytes(b"this is not TOML")
    signature_path(room.path).write_bytes(
        Signed.sign(
            PolicySignature(file=bytes(32), serial=1, policy=bytes(32), signed_at=1), Ed25519PrivateKey.generate()
        ).to_bytes()
    )
    with pytest.raises(SignatureInvalid, match="not signed by the expected key"):
        room.load()


def test_production_refuses_an_unsigned_policy_and_one_of_another_key(room: Room) -> None:
    room.write()
    with pytest.raises(PolicyInvalid, match="no signature"):
        room.load()
    room.sign(Ed25519PrivateKey.generate())
    with pytest.raises(SignatureInvalid, match="not signed by the expected key"):
        room.load()
    assert [(entry.event, entry.code) for entry in room.entries()] == [
        ("policy_loaded", "policy_invalid"),
        ("policy_loaded", "signature_invalid"),
    ]
    assert (room.loads("policy_invalid"), room.loads("signature_invalid")) == (1, 1)


def test_policy_key_names_who_signs_and_then_the_home_s_key_does_not(room: Room, tmp_path: Path) -> None:
    security = Ed25519PrivateKey.generate()
    (tmp_path / "security.pub").write_bytes(
        security.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    room.write()
    room.sign(security)
    assert room.load(policy_key=tmp_path / "security.pub").signed
    room.sign()
    with pytest.raises(SignatureInvalid):
        room.load(policy_key=tmp_path / "security.pub")
    with pytest.raises(ConfigurationError, match="policy_key"):
        room.load(policy_key=room.path)


def test_a_simulated_service_takes_an_unsigned_policy_and_no_broken_signature(room: Room) -> None:
    room.write(tables=room.simulated)
    found = room.load_simulated()
    assert (found.signed, found.policy.serial) == (False, None)
    assert found.root_der == room.root.read_bytes()
    signature_path(room.path).write_bytes(b"\xa0")
    with pytest.raises(SignatureInvalid):
        room.load_simulated()


def test_whoever_writes_the_policy_cannot_call_it_one_for_development_to_go_unsigned(room: Room) -> None:
    room.write(put("evidence", "mode", "development"))
    with pytest.raises(PolicyInvalid, match="no signature"):
        room.load()
    room.write(tables=room.simulated)
    with pytest.raises(ConfigurationError, match="simulated"):
        room.load()


def test_an_older_serial_never_comes_back(room: Room) -> None:
    room.write()
    room.sign()
    old = room.path.read_bytes(), signature_path(room.path).read_bytes()
    room.load()
    room.write(put("serial", 8), drop("evidence", "measurements"))
    room.sign()
    room.load()
    room.path.write_bytes(old[0])
    signature_path(room.path).write_bytes(old[1])
    with pytest.raises(PolicyInvalid, match="got 7, allowed: at least 8"):
        room.load()
    entry = room.entries()[-1]
    assert (entry.event, entry.code) == ("policy_loaded", "policy_invalid")
    with room.store.read() as db:
        kept = recorded(db)
    assert kept is not None
    assert (kept.serial, kept.signed) == (8, True)


def test_one_serial_is_one_policy(room: Room) -> None:
    room.write()
    room.sign()
    room.load()
    room.write(put("lease", "seconds", 901))
    room.unsign()
    room.sign()
    with pytest.raises(PolicyInvalid, match="got 7, allowed: at least 8"):
        room.load()


def test_the_same_policy_loads_again_and_leaves_one_entry(room: Room) -> None:
    room.write()
    room.sign()
    room.load()
    room.path.write_bytes(b"# reviewed\n" + room.path.read_bytes())
    room.sign()
    room.load()
    assert len(room.entries()) == 1
    assert room.loads("loaded") == 2


def test_after_a_signed_policy_an_unsigned_one_is_refused_even_where_nothing_is_protected(room: Room) -> None:
    room.write()
    room.sign()
    room.load()
    room.unsign()
    room.write(tables=room.simulated)
    with pytest.raises(PolicyInvalid, match="unsigned"):
        room.load_simulated()


def test_after_a_serial_a_policy_without_one_is_refused(room: Room) -> None:
    room.write(put("serial", 3), tables=room.simulated)
    room.load_simulated()
    room.write(tables=room.simulated)
    with pytest.raises(PolicyInvalid, match="got none, allowed: at least 3"):
        room.load_simulated()


def test_a_policy_without_serial_may_change_as_it_likes(room: Room) -> None:
    for seconds in (100, 200, 100):
        room.write(put("lease", "seconds", seconds), tables=room.simulated)
        assert room.load_simulated().policy.lease.seconds == seconds
    assert [entry.event for entry in room.entries()] == ["policy_loaded"] * 3


@pytest.mark.parametrize("value", ["", "[]", "7", '{"serial": 7}', '{"serial": 7, "digest": "zz", "signed": true}'])
def test_a_state_that_does_not_say_which_policy_was_loaded_last_is_an_error_and_no_fresh_start(
    room: Room, value: str
) -> None:
    room.write()
    room.sign()
    room.load()
    with room.store.write() as db:
        db.execute(update(meta).where(meta.c.key == "policy").values(value=value))
    with pytest.raises(IntegrityError):
        room.load()


def test_signing_needs_a_serial_and_a_higher_one_for_each_change(room: Room) -> None:
    room.write(tables=room.simulated)
    with pytest.raises(PolicyInvalid, match="serial: got none"):
        room.sign()
    assert not signature_path(room.path).exists()
    room.write()
    room.sign()
    room.write(put("lease", "seconds", 901))
    with pytest.raises(PolicyInvalid, match="serial: got 7, allowed: at least 8"):
        room.sign()
    room.write(put("serial", 6))
    with pytest.raises(PolicyInvalid, match="serial: got 6, allowed: at least 8"):
        room.sign()
    room.write(put("lease", "seconds", 901), put("serial", 8))
    assert room.sign().serial == 8


def test_what_does_not_load_is_not_signed(room: Room) -> None:
    room.write(put("unknown", 1))
    with pytest.raises(PolicyInvalid):
        room.sign()
    assert not signature_path(room.path).exists()


def test_an_interrupted_signing_does_not_stop_the_next(room: Room) -> None:
    room.write()
    signature_path(room.path).with_name("policy.toml.sig.partial").write_bytes(b"half")
    room.sign()
    assert require_signed(room.path, room.home.developer.public_key())[1].serial == 7


def test_a_missing_signature_is_told_apart_from_a_wrong_one(room: Room) -> None:
    room.write()
    assert read(room.path, room.home.developer.public_key()).signature is None
    with pytest.raises(PolicyInvalid, match=r"policy\.toml\.sig"):
        require_signed(room.path, room.home.developer.public_key())
    signature_path(room.path).mkdir()
    with pytest.raises(PolicyInvalid):
        room.load()


def test_the_record_of_the_last_policy_is_readable_json(room: Room) -> None:
    room.write()
    room.sign()
    found = room.load()
    with room.store.read() as db:
        stored = db.execute(meta.select().where(meta.c.key == "policy")).one().value
    assert json.loads(stored) == {"serial": 7, "digest": found.digest.hex(), "signed": True}
