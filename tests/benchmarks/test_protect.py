"""The protection benchmark runs end to end and writes well-formed results. Nothing here judges a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "benchmarks.protect", *map(str, arguments)]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)


@pytest.mark.timeout(200)
def test_a_quick_run_writes_well_formed_results_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    done = bench("--quick", "--json", "--out", tmp_path / "docs", "--work", tmp_path / "work")
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout)
    assert results == json.loads((tmp_path / "docs" / "protection.json").read_text())
    assert results["shards"] > 1
    assert len(results["copies"]) == 3
    assert [each["run"]["preset"] for each in results["protections"]] == ["paper", "hardened"]
    for each in results["protections"]:
        run = each["run"]
        assert run["written"] >= 0.9 * results["source"]
        assert 0 < run["imported"] <= run["peak"]
        assert each["bound"] == 2 * results["largest_shard"] + (1 << 30)
        assert each["within"] is True
        assert list(run["stages"]) == ["keys", "server", "enclave"]
        assert sum(run["stages"].values()) <= run["seconds"]
        assert each["ratio"] > 0
    page = (tmp_path / "docs" / "protection.md").read_text()
    assert page.startswith("# Protecting a LLaMA2-7B-shaped checkpoint")
    assert "## hardened" in page
    assert not list((tmp_path / "work").iterdir())


def test_an_unknown_preset_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    done = bench("--presets", "papers", "--out", tmp_path)
    assert done.returncode == 2
    assert "known: paper, hardened" in done.stderr
    assert not list(tmp_path.iterdir())
