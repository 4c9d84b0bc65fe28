"""Plain vLLM from outside: a process in vLLM's environment that takes orders (`benchmarks.vllm_plain`)."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.machine import ROOT
from benchmarks.samples import Order, Samples

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
"""`make test-vllm` makes this environment."""


def absent(python: Path = PYTHON) -> str | None:
    """Why vLLM cannot be run here; None where it can."""
    if not python.exists():
        return f"vLLM: no environment at {python.parent.parent.name}; `make test-vllm` makes one"
    done = subprocess.run([python, "-c", "import vllm"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        return f"vLLM: {python.parent.parent.name} does not import it: {reason}"
    return None


class VllmProcess:
    """A context manager; `__call__` is the arm."""

    def __init__(
        self,
        checkpoint: Path,
        settings: Mapping[str, Any],
        log: Path,
        *,
        python: Path = PYTHON,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._log = log.open("ab")
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.vllm_plain", checkpoint, json.dumps(dict(settings))],
            cwd=ROOT,
            env=os.environ | dict(environment or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def __enter__(self) -> Self:
        assert self._read() == {"ready": True}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def __call__(self, order: Order) -> Samples:
        """Both turns. vLLM has no sessions: the second turn resends the first, which is in its prefix cache; times
        count once every stream decodes."""
        first = await asyncio.to_thread(self._ask, order.prompts, 1)
        again = [
            [*prompt, *ids, *new] for prompt, ids, new in zip(order.prompts, first["ids"], order.seconds, strict=True)
        ]
        second = await asyncio.to_thread(self._ask, again, order.tokens)
        ids = [[*one, *two] for one, two in zip(first["ids"], second["ids"], strict=True)]
        return Samples([times[0] for times in first["times"]], second["times"], ids)

    def _ask(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        """Raises `EOFError` where the process died."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EOFError(f"plain vLLM ended (exit {self._process.wait()}); its log: {self._log.name}")
        answer: dict[str, Any] = json.loads(line)
        return answer
