"""Root keys and what keeps them: every provider opens what it kept, and refuses what it should."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stip_keyservice import home as home_module
from stip_keyservice.home import Home
from stip_keyservice.rootkey import files, providers, settings, shares
from stip_keyservice.rootkey.ring import SoftwareRoot, identity_of
from stip_keyservice.rootkey.settings import (
    FileSettings,
    GramineSettings,
    HomeSettings,
    Pkcs11Settings,
    RootKeySettings,
    SharesSettings,
)
from stip_protocol.errors import ConfigurationError, IntegrityError, StipError, Unavailable, VersionUnsupported

from ..services.softhsm import OTHER_PIN, Token
from .place import Place


@pytest.fixture
def enclave(tmp_path: Path) -> Path:
    """What Gramine shows an enclave: a stand-in for /dev/attestation/keys."""
    keys = tmp_path / "enclave"
    keys.mkdir()
    for name in ("_sgx_mrenclave", "_sgx_mrsigner"):
        (keys / name).write_bytes(secrets.token_bytes(16))
    return keys


def token_settings(token: Token, **other: Any) -> Pkcs11Settings:
    fields = {"module": token.module, "token": token.label, "label": secrets.token_hex(6), "pin_file": token.pin_file}
    return Pkcs11Settings.model_validate({name: str(one) for name, one in (fields | other).items()})


KINDS = ("file", "gramine mrenclave", "gramine mrsigner", "pkcs11 aes-gcm", "pkcs11 aes-key-wrap", "shares")


@pytest.fixture(params=KINDS)
def keeping(request: pytest.FixtureRequest, tmp_path: Path, enclave: Path) -> RootKeySettings:
    kind, _, how = request.param.partition(" ")
    if kind == "file":
        return FileSettings(path="elsewhere.key")
    if kind == "gramine":
        return GramineSettings.model_validate({"key": f"_sgx_{how}", "keys": str(enclave)})
    if kind == "pkcs11":
        return token_settings(request.getfixturevalue("softhsm"), mechanism=how)
    made, mnemonics = shares.split(2, 3)
    return made.model_copy(update={"files": written(tmp_path, mnemonics[1:])})


def written(folder: Path, mnemonics: list[str]) -> tuple[str, ...]:
    paths = [folder / f"{secrets.token_hex(4)}.share" for _ in mnemonics]
    for path, mnemonic in zip(paths, mnemonics, strict=True):
        path.write_text(mnemonic)
        path.chmod(0o600)
    return tuple(map(str, paths))


def test_a_provider_gives_back_what_it_was_given_after_home_toml_was_written_and_read(
    keeping: RootKeySettings, tmp_path: Path
) -> None:
    key = providers.new_root_key()
    settings.store(tmp_path, HomeSettings(root_key=providers.keep(keeping, tmp_path, key)))
    found = settings.load(tmp_path)
    assert providers.open_ring(tmp_path, found).material() == key
    assert (tmp_path / "home.toml").stat().st_mode & 0o777 == 0o600
    for held in (found, providers.provider(found.root_key, tmp_path), providers.open_ring(tmp_path, found)):
        shown = repr(held)
        assert key.hex() not in shown
        assert repr(key)[2:-1] not in shown
    if keeping.kind != "file":
        assert key not in b"".join(path.read_bytes() for path in tmp_path.iterdir() if path.is_file())


def test_a_whole_home_opens_under_every_provider(keeping: RootKeySettings, tmp_path: Path) -> None:
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    settings.store(folder, HomeSettings(root_key=providers.keep(keeping, folder, providers.new_root_key())))
    first, second = Home.open(folder), Home.open(folder)
    assert first.service.private_bytes_raw() == second.service.private_bytes_raw()
    assert not any(files.is_plain(path.read_bytes()) for path in files.present(folder))


def test_another_key_than_the_homes_is_refused(tmp_path: Path) -> None:
    kept = providers.keep(FileSettings(path="kept"), tmp_path, providers.new_root_key())
    (tmp_path / "kept").write_bytes(bytes(32))
    with pytest.raises(IntegrityError, match="another one than this home's"):
        providers.fetch(kept, tmp_path)


def test_a_root_key_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "root.key").write_bytes(b"somebody's")
    with pytest.raises(ConfigurationError, match="which exists"):
        providers.keep(FileSettings(), tmp_path, providers.new_root_key())
    assert (tmp_path / "root.key").read_bytes() == b"somebody's"


def test_a_home_that_lost_its_root_key_gets_no_other(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "home")
    (home.path / "root.key").unlink()
    with pytest.raises(ConfigurationError, match=r"root\.key: No such file"):
        Home.open(home.path)
    assert not (home.path / "root.key").exists()


def test_only_the_enclave_that_sealed_opens_and_its_signers_next_one_where_that_was_chosen(
    tmp_path: Path, enclave: Path
) -> None:
    key = providers.new_root_key()
    kept = {
        name: providers.keep(GramineSettings.model_validate({"key": name, "keys": str(enclave)}), tmp_path, key)
        for name in ("_sgx_mrenclave", "_sgx_mrsigner")
    }
    (enclave / "_sgx_mrenclave").write_bytes(secrets.token_bytes(16))  # an upgrade: the signer stays
    assert providers.fetch(kept["_sgx_mrsigner"], tmp_path) == key
    with pytest.raises(IntegrityError, match="another key"):
        providers.fetch(kept["_sgx_mrenclave"], tmp_path)


@pytest.mark.parametrize("content", [None, b"", bytes(16), b"x" * 15, b"x" * 17])
def test_what_is_no_sealing_key_is_refused(tmp_path: Path, enclave: Path, content: bytes | None) -> None:
    (enclave / "_sgx_mrenclave").unlink()
    if content is not None:
        (enclave / "_sgx_mrenclave").write_bytes(content)
    with pytest.raises(ConfigurationError, match="sealing key"):
        providers.keep(GramineSettings(keys=str(enclave)), tmp_path, providers.new_root_key())


def test_the_tokens_key_cannot_be_read_and_is_destroyed_on_demand(softhsm: Token, tmp_path: Path) -> None:
    import pkcs11

    kept = providers.keep(token_settings(softhsm), tmp_path, providers.new_root_key())
    with (
        pkcs11.lib(softhsm.module)
        .get_token(token_label=softhsm.label)
        .open(user_pin=softhsm.pin_file.read_text().strip()) as session
    ):
        key = session.get_key(pkcs11.ObjectClass.SECRET_KEY, label=kept.label)
        assert key[pkcs11.Attribute.NEVER_EXTRACTABLE]
        assert key[pkcs11.Attribute.ALWAYS_SENSITIVE]
        with pytest.raises(pkcs11.exceptions.AttributeSensitive):
            key[pkcs11.Attribute.VALUE]
    providers.provider(kept, tmp_path).discard()
    with pytest.raises(ConfigurationError, match="none of that label"):
        providers.fetch(kept, tmp_path)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"module": "/nowhere/token.so"}, "PKCS #11 token"),
        ({"token": "another"}, "NoSuchToken"),
        ({"pin_file": "wrong"}, "PIN of token stip-test: refused"),
        ({"pin_file": "open"}, "others may read it"),
        ({"pin_file": "missing"}, "No such file"),
        ({"pin_file": None}, "nobody to ask"),
        ({"label": "never made"}, "none of that label"),
    ],
)
def test_a_token_that_does_not_answer_says_why_and_never_the_pin(
    softhsm: Token, tmp_path: Path, changed: dict[str, str], says: str
) -> None:
    (tmp_path / "wrong").write_text(OTHER_PIN)
    (tmp_path / "wrong").chmod(0o600)
    (tmp_path / "open").write_text(OTHER_PIN)
    (tmp_path / "open").chmod(0o644)
    kept = providers.keep(token_settings(softhsm), tmp_path, providers.new_root_key())
    with pytest.raises(ConfigurationError, match=says) as refused:
        providers.fetch(kept.model_copy(update=changed), tmp_path)
    assert OTHER_PIN not in str(refused.value)


def test_what_a_token_wrapped_opens_only_unaltered(softhsm: Token, tmp_path: Path) -> None:
    for mechanism in ("aes-gcm", "aes-key-wrap"):
        kept = providers.keep(token_settings(softhsm, mechanism=mechanism), tmp_path, providers.new_root_key())
        assert kept.wrapped is not None
        altered = kept.wrapped[:-1] + ("0" if kept.wrapped[-1] != "0" else "1")
        with pytest.raises(IntegrityError):
            providers.fetch(kept.model_copy(update={"wrapped": altered}), tmp_path)


def test_any_threshold_of_the_shares_opens_and_fewer_wrong_or_mixed_ones_do_not(tmp_path: Path) -> None:
    key = providers.new_root_key()
    made, mnemonics = shares.split(3, 5)
    _, strangers = shares.split(3, 5)
    kept = shares.SharesProvider(made, tmp_path).keep(key)
    keeper = shares.SharesProvider(kept, tmp_path)
    for chosen in ([0, 1, 2], [4, 2, 0], [0, 1, 2, 3, 4], [1, 1, 3, 4]):
        assert keeper.open([mnemonics[number] for number in chosen]) == key
    misspelt = mnemonics[0].replace(mnemonics[0].split()[7], "academic", 1)
    swapped = " ".join(reversed(mnemonics[0].split()))
    for given_shares, says in (
        ([], "got 0 different ones, allowed: at least 3"),
        (mnemonics[:2], "got 2 different ones, allowed: at least 3"),
        ([mnemonics[0]] * 3, "got 1 different ones"),
        ([*mnemonics[:2], strangers[2]], "shares of several sets"),
        (strangers[:3], "another recovery key"),
        ([misspelt, *mnemonics[1:3]], "not a share"),
        ([swapped, *mnemonics[1:3]], "not a share"),
        ([" ".join(mnemonics[0].split()[:-1]), *mnemonics[1:3]], "not a share"),
        (["", *mnemonics[1:3]], "not a share"),
    ):
        with pytest.raises(ConfigurationError, match=says) as refused:
            keeper.open(given_shares)
        for words in map(str.split, [*mnemonics, *strangers]):
            pairs = (" ".join(words[at : at + 2]) for at in range(len(words) - 1))
            assert not any(pair in str(refused.value) for pair in pairs)


@pytest.mark.parametrize(("threshold", "count"), [(1, 3), (4, 3), (2, 17), (0, 0)])
def test_shares_that_are_no_quorum_are_refused(threshold: int, count: int) -> None:
    with pytest.raises(ConfigurationError, match="2 ≤ threshold ≤ shares ≤ 16"):
        shares.split(threshold, count)


@given(st.binary(max_size=200), st.binary(max_size=50), st.integers(0, 300), st.binary(min_size=1, max_size=1))
def test_what_is_wrapped_opens_only_as_it_was(plain: bytes, context: bytes, at: int, flip: bytes) -> None:
    root = SoftwareRoot(bytes(range(32)))
    wrapped = root.wrap(plain, context)
    assert root.unwrap(wrapped, context) == plain
    for altered in (wrapped[:at], _flipped(wrapped, at, flip)):
        if altered != wrapped:
            with pytest.raises(IntegrityError):
                root.unwrap(altered, context)
    with pytest.raises(IntegrityError):
        root.unwrap(wrapped, context + b"x")
    with pytest.raises(IntegrityError):
        SoftwareRoot(bytes(32)).unwrap(wrapped, context)


def _flipped(data: bytes, at: int, flip: bytes) -> bytes:
    at %= len(data)
    return data[:at] + bytes([data[at] ^ flip[0]]) + data[at + 1 :]


def test_an_id_says_which_key_and_nothing_of_it() -> None:
    one, other = SoftwareRoot(bytes(32)), SoftwareRoot(bytes(31) + b"\1", bytes(32))
    assert one.id != other.id
    assert len(one.id) == 8
    assert other.unwrap(one.wrap(b"plain", b""), b"") == b"plain"
    assert other.under(one.id).wrap(b"", b"")[:8] == one.id
    with pytest.raises(IntegrityError):
        one.under(identity_of(bytes(31) + b"\1"))
    with pytest.raises(ConfigurationError):
        SoftwareRoot(bytes(31))


@pytest.mark.parametrize("name", files.SECRET_FILES)
def test_a_private_key_is_wrapped_and_bound_to_its_file(tmp_path: Path, name: str) -> None:
    home = Home.open(tmp_path / "home")
    home.tls("localhost")
    path = home.path / name
    wrapped = path.read_bytes()
    assert b"PRIVATE" not in wrapped
    assert files.unseal(home.root, name, wrapped).startswith(b"-----BEGIN PRIVATE KEY")
    path.write_bytes(wrapped[:-1] + bytes([wrapped[-1] ^ 1]))
    with pytest.raises(IntegrityError, match=rf"{name}: altered"):
        Home.open(home.path).tls("localhost")


def test_an_operators_own_tls_key_stays_as_it_is(tmp_path: Path) -> None:
    theirs = Home.open(tmp_path / "another authority").tls("localhost")
    home = Home.open(tmp_path / "home")
    for name, data in (("tls.key", theirs.private_key), ("tls.pem", theirs.chain)):
        (home.path / name).write_bytes(data)
        (home.path / name).chmod(0o600)
    assert home.tls("localhost") == theirs
    assert Home.open(home.path).plain_files() == ()
    assert (home.path / "tls.key").read_bytes() == theirs.private_key


@pytest.mark.parametrize("name", files.SECRET_FILES)
def test_a_sealed_home_takes_no_plain_key(tmp_path: Path, name: str) -> None:
    home, other = Home.open(tmp_path / "home"), Home.open(tmp_path / "other")
    other.tls("localhost")
    planted = files.unseal(other.root, name, (other.path / name).read_bytes())
    (home.path / name).write_bytes(planted)
    (home.path / name).chmod(0o600)
    for public in ("pub", "pem"):  # its public half as well, as somebody would do who means it
        half = other.path / name.replace("key", public)
        if half.exists() and name != "tls.key":
            (home.path / half.name).write_bytes(half.read_bytes())
    with pytest.raises(IntegrityError, match=rf"{name}: got plain PEM"):
        Home.open(home.path)
    with pytest.raises(IntegrityError, match=rf"{name}: got plain PEM"):
        home.tls("localhost")


def test_a_home_whose_keys_are_all_gone_gets_no_others_beside_its_database(place: Place) -> None:
    place.call_here("users", "add", "alice", "--public-key", os.urandom(32).hex(), "--budget", "5")
    for forgotten in ("home.toml", *(path.name for path in place.home.glob("*.[kp]*"))):
        (place.home / forgotten).unlink()
    refused = place.call_here("users", "list", code=2)
    assert "root.key: No such file" in refused["error"]["message"]
    assert not any(place.home.glob("*.key"))


def test_a_home_without_its_database_gets_no_empty_one(place: Place) -> None:
    place.call_here("users", "add", "alice", "--public-key", os.urandom(32).hex(), "--budget", "5")
    for path in place.home.glob("state.db*"):
        path.unlink()
    assert "holds no state.db" in place.call_here("users", "list", code=2)["error"]["message"]
    assert not (place.home / "state.db").exists()


def test_a_home_that_another_process_holds_is_unavailable_and_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(home_module, "LOCK_SECONDS", 0.1)
    path = Home.open(tmp_path / "home").path
    with home_module.locked(path), pytest.raises(Unavailable, match="another process"):
        Home.open(path)
    Home.open(path)


def test_a_process_that_holds_keys_leaves_no_core_dump() -> None:
    script = (
        "import ctypes, resource; from stip_keyservice.rootkey.memory import refuse_dumps; refuse_dumps();"
        "print(resource.getrlimit(resource.RLIMIT_CORE)[0], ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"  # PR_GET_DUMPABLE
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "0 0\n"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("version = 2", VersionUnsupported),
        ("unknown = 1", ConfigurationError),
        ("[root_key]\nkind = 'tape'", ConfigurationError),
        ("[root_key]\nkind = 'pkcs11'", ConfigurationError),
        ("[root_key]\nkind = 'file'\npath = ''", ConfigurationError),
        ("[root_key]\nwrapped = 'zz'", ConfigurationError),
        ("not toml", ConfigurationError),
        ("#" + "x" * (64 << 10), ConfigurationError),
    ],
)
def test_a_home_toml_that_is_not_understood_is_refused(tmp_path: Path, text: str, code: type[StipError]) -> None:
    home = Home.open(tmp_path / "home")
    (home.path / "home.toml").write_text(text)
    (home.path / "home.toml").chmod(0o600)
    with pytest.raises(code):
        Home.open(home.path)


def test_a_home_is_made_where_the_root_key_is_to_be(place: Place, enclave: Path, softhsm: Token) -> None:
    token = ["--module", softhsm.module, "--token", softhsm.label, "--pin-file", str(softhsm.pin_file)]
    for number, options in enumerate(
        (
            ["--root-key", "gramine", "--sealing-keys", str(enclave)],
            ["--root-key", "pkcs11", *token],
            ["--root-key", "file", "--key-file", str(place.folder / "stick.key")],
        )
    ):
        here = Place(place.folder / f"place{number}", place.platform)
        shown = here.call_here("home", "init", *options)
        assert shown["root_key"]["kind"] == options[1]
        assert not (here.home / "root.key").exists()
        assert here.call_here("home", "show") == shown
        here.call_here("users", "add", "alice", "--public-key", os.urandom(32).hex(), "--budget", "5")
        assert here.call_here("state", "check")["audit_entries"] == 1
        refused = here.call_here("home", "init", *options, code=2)
        assert "where there is one" in refused["error"]["message"]


def test_a_home_of_shares_opens_only_with_a_quorum_at_hand(place: Place) -> None:
    folder = place.folder / "shares"
    made = ["--threshold", "2", "--shares", "3", "--share-dir", str(folder)]
    place.call_here("home", "init", "--root-key", "shares", *made)
    found = settings.load(place.home)
    assert isinstance(found.root_key, SharesSettings)
    assert found.root_key.files == ()
    assert "nobody to ask" in place.call_here("home", "show", code=2)["error"]["message"]
    paths = tuple(str(path) for path in sorted(folder.iterdir()))
    for given_paths, code in ((paths[:1], 2), (paths[1:], 0)):
        changed = found.root_key.model_copy(update={"files": given_paths})
        settings.store(place.home, found.model_copy(update={"root_key": changed}))
        place.call_here("home", "show", code=code)
