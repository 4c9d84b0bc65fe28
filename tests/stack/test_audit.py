"""`make audit` as a process: what it says of itself, and that ending it leaves no keys behind."""

from __future__ import annotations

import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from stip_stack import audit
from stip_stack.cases import STACK


def test_a_terminated_run_leaves_no_folder_of_a_running_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def terminated(place: Any, *_: Any) -> int:
        with tempfile.TemporaryDirectory(prefix=STACK, dir=place.out):
            signal.raise_signal(signal.SIGTERM)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(audit, "run", terminated)
    assert CliRunner().invoke(audit.main, ["--out", str(tmp_path / "out")]).exit_code == 143
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".stip-audit"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_fresh_run_removes_what_a_killed_one_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "run", lambda *_: 0)
    for options in ((), ("--fresh",)):
        assert CliRunner().invoke(audit.main, ["--out", str(tmp_path), *options]).exit_code == 0
        left = {path.name for path in tmp_path.iterdir()}
        (tmp_path / f"{STACK}killed").mkdir(exist_ok=True)
        (tmp_path / "home").mkdir(exist_ok=True)
    assert left == {".stip-audit"}


def test_help_names_every_case_and_every_exit_code() -> None:
    text = CliRunner().invoke(audit.main, ["--help"]).stdout
    assert [name for name in audit.NAMES if name not in text] == []
    assert "130, 143  stopped by Ctrl-C or SIGTERM" in text
