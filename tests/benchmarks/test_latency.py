"""The latency benchmark runs end to end and writes well-formed results. Nothing here judges a time."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ratios import joined, median, ratio
from benchmarks.samples import Samples

ROOT = Path(__file__).resolve().parents[2]


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for each in value.values():
            yield from numbers(each)
    elif isinstance(value, list):
        for each in value:
            yield from numbers(each)
    elif isinstance(value, float):
        yield value


@pytest.mark.timeout(300)
def test_a_quick_run_writes_well_formed_results(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "benchmarks.latency", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((tmp_path / "latency.json").read_text())
    assert results["machine"]["cores"] >= 1
    assert results["machine"]["versions"]["torch"]
    (model,) = results["models"]
    found = {(each["preset"], each["streams"]) for each in model["comparisons"]}
    assert found == {(preset, streams) for preset in ("paper", "hardened") for streams in (1, 4)}
    assert all(math.isfinite(number) for number in numbers(results))
    for each in model["comparisons"]:
        for measure in (each["token"], each["first"]):
            assert measure["plain"] > 0
            assert measure["protected"] > 0
            assert measure["over_plain"]["low"] <= measure["over_plain"]["value"] <= measure["over_plain"]["high"]
            assert (measure["head"] is not None) == (each["preset"] == "hardened")
        # The demo model is float32: the path that is timed must give the plain model's tokens.
        assert each["same"] == 1.0
    assert {row["name"] for row in model["stages"]} >= {"embed", "link", "head", "sample", "forward", "compute"}
    page = (tmp_path / "latency.md").read_text()
    assert page.startswith("# Latency: protected over plain")
    assert "Gateway hop" in page


def test_an_unknown_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "benchmarks.latency", "--models", "gpt5", "--out", str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "known: gpt2, llama, demo" in done.stderr
    assert not list(tmp_path.iterdir())


def test_gaps_count_only_while_every_stream_decodes() -> None:
    samples = Samples([[1.0, 2.0, 3.0, 4.5], [2.5, 3.5, 5.0]], [[], []])
    assert samples.first == [1.0, 2.5]
    assert samples.gaps == [1.5, 1.0, 1.5]


def test_a_ratio_is_of_pooled_medians_and_lies_in_its_interval() -> None:
    under = [[1.0, 1.0, 1.1], [0.9, 1.0, 1.0]]
    over = [[2.0, 2.0, 2.2], [1.8, 2.0, 2.0]]
    found = ratio(over, under, seed=1)
    assert found.value == pytest.approx(2.0)
    assert found.low <= found.value <= found.high
    assert found == ratio(over, under, seed=1)
    assert ratio(over, under, seed=1, less=[1.0, 1.0]).value == pytest.approx(1.0)
    assert median(joined(under, over)) == pytest.approx(1.45)
