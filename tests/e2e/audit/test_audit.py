"""`make audit`, with little text: from a model to pages, and the same digest when it is run again."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from stip_keyservice.audit.attacks import MODULES
from stip_keyservice.audit.document import Report
from stip_keyservice.audit.knowledge import KNOWLEDGE
from stip_keyservice.audit.recording import server_digest
from stip_keyservice.home import Home
from stip_protocol.manifest import Manifest

SECONDS = 500


def audit(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stip_stack.audit", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=SECONDS,
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(2 * SECONDS)
def test_a_run_is_recorded_and_audited_and_the_next_audit_finds_the_same(tmp_path: Path) -> None:
    out = tmp_path / "audit"
    chosen = "--quick", "--case", "hardened", "--out", str(out)
    first = audit(*chosen)
    assert first.returncode == 0, first.stderr
    data = (out / "hardened" / "leakage.json").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    assert digest in first.stdout

    report = Report.from_json(data)
    assert report.traffic.source == "recorded"
    assert 0 < report.traffic.accomplice_computed < report.traffic.accomplice_tokens
    assert {(cell.attack, cell.knowledge) for cell in report.cells} == {(a, k) for a in MODULES for k in KNOWLEDGE}
    manifest, _ = Manifest.load(
        out / "instances" / "hardened" / "manifest.json", Home.open(out / "home").developer.public_key()
    )
    assert manifest.leakage is None, "so little text is no audit to rely on"
    assert report.subject.server_sha256 == server_digest(manifest)
    (recording,) = (out / "recordings").iterdir()
    assert stat.S_IMODE(recording.stat().st_mode) == 0o600
    assert manifest.instance in (out / "index.html").read_text()
    assert (out / "leakage.md").stat().st_size > 0
    assert [path.name for path in out.iterdir() if path.name.startswith(".stack")] == []

    again = audit(*chosen)
    assert again.returncode == 0, again.stderr
    assert "as before" in again.stdout
    assert (out / "hardened" / "leakage.json").read_bytes() == data


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").write_text("mine")
    refused = audit("--fresh", "--out", str(tmp_path))
    assert refused.returncode == 2
    assert "a new folder, or an earlier audit's" in refused.stderr
    assert (tmp_path / "home" / "letters.txt").read_text() == "mine"
