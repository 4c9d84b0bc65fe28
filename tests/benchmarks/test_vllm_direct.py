"""The plain arm in vLLM's environment: what is said over its pipe, with a stand-in for vLLM that counts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.samples import Order
from benchmarks.vllm_direct import VllmProcess, absent

FILES = {
    "vllm/__init__.py": """
class SamplingParams:
    def __init__(self, *, temperature, max_tokens, ignore_eos, detokenize):
        assert temperature == 0.0 and ignore_eos and not detokenize
        self.max_tokens = max_tokens
""",
    "vllm/engine/__init__.py": "",
    "vllm/engine/arg_utils.py": """
class AsyncEngineArgs:
    def __init__(self, *, model, skip_tokenizer_init, dtype):
        assert skip_tokenizer_init and dtype == "float32"
        print("what vLLM says goes to the log of", model, flush=True)
""",
    "vllm/v1/__init__.py": "",
    "vllm/v1/engine/__init__.py": "",
    "vllm/v1/engine/async_llm.py": """
import asyncio
from types import SimpleNamespace

class AsyncLLM:
    @classmethod
    def from_engine_args(cls, arguments):
        return cls()

    async def generate(self, prompt, params, name):
        # As vLLM does: every output holds all ids so far. Each id is one more than the last.
        ids, last = [], prompt["prompt_token_ids"][-1]
        if last == 13:
            raise RuntimeError("unlucky")
        while len(ids) < params.max_tokens:
            last += 1
            ids.append(last)
            await asyncio.sleep(0)
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=list(ids))])

    def shutdown(self):
        print("shut down")
""",
}
"""As much of vLLM as `benchmarks.vllm_plain` calls."""


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "packages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "packages"


@pytest.fixture
def process(packages: Path, tmp_path: Path) -> Iterator[VllmProcess]:
    running = VllmProcess(
        Path("a-checkpoint"),
        {"dtype": "float32"},
        tmp_path / "log",
        python=Path(sys.executable),
        environment={"PYTHONPATH": str(packages)},
    )
    with running:
        yield running


async def test_the_second_turn_goes_on_after_the_first(process: VllmProcess, tmp_path: Path) -> None:
    found = await process(Order([[40, 50], [7, 8, 9]], 4))
    # 51 answers the first prompt; then its first id, 40, is the new prompt, and 41 and on the answer.
    assert found.ids == [[51, 41, 42, 43, 44], [10, 8, 9, 10, 11]]
    assert [len(times) for times in found.times] == [4, 4]
    assert all(times == sorted(times) for times in found.times)
    assert all(seconds > 0 for seconds in found.first)
    assert "the log of a-checkpoint" in (tmp_path / "log").read_text()


async def test_a_process_that_died_is_an_error_that_names_its_log(process: VllmProcess, tmp_path: Path) -> None:
    with pytest.raises(EOFError, match=str(tmp_path / "log")):
        await process(Order([[13]], 4))
    assert "unlucky" in (tmp_path / "log").read_text()


def test_it_is_shut_down_when_the_benchmark_is_done_with_it(packages: Path, tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(packages)}
    process = VllmProcess(
        Path("m"), {"dtype": "float32"}, tmp_path / "log", python=Path(sys.executable), environment=environment
    )
    with process:
        pass
    assert "shut down" in (tmp_path / "log").read_text()


def test_an_environment_that_is_not_there_is_named(tmp_path: Path) -> None:
    reason = absent(tmp_path / ".venv-none" / "bin" / "python")
    assert reason == "vLLM: no environment at .venv-none; `make test-vllm` makes one"


def test_an_environment_without_vllm_is_named(tmp_path: Path) -> None:
    python = tmp_path / ".venv-bare" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    python.chmod(0o700)
    reason = absent(python)
    assert reason is not None
    assert reason.startswith("vLLM: .venv-bare does not import it: ModuleNotFoundError")
