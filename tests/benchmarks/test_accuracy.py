"""The accuracy benchmark runs end to end, agrees where it must, and can disagree."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.accuracy_results import Ties, compare, narrow

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, out: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "benchmarks.accuracy", "--out", str(out), *arguments]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.timeout(300)
def test_a_small_run_agrees_everywhere_and_its_control_does_not(tmp_path: Path) -> None:
    done = run("--samples", "48", "--families", "opt,qwen2_moe", "--json", out=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((tmp_path / "accuracy.json").read_text())
    assert json.loads(done.stdout) == results
    opt, experts = results["families"]
    assert [row["what"] for row in opt["presets"]] == ["paper", "hardened"]
    assert [row["what"] for row in experts["presets"]] == ["paper", "hardened", "throughput"]
    assert "learned positions" in opt["refused"]["throughput"]
    for family in results["families"]:
        for row in family["presets"]:
            found = row["difference"]
            assert found["samples"] == found["same_or_tied"] == 48
            assert 0 < found["largest"] < 1e-3
            assert 0 < found["rms"] < 1e-4 * found["scale"]
        again, exact, mutant = (row["difference"] for row in family["controls"])
        assert again["same_or_tied"] == exact["same_or_tied"] == 48
        assert mutant["same_or_tied"] < 36
        assert mutant["rms"] > 0.1 * mutant["scale"]
        assert [row["preset"] for row in family["narrow"]] == [row["what"] for row in family["presets"]]
        # The preset paper rounds no weight, hardened every one.
        assert family["narrow"][0]["weights"]["rms"] < 1e-4 < family["narrow"][1]["weights"]["rms"]
    page = (tmp_path / "accuracy.md").read_text()
    assert page.startswith("# Accuracy: protected against plain")
    assert "0.021/0.033/0.0478/0.051" in page


def test_an_unknown_family_is_refused_before_anything_starts(tmp_path: Path) -> None:
    done = run("--families", "llama,gpt5", out=tmp_path)
    assert done.returncode == 2
    assert "gpt5; known: gpt2, llama" in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_unknown_preset_is_refused_before_anything_starts(tmp_path: Path) -> None:
    done = run("--presets", "strong", out=tmp_path)
    assert done.returncode == 2
    assert "strong; known: paper, hardened, throughput" in done.stderr
    assert not list(tmp_path.iterdir())


def test_sums_are_over_the_vocabulary_and_then_over_samples() -> None:
    reference = torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 1.0]])
    found = compare(reference, reference + torch.tensor([[0.5, 0.0, 0.25], [0.0, 0.0, 0.0]]))
    assert found.same == found.same_or_tied == 2
    assert found.logits == pytest.approx(0.375)
    assert found.logits_total == pytest.approx(0.75)
    assert found.largest == pytest.approx(0.5)
    assert found.probabilities_total == pytest.approx(2 * found.probabilities)


def test_another_pick_is_a_tie_only_within_the_width() -> None:
    reference = torch.tensor([[1.0, 0.9, 0.0], [1.0, 0.0, 0.9], [1.0, 0.0, 0.0]])
    swapped = torch.tensor([[0.9, 1.0, 0.0], [1.0, 0.0, 0.9], [0.0, 1.0, 0.0]])
    no_routing = torch.zeros(3, dtype=torch.bool)
    narrow_width, wide = (compare(reference, swapped, Ties(width, no_routing)) for width in (0.05, 0.2))
    assert (narrow_width.same, narrow_width.same_or_tied, narrow_width.near_ties) == (1, 1, 0)
    assert (wide.same, wide.same_or_tied, wide.near_ties) == (1, 2, 2)


def test_ties_come_from_the_rounding_of_the_plain_model_alone() -> None:
    reference = torch.zeros(3, 4)
    exact = reference + torch.tensor([[0.01], [0.02], [5.0]])
    margins = torch.tensor([[1.0, 0.5], [1.0, 0.004], [0.3, 1.0]], dtype=torch.float64)
    ties = Ties.of(reference, exact, margins, margins + 0.001)
    assert ties.width == pytest.approx(8 * 0.02)
    assert ties.routing.tolist() == [False, True, False]
    assert not Ties.of(reference, exact, margins[:, :0], margins[:, :0]).routing.any()


def test_another_pick_where_routing_is_a_tie_counts_as_one() -> None:
    reference, other = torch.tensor([[9.0, 0.0], [9.0, 0.0]]), torch.tensor([[0.0, 9.0], [0.0, 9.0]])
    found = compare(reference, other, Ties(0.0, torch.tensor([True, False])))
    assert (found.same, found.same_or_tied, found.near_ties) == (0, 1, 1)


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        compare(torch.zeros(1, 2), torch.tensor([[0.0, float("nan")]]))


def test_bfloat16_arms_are_counted_sample_by_sample() -> None:
    reference = torch.eye(3)
    plain, protected = reference[[0, 1, 0]], reference[[1, 1, 2]]
    row = narrow("hardened", reference, plain, protected, reference)
    assert (row.plain.same, row.protected.same, row.only_plain, row.only_protected) == (2, 2, 1, 1)
    assert row.ratio == pytest.approx(1.0)
    assert row.weights.rms == 0.0
