"""Every section of the serving report runs end to end and writes well-formed results. Nothing here judges a time.

All sections run under `make test-long`; one of them runs with every test.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.machine import ROOT
from benchmarks.serving import page, records
from benchmarks.serving.records import Cell, Interval, Part
from benchmarks.serving.sections import SECTIONS

SECONDS = 900
"""All sections take two minutes on two quiet cores."""


def bench(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "benchmarks.serving", "--quick", "--out", str(out), *arguments]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS - 20, check=False)


def measured(out: Path, sections: list[str]) -> dict[str, Part]:
    done = bench(out, "--sections", ",".join(sections))
    assert done.returncode == 0, done.stderr[-4000:]
    text = (out / page.PAGE).read_text()
    found = records.read(out, list(SECTIONS))
    assert list(found) == sections
    assert all(f"## {page.RENDERERS[name][0]}" in text for name in sections)
    for name, part in found.items():
        assert all(f"MISSING in {name}: {what}" in done.stderr for what in part.missing)
    return found


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Part]:
    return measured(tmp_path_factory.mktemp("report"), list(SECTIONS))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Part:
    return measured(tmp_path_factory.mktemp("tokens"), ["tokens"])["tokens"]


pytestmark = pytest.mark.timeout(SECONDS)


def test_cells_are_finite_and_answer_as_plain_does(tokens: Part) -> None:
    assert len(tokens.cells) == 4
    require_sound(tokens.cells)


@pytest.mark.long
def test_cells_of_every_section_are_finite_and_answer_as_plain_does(parts: dict[str, Part]) -> None:
    cells = [cell for part in parts.values() for cell in part.cells]
    assert len(cells) > 15
    require_sound(cells)


def require_sound(cells: Sequence[Cell]) -> None:
    for cell in cells:
        for measure in (cell.token, cell.first):
            assert measure.plain > 0
            assert measure.protected > 0
            for interval in (measure.ratio, measure.control, measure.served):
                if isinstance(interval, Interval):
                    assert interval.low <= interval.value <= interval.high
        assert math.isfinite(cell.rate)
        assert cell.rate > 0
        # float32: the path that is timed must give the plain model's tokens.
        assert cell.same == 1.0, cell


def test_both_presets_are_measured_at_several_streams_with_the_head_apart(tokens: Part) -> None:
    cells = tokens.cells
    assert {(cell.arm, cell.streams) for cell in cells} == {(arm, n) for arm in ("paper", "hardened") for n in (1, 4)}
    for cell in cells:
        assert (cell.token.head is not None) == (cell.token.served is not None) == (cell.arm == "hardened")
        assert (cell.token.verdict is not None) == (cell.streams == 1)
    (stages,) = tokens.stages
    assert {row.name for row in stages.rows} >= {"embed", "link", "head", "sample", "forward", "compute"}


@pytest.mark.long
def test_prefill_is_measured_at_two_lengths(parts: dict[str, Part]) -> None:
    assert {cell.prompt for cell in parts["prefill"].cells} == {16, 64}


@pytest.mark.long
def test_a_delay_of_the_link_shows_in_every_token(parts: dict[str, Part]) -> None:
    near, far = parts["delay"].cells
    assert (near.delay, far.delay) == (0.0, 0.01)
    assert far.token.protected >= 0.02 or far.rate <= far.streams / 0.02
    assert far.first.protected >= 0.02


@pytest.mark.long
def test_drafting_is_measured_on_texts_that_repeat_and_that_do_not(parts: dict[str, Part]) -> None:
    cells = parts["drafting"].cells
    assert {(cell.arm, cell.delay) for cell in cells} == {
        (text, delay) for text in ("repetitive", "random") for delay in (0.0, 0.01)
    }


@pytest.mark.long
def test_throughput_is_measured_and_vllm_is_measured_or_said_to_be_missing(parts: dict[str, Part]) -> None:
    part = parts["throughput"]
    engines = {cell.engine for cell in part.cells}
    assert "transformers" in engines
    assert ("vllm" in engines) != any("vLLM" in what for what in part.missing)


@pytest.mark.long
def test_memory_is_of_every_part_and_of_the_plain_engine(parts: dict[str, Part]) -> None:
    rows = parts["memory"].memory
    named = {"keyservice", "gateway", "enclave", "server, paper", "server, hardened", "plain engine"}
    assert {row.part for row in rows} == named
    assert all(0 < row.pss <= row.rss and row.fds > 0 and row.threads > 0 for row in rows)
    assert len({row.state for row in rows}) == 2


@pytest.mark.long
def test_curves_have_their_axes_and_values(parts: dict[str, Part]) -> None:
    places = {(cell.axis, cell.at) for cell in parts["curves"].cells}
    assert places == {("vocabulary", 512), ("streams", 1), ("streams", 2), ("prompt", 16)}


def test_a_budget_that_is_spent_leaves_sections_out_and_says_so(tmp_path: Path) -> None:
    done = bench(tmp_path, "--sections", "memory,curves", "--budget-minutes", "1e-12")
    assert done.returncode == 0, done.stderr[-4000:]
    for name, part in records.read(tmp_path, list(SECTIONS)).items():
        assert part.missing == ["the whole section: no time was left"]
        assert f"MISSING in {name}: the whole section" in done.stderr
