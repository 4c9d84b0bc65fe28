"""`audit` and `leakage-report` as people run them: what they write, say, sign and refuse."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from stip_keyservice.audit import signing
from stip_keyservice.audit.attacks import MODULES
from stip_keyservice.audit.command import _interval, audit, leakage_report
from stip_keyservice.audit.corpus import SCALES, Scale
from stip_keyservice.audit.document import Bounds, Report
from stip_keyservice.audit.knowledge import KNOWLEDGE
from stip_keyservice.cli import main
from stip_keyservice.home import Home
from stip_keyservice.protect.commands.process import Stopped, stoppable
from stip_keyservice.service.instances import inspect
from stip_protocol.leakage import Interval
from stip_protocol.manifest import SIGNING, Manifest

from .conftest import MODEL
from .test_signing import report_on

TINY = Scale(length=24, prompt=12, victims=4, accomplice=100, public=200, held_out=48, passes=1)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SCALES:
        monkeypatch.setitem(SCALES, name, TINY)


def command(instance: Path, home: Path, *options: str | Path) -> Result:
    arguments = [instance, "--model", MODEL, "--home", home, *options]
    return CliRunner().invoke(audit, [*map(str, arguments)])


def manifest(instance: Path, home: Home) -> Manifest:
    return inspect(instance, home.developer.public_key(), home.sealing).manifest


def test_a_partial_audit_writes_a_report_shows_a_table_and_is_never_signed(
    instance: Path, home: Home, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    done = command(instance, home.path, "--attacks", "c, B", "--knowledge", "table,server", "--out", out)
    assert done.exit_code == 2
    assert "attacks: got 'c'" in done.stderr
    done = command(instance, home.path, "--attacks", "C,B", "--knowledge", "table,server", "--out", out)
    assert done.exit_code == 0, done.output
    assert {path.name for path in out.iterdir()} == {"leakage.json", "index.html", "leakage.md"}
    report = Report.from_json((out / "leakage.json").read_bytes())
    assert [cell.attack + cell.knowledge for cell in report.cells] == ["Bserver", "Cserver", "Btable", "Ctable"]
    assert "100.0 %" in done.stdout
    assert "Not signed: it is of some attacks or knowledge alone." in done.stdout
    assert manifest(instance, home).leakage is None
    assert not (instance / "leakage.json").exists()


def test_a_whole_audit_is_signed_unless_told_otherwise_and_said_as_json(
    instance: Path, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, rows = {"C": "gram", "O": "pages"}, {name: KNOWLEDGE[name] for name in ("server", "table")}
    monkeypatch.setattr("stip_keyservice.audit.run.MODULES", few)
    monkeypatch.setattr("stip_keyservice.audit.run.KNOWLEDGE", rows)
    chosen = ("--attacks", "C,O", "--knowledge", "server,table", "--json")
    unsigned = command(instance, home.path, *chosen, "--no-sign")
    assert unsigned.exit_code == 0, unsigned.output
    assert json.loads(unsigned.stdout)["manifest_digest"] is None
    little = command(instance, home.path, *chosen[:4], "--scale", "quick")
    assert little.exit_code == 0, little.output
    assert "Not signed: --scale quick" in little.stdout
    assert manifest(instance, home).leakage is None
    done = command(instance, home.path, *chosen, "--out", tmp_path / "report")
    assert done.exit_code == 0, done.output
    said, leakage = json.loads(done.stdout), manifest(instance, home).leakage
    assert leakage is not None
    data = (tmp_path / "report" / "leakage.json").read_bytes()
    assert data == (instance / "leakage.json").read_bytes()
    assert said["report_sha256"] == leakage.report_sha256 == hashlib.sha256(data).hexdigest()
    assert said["report_sha256"] == json.loads(unsigned.stdout)["report_sha256"]
    assert said["manifest_digest"] == hashlib.sha256((instance / "manifest.json").read_bytes()).hexdigest()
    assert said["report"]["subject"]["instance"] == manifest(instance, home).instance


def test_an_interrupted_signing_is_gone_on_with_first(instance: Path, home: Home, tmp_path: Path) -> None:
    before = Path(shutil.copytree(instance, tmp_path / "before"))
    signing.sign(instance, report_on(manifest(instance, home)), home)
    signed = manifest(instance, home)
    (instance / SIGNING).mkdir()
    for name in signing.DOCUMENTS:
        (instance / name).rename(instance / SIGNING / name)
    for name in signing.DOCUMENTS[1:]:
        shutil.copy(before / name, instance / name)
    chosen = ("--attacks", "C", "--knowledge", "table", "--quiet")
    done = command(instance, home.path, *chosen, "--no-sign")
    assert done.exit_code == 3
    assert "an audit was interrupted as it signed, run it again" in done.stderr
    done = command(instance, home.path, *chosen)
    assert (done.exit_code, done.output) == (0, "")
    assert manifest(instance, home) == signed


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--attacks", "B,Z"), 2, "attacks: got 'Z'"),
        (("--knowledge", "everything"), 2, "knowledge: got 'everything'"),
        (("--recording", "nothing"), 2, "recording nothing: No such file"),
        (("--text", "nothing"), 2, "text nothing: No such file"),
        (("--sibling", "nothing"), 2, "no such folder"),
        (("--base", "nothing"), 2, "no such folder"),
        (("--model", "nothing"), 2, "no such folder"),
        (("--scale", "huge"), 2, "huge"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    instance: Path, home: Home, options: tuple[str, ...], code: int, says: str
) -> None:
    done = command(instance, home.path, *options)
    assert done.exit_code == code
    assert says in done.stderr
    assert manifest(instance, home).leakage is None


def test_a_report_is_not_written_into_the_instance(instance: Path, home: Home) -> None:
    done = command(instance, home.path, "--out", instance / "report")
    assert done.exit_code == 2
    assert "in the instance" in done.stderr


def test_the_home_of_another_developer_audits_nothing(instance: Path, home: Home, tmp_path: Path) -> None:
    done = command(instance, tmp_path / "other", "--json")
    assert done.exit_code == 3
    assert json.loads(done.stdout)["error"]["code"] == "signature_invalid"
    assert manifest(instance, home).leakage is None


def test_help_names_every_attack_and_every_row() -> None:
    text = CliRunner().invoke(audit, ["--help"]).stdout
    assert [letter for letter in MODULES if f"\n    {letter}  " not in text] == []
    assert [row for row in KNOWLEDGE if f"\n    {row} " not in text] == []
    assert "before `stip-keyservice instances" in " ".join(text.split())


def test_pages_are_put_together_from_several_reports(instance: Path, home: Home, tmp_path: Path) -> None:
    done = command(instance, home.path, "--attacks", "B", "--knowledge", "server", "--quiet", "--out", tmp_path / "one")
    assert (done.exit_code, done.output) == (0, "")
    files = [str(tmp_path / "one" / "leakage.json")] * 2
    done = CliRunner().invoke(leakage_report, [*files, "--out", str(tmp_path / "both")])
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "both").iterdir()} == {"index.html", "leakage.md"}


@pytest.mark.parametrize(("content", "says"), [(b"{}", "no report of an audit"), (None, "No such file")])
def test_what_is_no_report_is_refused(tmp_path: Path, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / "leakage.json").write_bytes(content)
    done = CliRunner().invoke(leakage_report, [str(tmp_path / "leakage.json"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert says in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_key_services_command_line_has_both(tmp_path: Path, home: Home) -> None:
    nothing = str(tmp_path / "none")
    done = CliRunner().invoke(main, ["audit", nothing, "--model", str(MODEL), "--home", str(home.path), "--quiet"])
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "no such folder" in done.stderr
    assert CliRunner().invoke(main, ["leakage-report", nothing, "--out", nothing]).exit_code == 2
    listed = CliRunner().invoke(main, ["--help"]).stdout
    assert "audit " in listed
    assert "leakage-report " in listed


@pytest.mark.parametrize(
    "origin", ["\x1b[31mred", "two\nlines", "right\N{RIGHT-TO-LEFT OVERRIDE}left", "\udcff", "x" * 201]
)
def test_an_origin_that_no_page_can_show_is_refused_before_anything_runs(
    instance: Path, home: Home, origin: str
) -> None:
    done = command(instance, home.path, "--origin", origin, "--json")
    assert done.exit_code == 2
    assert json.loads(done.stdout)["error"]["message"].startswith("origin: got")
    assert manifest(instance, home).leakage is None


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs_or_is_signed(
    instance: Path, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        pytest.fail("the audit ran")

    monkeypatch.setattr("stip_keyservice.audit.run.Audit.run", never)
    (tmp_path / "file").write_text("mine")
    done = command(instance, home.path, "--out", tmp_path / "file")
    assert done.exit_code == 2
    assert "out" in done.stderr
    assert manifest(instance, home).leakage is None


def test_what_was_stopped_leaves_nothing_says_so_and_has_the_signals_code(
    instance: Path, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    seen: list[int] = []

    def stopped(text: Any, folder: Path, **_: Any) -> None:
        seen.append(folder.parent.stat().st_mode & 0o777)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("stip_keyservice.audit.surrogate.train", stopped)
    done = command(instance, home.path, "--json")
    assert (done.exit_code, seen) == (143, [0o700])
    assert json.loads(done.stdout)["error"]["code"] == "cancelled"
    assert not list((tmp_path / "temporary").iterdir())
    assert manifest(instance, home).leakage is None


def test_a_second_signal_does_not_end_the_tidying() -> None:
    tidied = []

    def impatient() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGHUP)
            tidied.append(True)

    with pytest.raises(Stopped), stoppable():
        impatient()
    assert tidied == [True]


def test_a_command_that_is_to_outlive_its_terminal_does() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_figure_that_is_no_share_is_not_shown_as_one() -> None:
    assert _interval(Bounds(value=31.5, low=30, high=33)) == "31.5 (30.0-33.0)"
    assert _interval(Interval(value=0.5, low=0.4, high=0.6)) == "50.0 % (40.0-60.0)"
