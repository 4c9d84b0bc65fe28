"""One protection, in a process whose peak memory and time are its own: `python -m benchmarks.protect_run`.

Everything that `stip-keyservice protect` does up to the certificate, which is a measurement of its own: plan and
keys, both parts, journal. Prints one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from pathlib import Path

import click

from benchmarks.sampling import Sampler
from stip_keyservice.protect.parts import write_parts
from stip_keyservice.protect.plan import plan
from stip_keyservice.protect.progress import Stages, silent
from stip_keyservice.protect.storage.checkpoint import Checkpoint
from stip_keyservice.protect.storage.memory import default_workers
from stip_keyservice.protect.storage.workspace import claimed
from stip_protocol.manifest import Preset
from stip_protocol.secrets_file import InstanceSecrets


@dataclasses.dataclass(frozen=True)
class Run:
    """What one protection took."""

    preset: str
    workers: int
    seconds: float
    stages: dict[str, float]
    """Seconds of each stage."""
    written: int
    """Bytes of tensors written."""
    processor_seconds: float
    imported: int
    """Peak resident bytes (VmHWM) before anything was read: the interpreter and its libraries."""
    peak: int
    """Peak resident bytes in the end."""
    activities: dict[str, float]
    """Thread-seconds of each activity."""


def peak_memory() -> int:
    """VmHWM, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def protect(model: Path, out: Path, preset: Preset, workers: int | None) -> Run:
    """Protect `model` into `out`.partial, and remove that."""
    imported, sampler, stages = peak_memory(), Sampler(), Stages(silent)
    identity = InstanceSecrets(
        instance=secrets.token_hex(16),
        epoch=0,
        preset=preset,
        manifest_digest=bytes(32),
        root=secrets.token_bytes(32),
    )
    sampler.start()
    began, processor = time.monotonic(), time.process_time()
    source = Checkpoint.open(model)
    with stages.stage("keys", 1):
        planned = plan(source.config, source.headers, preset, identity.root)
    workers = workers or default_workers(source.headers, source.largest_shard, planned.residual_width)
    with claimed(out) as workspace:
        write_parts(workspace, source, planned, identity, stages, workers=workers)
        seconds, processor = time.monotonic() - began, time.process_time() - processor
        activities = sampler.stop()
        workspace.remove()
    return Run(
        preset=preset,
        workers=workers,
        seconds=seconds,
        stages={name: took.seconds for name, took in stages.times.items()},
        written=sum(took.nbytes for took in stages.times.values()),
        processor_seconds=processor,
        imported=imported,
        peak=peak_memory(),
        activities=activities,
    )


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("preset", type=click.Choice(["paper", "hardened"]))
@click.option("--workers", type=click.IntRange(1, 64), help="[default: as protect takes]")
def main(model: Path, out: Path, preset: Preset, workers: int | None) -> None:
    """Protect MODEL under PRESET next to OUT, remove what was written, and print what it took."""
    click.echo(json.dumps(dataclasses.asdict(protect(model, out, preset, workers))))


if __name__ == "__main__":
    main()
