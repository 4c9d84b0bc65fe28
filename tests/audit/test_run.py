"""A whole audit of one instance: what a report says, that it can be repeated, and what is refused."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stip_keyservice.audit import run, traffic
from stip_keyservice.audit.corpus import SCALES, Scale
from stip_keyservice.audit.recording import Recording, server_digest
from stip_keyservice.audit.run import Audit
from stip_protocol.errors import CheckpointInvalid, ConfigurationError, IntegrityError, ManifestMismatch

from .conftest import MODEL

TINY = Scale(length=24, prompt=12, victims=4, accomplice=300, public=400, held_out=48, passes=1)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCALES, "quick", TINY)


@pytest.fixture
def instance(ground: Any) -> Path:
    ground.truth("hardened")
    return Path(ground.folder / "hardened-0")


def audit(instance: Path, **changes: Any) -> Audit:
    chosen: dict[str, Any] = {"attacks": ("B", "C"), "knowledge": ("server", "table"), "scale": "quick"}
    return Audit(instance, MODEL, **(chosen | changes))


def test_a_report_says_what_was_audited_with_what_and_what_was_found(
    ground: Any, instance: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    told: list[tuple[str, int, int]] = []
    asked = audit(instance, origin="bundled model", seed=3)
    report = asked.run(ground.home, lambda *step: told.append(step))
    manifest = ground.truth("hardened").manifest
    subject, said = report.subject, report.traffic
    assert (subject.instance, subject.epoch, subject.preset) == (manifest.instance, 0, "hardened")
    assert (subject.width, subject.layers, subject.vocabulary, subject.tied) == (192, 5, 2048, False)
    assert (subject.server_sha256, subject.origin) == (server_digest(manifest), "bundled model")
    assert (said.source, said.sessions, said.positions, said.accomplice_tokens) == ("computed", 4, 96, 312)
    assert said.accomplice_computed == 312
    assert report.seed == 3
    assert report.versions.keys() == {"torch", "transformers", "numpy", "stip"}
    found = {(cell.attack, cell.knowledge): cell.metrics[0] for cell in report.cells}
    assert list(found) == [(attack, row) for row in ("server", "table") for attack in ("B", "C")]
    assert found["C", "table"].measured.value > 0.99
    assert found["B", "table"].measured.value < 0.5
    assert {each.what for each in report.correlations} == {"rows", "weights"}
    cells = [f"{attack}, {row}" for attack, row in found]
    assert told == [(what, done, 9) for done, what in enumerate([*run.PREPARING, *cells, ""])]
    assert not list(tmp_path.iterdir())


def test_the_same_audit_gives_the_same_bytes_and_leaves_torch_as_it_was(ground: Any, instance: Path) -> None:
    asked = audit(instance, attacks=("C", "E"), knowledge=("base", "sibling"))
    threads = torch.get_num_threads()
    first = asked.run(ground.home)
    torch.manual_seed(99)
    np.random.seed(99)  # attacks must not draw from what others leave behind
    assert asked.run(ground.home).to_json() == first.to_json()
    assert torch.get_num_threads() == threads
    found = {(cell.attack, cell.knowledge): cell for cell in first.cells}
    assert found["C", "base"].not_applicable == "no public base was named"
    linked = {metric.name: metric.measured.value for metric in found["E", "sibling"].metrics}
    assert linked["residual_cosine"] > 0.99


@pytest.mark.long
def test_the_model_itself_may_be_the_public_base(ground: Any, instance: Path) -> None:
    asked = audit(instance, attacks=("C",), knowledge=("base",), base=MODEL)
    assert asked.run(ground.home).cells[0].metrics[0].measured.value > 0.99


@pytest.mark.long
def test_a_sibling_may_be_named(ground: Any, instance: Path) -> None:
    ground.truth("hardened", 1)
    asked = audit(instance, attacks=("E",), knowledge=("sibling",), sibling=ground.folder / "hardened-1")
    linked = {metric.name: metric.measured.value for metric in asked.run(ground.home).cells[0].metrics}
    assert linked["residual_cosine"] > 0.99


def test_recorded_traffic_takes_the_place_of_computed(ground: Any, instance: Path, tmp_path: Path) -> None:
    known = ground.truth("hardened")
    made = traffic.computed(known, {"victim": ground.victims[:3], "accomplice": ground.helped[:2]}, 24)
    sessions = [replace(each, source="recorded") for each in made.sessions if each.user == "victim"]
    sessions += [each for each in made.sessions if each.user == "accomplice"]
    Recording.of(known.manifest, sessions).write(tmp_path / "traffic")
    report = audit(instance, recording=tmp_path / "traffic").run(ground.home)
    said = report.traffic
    assert (said.source, said.sessions, said.positions) == ("recorded", 3, 3 * 48)
    assert (said.accomplice_tokens, said.accomplice_computed) == (96, 96)
    assert said.sha256 == Recording.of(known.manifest, sessions).digest


@pytest.mark.long
def test_text_of_ones_own_takes_the_place_of_the_models(ground: Any, instance: Path, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("\n".join(f"And number {number} said unto the people, Go forth." for number in range(200)))
    report = audit(instance, text=book, attacks=("C",), knowledge=("table",)).run(ground.home)
    assert report.cells[0].metrics[0].measured.value > 0.99


@pytest.mark.long
@pytest.mark.parametrize("preset", ["paper", "throughput"])
def test_other_presets_are_audited_too(ground: Any, preset: str) -> None:
    ground.truth(preset)
    report = audit(ground.folder / f"{preset}-0", attacks=("B",), knowledge=("table",)).run(ground.home)
    assert report.subject.preset == preset
    assert report.cells[0].metrics[0].measured.value > (0.99 if preset == "paper" else -1)


def test_a_recording_without_victims_is_refused(ground: Any, instance: Path, tmp_path: Path) -> None:
    known = ground.truth("hardened")
    traffic.computed(known, {"accomplice": ground.helped[:2]}, 24).write(tmp_path / "traffic")
    with pytest.raises(ConfigurationError, match="none of a victim"):
        audit(instance, recording=tmp_path / "traffic").run(ground.home)


def test_a_recording_that_leaves_an_attacker_without_traffic_is_refused(
    ground: Any, instance: Path, tmp_path: Path
) -> None:
    known = ground.truth("hardened")
    traffic.computed(known, {"victim": ground.victims[:2]}, 24).write(tmp_path / "alone")
    with pytest.raises(ConfigurationError, match="none of an accomplice"):
        audit(instance, recording=tmp_path / "alone", knowledge=("server", "accomplice")).run(ground.home)
    unanswered = [text[:25] for text in ground.victims[:2]]
    traffic.computed(known, {"victim": unanswered, "accomplice": ground.helped[:2]}, 24).write(tmp_path / "unanswered")
    with pytest.raises(ConfigurationError, match="none that was fed"):
        audit(instance, recording=tmp_path / "unanswered").run(ground.home)


def test_an_instance_that_is_not_what_was_signed_is_refused(ground: Any, instance: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(instance, tmp_path / "copy"))
    with (copy / "server" / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(ManifestMismatch):
        audit(copy).run(ground.home)


def test_a_model_of_another_form_is_refused(ground: Any, instance: Path) -> None:
    with pytest.raises((ConfigurationError, IntegrityError)):
        replace(audit(instance), model=ground.surrogate.folder).run(ground.home)


def test_a_base_that_is_none_or_of_another_form_is_refused(ground: Any, instance: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid, match="no such folder"):
        audit(instance, base=tmp_path / "nothing").run(ground.home)


def test_the_audited_instance_or_one_of_another_preset_is_no_sibling(ground: Any, instance: Path) -> None:
    ground.truth("paper")
    for other, says in ((instance, "the audited instance"), (ground.folder / "paper-0", "sibling preset: got paper")):
        with pytest.raises(ConfigurationError, match=says):
            audit(instance, sibling=other, attacks=("E",), knowledge=("sibling",)).run(ground.home)
