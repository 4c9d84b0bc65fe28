"""The GPU benchmark's logic, on a tiny shape and a CPU; what it must not run on, it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import gpu, gpu_report
from benchmarks.gpu_report import Results

SMALL = ["--shape", "tiny", "--device", "cpu", "--batches", "1,3", "--context", "9", "--steps", "4", "--rounds", "2"]


def test_a_tiny_run_times_every_arm_and_writes_both_files(tmp_path: Path) -> None:
    done = CliRunner().invoke(gpu.main, [*SMALL, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    results = Results.model_validate_json((tmp_path / gpu_report.DATA).read_text())
    assert [batch.size for batch in results.batches] == [1, 3]
    for batch in results.batches:
        assert [timing.arm for timing in batch.timings] == [gpu.PLAIN, gpu.AGAIN, gpu.EAGER, gpu.GRAPHS]
        assert all(timing.seconds > 0 for timing in batch.timings)
        assert batch.verdict is None
        assert batch.timings[1].same == 1.0
    assert results.floor == pytest.approx(results.weights / results.bandwidth)
    assert (tmp_path / gpu_report.PAGE).read_text() == gpu_report.page(results)


def test_every_arm_decodes_the_same_tokens_in_float64() -> None:
    cpu = torch.device("cpu")
    model = gpu.build("tiny", cpu, seed=1).double()
    prompts = torch.randint(12000, (3, 7), generator=torch.Generator().manual_seed(2))
    settings = {"slots": 4, "max_positions": 16}
    arms = [
        gpu.Loop(model),
        gpu.Engine(model, gpu.TransformersSettings(**settings, graphs=False)),
        gpu.Engine(model, gpu.TransformersSettings(**settings, graphs=True)),
    ]
    answers = []
    for arm in arms:
        arm.begin(prompts)
        answers.append([arm.step() for _ in range(5)])
    assert answers[0] == answers[1] == answers[2]


def test_the_weights_that_a_step_reads_are_all_but_the_input_table() -> None:
    model = gpu.build("tiny", torch.device("cpu"), seed=0)
    table = model.get_input_embeddings().weight
    assert table.dtype == torch.bfloat16
    assert gpu.weights(model) == 2 * (sum(each.numel() for each in model.parameters()) - table.numel())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cpu"], "with llama2-7b: cuda"),
        (["--shape", "tiny", "--device", "cpu", "--batches", "1,x"], "numbers of 1 or more"),
    ],
)
def test_what_would_measure_nothing_is_refused(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(gpu.main, [*arguments, "--out", str(tmp_path)])
    assert (done.exit_code, said in done.output) == (2, True), done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPU: this machine has one")
def test_a_machine_without_a_gpu_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(gpu.main, ["--out", str(tmp_path)])
    assert (done.exit_code, "no CUDA device here" in done.output) == (1, True), done.output
