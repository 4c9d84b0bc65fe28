"""A protection that is killed goes on where it stopped, and nothing half-written is ever taken for whole."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file

from stip_keyservice.protect.parts import server_files, write_server_documents
from stip_keyservice.protect.plan import Plan, plan
from stip_keyservice.protect.storage.checkpoint import Checkpoint
from stip_keyservice.protect.storage.resume import Record
from stip_protocol.manifest import ClientManifest, Manifest, check_files
from stip_protocol.sealed import read_sealed
from stip_protocol.secrets_file import InstanceSecrets, grant_of, open_secrets

from .conftest import Case
from .killing import Job, run

MODELS = [
    (Case("llama", tied=False, sharded=True, dtype=torch.bfloat16), "hardened"),
    (Case("gpt2", tied=False), "paper"),
]
SOME = 5
"""Kills in the normal suite, for each model."""
CHAINS = 12
"""Protections in the soak that are killed again and again."""

Checkpoints = Callable[[Case], Path]


@pytest.fixture(params=MODELS, ids=lambda param: f"{param[0]}-{param[1]}")
def job(request: pytest.FixtureRequest, checkpoint_of: Checkpoints, tmp_path: Path) -> Job:
    case, preset = request.param
    return Job(checkpoint_of(case), tmp_path / "out", preset)


def steps_of(job: Job) -> int:
    """Steps of a protection that nobody kills."""
    status, steps = run(Job(job.model, job.out.with_name("uninterrupted"), job.preset))
    assert status == 0
    return steps


def noted(job: Job) -> InstanceSecrets | None:
    """What the record in OUT.partial holds."""
    path = job.partial / "resume"
    if not path.exists():
        return None
    developer, sealing = job.keys
    return Record.open(path.read_bytes(), developer, job.partial).secrets(sealing, job.partial)


def expected_server(planned: Plan, source: Checkpoint, folder: Path) -> dict[str, bytes | dict[str, torch.Tensor]]:
    """The server part, computed without any of what can be interrupted."""
    files = server_files(planned, source, 40_000)
    write_server_documents(folder, planned, files)
    documents: dict[str, bytes | dict[str, torch.Tensor]] = {path.name: path.read_bytes() for path in folder.iterdir()}
    return documents | {
        Path(file.name).name: {
            output.name: planned.compute(output, source, slice(0, output.shape[0])) for output in file.outputs
        }
        for file in files
    }


def require_whole(job: Job, folder: Path) -> InstanceSecrets:
    """The instance is signed, certified, opens, and holds exactly what its own root gives."""
    developer, sealing = job.keys
    manifest, digest = Manifest.load(job.out / "manifest.json", developer.public_key())
    check_files(job.out / "server", manifest.server)
    check_files(job.out / "enclave", manifest.enclave)
    client, _ = ClientManifest.load(job.out / "client" / "manifest.json", developer.public_key())
    check_files(job.out / "client", client.files)
    secrets = open_secrets((job.out / "secrets.sealed").read_bytes(), sealing)
    assert (secrets.instance, secrets.manifest_digest) == (manifest.instance, digest)
    assert manifest.certificate["passed"] is True
    assert {path.name for path in job.out.iterdir()} == {
        *("manifest.json", "manifest.json.sig", "certificate.json", "secrets.sealed"),
        *("server", "enclave", "client"),
    }
    source = Checkpoint.open(job.model)
    planned = plan(source.config, source.headers, job.preset, secrets.root)
    folder.mkdir()
    server = expected_server(planned, source, folder)
    assert manifest.server.keys() == server.keys()
    for name, content in server.items():
        path = job.out / "server" / name
        if isinstance(content, bytes):
            assert path.read_bytes() == content, name
        else:
            found = load_file(path)
            assert found.keys() == content.keys()
            assert all(torch.equal(found[key], content[key]) for key in content), name
    grant = grant_of(secrets)
    for output in planned.enclave:
        path = job.out / "enclave" / f"{output.name}.sealed"
        place = {"instance": grant.instance, "preset": grant.preset, "file": path.name}
        plain = load(bytes(read_sealed(path, key=grant.part_key, epoch=grant.epoch, **place)))
        assert torch.equal(plain[output.name], planned.compute(output, source, slice(0, output.shape[0])))
    return secrets


def finish(job: Job, folder: Path) -> None:
    """After a kill: the same call ends well, with the root that was noted, unless the instance was whole already."""
    before = noted(job)
    if not job.out.exists() or (job.out / "resume").exists():
        assert run(job)[0] == 0
    secrets = require_whole(job, folder)
    assert before is None or (before.instance, before.root) == (secrets.instance, secrets.root)
    assert not job.partial.exists()


def seeded(count: int, steps: int) -> Iterator[int]:
    """Steps spread over the whole run, one drawn from each part of it."""
    draw = random.Random(3)
    for part in range(count):
        low, high = part * steps // count + 1, (part + 1) * steps // count
        yield draw.randint(low, max(low, high))


@pytest.mark.timeout(240)
def test_a_killed_protection_goes_on_and_gives_what_an_uninterrupted_one_gives(job: Job, tmp_path: Path) -> None:
    for kill_at in seeded(SOME, steps_of(job)):
        out = tmp_path / f"killed-at-{kill_at}"
        killed = Job(job.model, out, job.preset)
        assert run(killed, kill_at=kill_at) == (-signal.SIGKILL, kill_at)
        finish(killed, tmp_path / f"expected-{kill_at}")


@pytest.mark.timeout(240)
def test_a_kill_after_the_rename_leaves_an_instance_that_the_next_run_finishes(job: Job, tmp_path: Path) -> None:
    """The last steps: the parent is synced, journal and record are removed, the instance is synced."""
    steps = steps_of(job)
    untidied = 0
    for kill_at in range(steps - 4, steps + 1):
        killed = Job(job.model, tmp_path / f"killed-at-{kill_at}", job.preset)
        assert run(killed, kill_at=kill_at)[0] == -signal.SIGKILL
        assert not killed.partial.exists()
        untidied += (killed.out / "resume").exists()
        finish(killed, tmp_path / f"expected-{kill_at}")
    assert untidied == 3


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_a_kill_at_any_step_is_survived(job: Job, tmp_path: Path) -> None:
    for kill_at in range(1, steps_of(job) + 1):
        killed = Job(job.model, tmp_path / f"killed-at-{kill_at}", job.preset)
        assert run(killed, kill_at=kill_at) == (-signal.SIGKILL, kill_at)
        finish(killed, tmp_path / f"expected-{kill_at}")


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_a_protection_that_is_killed_again_and_again_ends(job: Job, tmp_path: Path) -> None:
    steps, draw = steps_of(job), random.Random(4)
    for chain in range(CHAINS):
        killed = Job(job.model, tmp_path / f"chain-{chain}", job.preset)
        status, kills = -signal.SIGKILL, 0
        while status == -signal.SIGKILL and not killed.out.exists():
            status, _ = run(killed, kill_at=draw.randint(1, steps))
            kills += 1
        assert status in (0, -signal.SIGKILL)
        finish(killed, tmp_path / f"expected-{chain}")


def test_finished_files_are_not_written_again(job: Job, tmp_path: Path) -> None:
    """Killed in the certificate, when every tensor is on the disk: the second run leaves those files alone."""
    steps = steps_of(job)
    written: dict[str, int] = {}
    for kill_at in range(steps - 1, 0, -1):
        killed = Job(job.model, tmp_path / f"killed-at-{kill_at}", job.preset)
        assert run(killed, kill_at=kill_at)[0] == -signal.SIGKILL
        if (killed.partial / "journal").exists() and not (killed.partial / "certificate.json").exists():
            files = [path for part in ("server", "enclave") for path in (killed.partial / part).iterdir()]
            written = {path.name: path.stat().st_ino for path in files if path.suffix in (".safetensors", ".sealed")}
            break
    assert written
    finish(killed, tmp_path / "expected")
    for part in ("server", "enclave"):
        for path in (killed.out / part).iterdir():
            assert path.name not in written or path.stat().st_ino == written[path.name]
