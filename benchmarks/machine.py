"""Where the numbers come from: the machine, the versions, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "grpcio", "protobuf", "numpy")


@dataclass(frozen=True)
class Machine:
    cpu: str
    cores: int
    memory_gib: float
    system: str
    python: str
    versions: dict[str, str]
    commit: str
    load_before: float
    """One-minute load average when the run began; more than about 0.5 and the numbers are of a busy machine."""


def here() -> Machine:
    return Machine(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions={name: version(name) for name in PACKAGES},
        commit=_commit(),
        load_before=round(os.getloadavg()[0], 2),
    )


def _cpu() -> str:
    """The model name with its vector extensions, which decide more than the name does."""
    fields: dict[str, str] = {}
    source = Path("/proc/cpuinfo")
    for line in source.read_text().splitlines() if source.exists() else []:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = fields.get("flags", "").split()
    vectors = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return " ".join([fields.get("model name") or platform.processor() or platform.machine(), *vectors])


def _commit() -> str:
    """The commit, with `+` where the tree differs from it in more than results."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs/benchmarks")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if changed else "")
