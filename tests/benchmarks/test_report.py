"""The report is made from its parts alone: the same numbers give the same page and the same plots."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from benchmarks.machine import ROOT
from benchmarks.serving import page, plots, records
from benchmarks.serving.bench import Draft
from benchmarks.serving.records import Part
from benchmarks.serving.sections import SECTIONS

GOLDEN = Path(__file__).parent / "golden"
"""Parts with made-up numbers, and the page they give."""


@pytest.fixture
def parts() -> dict[str, Part]:
    return records.read(GOLDEN, list(SECTIONS))


def test_the_page_of_known_parts_is_the_golden_one(parts: dict[str, Part]) -> None:
    drawn = {name: [f"serving/{plot}.svg"] for name, (plot, _) in plots.PLOTS.items()}
    assert page.page(parts, drawn) == (GOLDEN / page.PAGE).read_text()


def test_every_section_has_a_text_and_every_golden_part_a_section(parts: dict[str, Part]) -> None:
    assert list(page.RENDERERS) == list(SECTIONS) == list(parts)
    assert set(plots.PLOTS) <= set(SECTIONS)


def test_plots_depend_on_the_numbers_alone(parts: dict[str, Part], tmp_path: Path) -> None:
    first, second, other = tmp_path / "first", tmp_path / "second", tmp_path / "other"
    for folder in (first, second, other):
        folder.mkdir()
    drawn = plots.write(parts, first)
    assert drawn == {name: [f"first/{plot}.svg"] for name, (plot, _) in plots.PLOTS.items()}
    plots.write(parts, second)
    files = {path.name: path.read_bytes() for path in first.iterdir()}
    assert files == {path.name: path.read_bytes() for path in second.iterdir()}
    tokens = parts["tokens"]
    plots.write(parts | {"tokens": tokens.model_copy(update={"cells": tokens.cells[:1]})}, other)
    changed = {path.name for path in other.iterdir() if path.read_bytes() != files[path.name]}
    assert changed == {"ratio-by-streams.svg"}


def test_a_part_that_grows_is_on_disk_after_every_addition(parts: dict[str, Part], tmp_path: Path) -> None:
    tokens = parts["tokens"]
    draft = Draft(tokens.model_copy(update={"cells": [], "stages": []}), tmp_path)
    for count, cell in enumerate(tokens.cells, start=1):
        draft.cells([cell])
        assert records.read(tmp_path, ["tokens"])["tokens"].cells == tokens.cells[:count]
    draft.stages(tokens.stages[0])
    draft.missing("something: no time was left")
    kept = records.read(tmp_path, ["tokens"])["tokens"]
    assert (kept.cells, kept.stages, kept.missing) == (tokens.cells, tokens.stages, ["something: no time was left"])
    assert not list(tmp_path.rglob("*.partial"))


def test_a_part_with_a_field_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "serving", tmp_path / "serving")
    path = records.path(tmp_path, "tokens")
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 0, "sneed": 0'))
    with pytest.raises(ValidationError, match="sneed"):
        records.read(tmp_path, list(SECTIONS))


def render(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "benchmarks.serving", "--out", str(out), *arguments]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


def test_rendering_measures_nothing_and_says_aloud_what_is_missing(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "serving", tmp_path / "serving")
    before = {path: path.read_bytes() for path in (tmp_path / "serving").iterdir()}
    done = render(tmp_path, "--render")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / page.PAGE).read_text() == (GOLDEN / page.PAGE).read_text()
    assert all(path.read_bytes() == content for path, content in before.items())
    assert "MISSING in throughput: vLLM: no environment at .venv-vllm" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--render"], 1, "nothing to render"),
        (["--sections", "tokens,tokenz"], 2, "tokenz; known: tokens, prefill"),
        (["--budget-minutes", "0"], 2, "budget-minutes"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_made(
    tmp_path: Path, arguments: list[str], status: int, said: str
) -> None:
    done = render(tmp_path / "out", *arguments)
    assert (done.returncode, said in done.stderr) == (status, True), done.stderr
    assert not (tmp_path / "out").exists()
