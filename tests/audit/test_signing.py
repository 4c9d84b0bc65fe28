"""A report gets into the signed manifest whole or not at all, and an interruption is gone on with."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stip_keyservice.audit import signing
from stip_keyservice.audit.document import Cell, Metric, Report, Subject, Traffic
from stip_keyservice.audit.recording import server_digest
from stip_keyservice.home import Home
from stip_keyservice.service.instances import inspect
from stip_protocol.errors import ConfigurationError, ManifestMismatch, SealedPartInvalid, SignatureInvalid
from stip_protocol.leakage import REPORT_NAME, Interval
from stip_protocol.manifest import SIGNING, FileDigest, Manifest
from stip_protocol.secrets_file import open_secrets, seal_secrets


class Interrupted(BaseException):
    """Stands for what ends a process but not its files."""


def report_on(manifest: Manifest, value: float = 0.5, **changes: Any) -> Report:
    measured = Interval(value=value, low=value - 0.1, high=value + 0.1)
    subject: dict[str, Any] = {
        "instance": manifest.instance, "epoch": manifest.epoch, "preset": manifest.preset, "dtype": manifest.dtype,
        "width": manifest.width, "vocabulary": manifest.vocabulary, "layers": 5, "tied": False,
        "origin": "bundled model", "server_sha256": server_digest(manifest),
    }  # fmt: skip
    return Report(
        subject=Subject(**(subject | changes)),
        traffic=Traffic(source="computed", sha256="ab" * 32, sessions=2, positions=9, accomplice_tokens=0),
        seed=7,
        versions={},
        cells=(
            Cell(
                attack="B",
                knowledge="table",
                metrics=(Metric(name="token_top1", measured=measured, prior=None, counted=9),),
            ),
            Cell(attack="D", knowledge="server", not_applicable="no base"),
        ),
        correlations=(),
    )


def inspected(instance: Path, home: Home) -> Manifest:
    return inspect(instance, home.developer.public_key(), home.sealing).manifest


def test_an_instance_is_whole_before_and_after_and_says_what_was_measured(instance: Path, home: Home) -> None:
    before = inspected(instance, home)
    assert before.leakage is None
    report = report_on(before)
    signed, digest = signing.sign(instance, report, home)
    after = inspected(instance, home)
    assert after == signed == before.model_copy(update={"leakage": report.summary()})
    assert digest == hashlib.sha256((instance / "manifest.json").read_bytes()).digest()
    assert after.leakage is not None
    assert after.leakage.report_sha256 == hashlib.sha256((instance / REPORT_NAME).read_bytes()).hexdigest()
    assert Report.from_json((instance / REPORT_NAME).read_bytes()).cells == report.cells
    assert {path.name for path in instance.iterdir()} == {
        "manifest.json", "manifest.json.sig", "secrets.sealed", "certificate.json", "leakage.json",
        "server", "enclave", "client",
    }  # fmt: skip


def test_a_manifest_of_before_there_were_audits_still_loads(instance: Path, home: Home) -> None:
    content = json.loads((instance / "manifest.json").read_text())
    del content["leakage"]
    data = json.dumps(content).encode()
    signature = home.developer.sign(b"stip/Manifest\x00" + data)
    assert Manifest.parse(data, signature, home.developer.public_key()).leakage is None


def test_a_second_audit_takes_the_place_of_the_first(instance: Path, home: Home) -> None:
    manifest = inspected(instance, home)
    _, first = signing.sign(instance, report_on(manifest), home)
    _, second = signing.sign(instance, report_on(manifest, value=0.2), home)
    leakage = inspected(instance, home).leakage
    assert first != second
    assert leakage is not None
    assert leakage.cells[0].metrics["token_top1"].value == 0.2


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"instance": "cd" * 16}, "instance"), ({"epoch": 9}, "epoch"), ({"server_sha256": "0"}, "part")],
)
def test_a_report_on_another_instance_is_refused(instance: Path, home: Home, changes: Any, says: str) -> None:
    manifest = inspected(instance, home)
    with pytest.raises(ConfigurationError, match=says):
        signing.sign(instance, report_on(manifest, **changes), home)
    assert inspected(instance, home) == manifest


def test_the_home_of_another_developer_signs_nothing(instance: Path, home: Home, tmp_path: Path) -> None:
    manifest = inspected(instance, home)
    with pytest.raises(SignatureInvalid):
        signing.sign(instance, report_on(manifest), Home.open(tmp_path / "other"))
    assert inspected(instance, home) == manifest


def test_secrets_of_another_key_service_are_not_sealed_anew(instance: Path, home: Home, ground: Any) -> None:
    manifest = inspected(instance, home)
    sealed = (instance / "secrets.sealed").read_bytes()
    (instance / "secrets.sealed").write_bytes(sealed[:-1] + bytes([sealed[-1] ^ 1]))
    with pytest.raises(SealedPartInvalid):
        signing.sign(instance, report_on(manifest), home)


def test_one_process_signs_at_a_time(instance: Path, home: Home) -> None:
    manifest = inspected(instance, home)
    handle = os.open(instance, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(ConfigurationError, match="one that another audit signs"):
            signing.sign(instance, report_on(manifest), home)
    finally:
        os.close(handle)
    assert inspected(instance, home) == manifest


@contextmanager
def interrupted_at(step: int) -> Iterator[list[str]]:
    """End what runs at a renaming or removal of a file or folder; gives what was done before."""
    done: list[str] = []

    def counted(function: Any) -> Any:
        def call(path: Path, *arguments: Any) -> Any:
            if len(done) == step:
                raise Interrupted
            done.append(path.name)
            return function(path, *arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("rename", "replace", "rmdir"):
            patch.setattr(Path, name, counted(getattr(Path, name)))
        yield done


def steps(instance: Path, home: Home) -> int:
    """How often something takes its place while an instance is signed."""
    with interrupted_at(-1) as done:
        signing.sign(instance, report_on(inspected(instance, home)), home)
    return len(done)


def test_whenever_it_is_interrupted_the_instance_loads_or_is_refused_and_can_be_finished(
    instance: Path, home: Home, tmp_path: Path
) -> None:
    before = inspected(instance, home)
    report = report_on(before)
    total = steps(Path(shutil.copytree(instance, tmp_path / "counted")), home)
    assert total > len(signing.DOCUMENTS)
    ends = set()
    for step in range(total):
        copy = Path(shutil.copytree(instance, tmp_path / f"copy-{step}"))
        with pytest.raises(Interrupted), interrupted_at(step):
            signing.sign(copy, report, home)
        between = (copy / SIGNING).exists()
        if between:
            with pytest.raises(ManifestMismatch, match="an audit was interrupted as it signed, run it again"):
                inspected(copy, home)
        else:
            assert inspected(copy, home) == before
        ends.add(between)
        assert signing.finish(copy, home) == between
        expected = before.model_copy(update={"leakage": report.summary()}) if between else before
        assert inspected(copy, home) == expected
        signing.sign(copy, report, home)
        assert inspected(copy, home).leakage == report.summary()
        assert not list(copy.glob("*.partial"))
        shutil.rmtree(copy)
    assert ends == {False, True}


def waiting(instance: Path, home: Home) -> Path:
    """An instance whose signing was interrupted before the first document took its place."""
    report = report_on(inspected(instance, home))
    with pytest.raises(Interrupted), interrupted_at(steps_before_places(instance, home)):
        signing.sign(instance, report, home)
    return instance / SIGNING


def steps_before_places(instance: Path, home: Home) -> int:
    copy = Path(shutil.copytree(instance, instance.with_name("counting")))
    return steps(copy, home) - len(signing.DOCUMENTS) - 1


def test_nothing_is_finished_where_nothing_waits(instance: Path, home: Home) -> None:
    assert not signing.finish(instance, home)


@pytest.mark.parametrize("name", signing.DOCUMENTS)
def test_what_waits_and_was_changed_is_refused(instance: Path, home: Home, name: str) -> None:
    path = waiting(instance, home) / name
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises((ManifestMismatch, SignatureInvalid, SealedPartInvalid)):
        signing.finish(instance, home)
    assert path.exists()


def test_another_instance_of_the_same_developer_that_waits_is_refused_and_overwrites_nothing(
    instance: Path, home: Home, ground: Any, tmp_path: Path
) -> None:
    ground.truth("paper")
    other = Path(shutil.copytree(ground.folder / "paper-0", tmp_path / "other"))
    before = inspected(instance, home)
    shutil.move(waiting(other, home), instance / SIGNING)
    with pytest.raises(ManifestMismatch, match="instance"):
        signing.finish(instance, home)
    assert len(list((instance / SIGNING).iterdir())) == len(signing.DOCUMENTS)
    shutil.rmtree(instance / SIGNING)
    assert inspected(instance, home) == before


def test_what_waits_for_another_server_part_is_refused(instance: Path, home: Home) -> None:
    folder = waiting(instance, home)
    manifest = Manifest.load(folder / "manifest.json", home.developer.public_key())[0]
    changed = manifest.model_copy(update={"server": {**manifest.server, "config.json": FileDigest.of(b"another")}})
    for name in ("manifest.json", "manifest.json.sig"):
        (folder / name).unlink()
    digest = changed.write(folder / "manifest.json", home.developer)
    secrets = open_secrets((folder / "secrets.sealed").read_bytes(), home.sealing)
    bound = seal_secrets(secrets.model_copy(update={"manifest_digest": digest}), home.sealing.public_key())
    (folder / "secrets.sealed").write_bytes(bound)
    with pytest.raises(ManifestMismatch, match="server part"):
        signing.finish(instance, home)


def test_secrets_of_another_manifest_that_wait_are_refused(instance: Path, home: Home) -> None:
    folder = waiting(instance, home)
    shutil.copy(instance / "secrets.sealed", folder / "secrets.sealed")
    with pytest.raises(ManifestMismatch, match="manifest digest"):
        signing.finish(instance, home)
