"""What is computed of a session is what its server sees, several at a time or one alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stip_keyservice.audit import sibling, traffic, truth
from stip_keyservice.audit.recording import Recording
from stip_keyservice.protect.equivalence.opening import open_instance

from .conftest import MODEL, PROMPT

PRESETS = ["paper", "hardened", "throughput"]


@pytest.mark.parametrize("preset", PRESETS)
def test_sessions_of_one_batch_are_those_of_each_alone(ground: Any, preset: str) -> None:
    known = ground.truth(preset)
    texts = [ground.victims[0], ground.victims[1][:31], ground.victims[2]]
    for together, text in zip(traffic.observed(known, texts, PROMPT), texts, strict=True):
        alone = traffic.observe(known, text, PROMPT)
        one: Any = together.seen
        other: Any = alone.seen
        np.testing.assert_array_equal(together.ids, alone.ids)
        np.testing.assert_array_equal(together.answers, alone.answers)
        np.testing.assert_array_equal(one.asked, other.asked)
        if preset == "throughput":
            np.testing.assert_array_equal(one.ids, other.ids)
            continue
        np.testing.assert_array_equal(one.rows, other.rows)
        if preset == "hardened":
            np.testing.assert_allclose(one.hidden, other.hidden, atol=1e-4)
        else:
            np.testing.assert_allclose(one.top.values, other.top.values, atol=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_computed_traffic_can_be_kept_as_a_recording(ground: Any, preset: str, tmp_path: Path) -> None:
    known = ground.truth(preset)
    made = traffic.computed(known, {"victim": ground.victims[:2], "accomplice": ground.helped[:3]}, PROMPT)
    made.write(tmp_path / "traffic")
    read = Recording.read(tmp_path / "traffic", known.manifest)
    assert read.digest == made.digest
    assert [len(read.of_user("victim")), len(read.of_user("accomplice"))] == [2, 3]
    assert {session.source for session in read.sessions} == {"computed"}


def test_a_sibling_is_another_instance_of_the_same_model_and_the_same_one_each_time(
    ground: Any, tmp_path: Path
) -> None:
    known = ground.truth("hardened")
    opened = open_instance(ground.folder / "hardened-0", MODEL, ground.home)
    first, again = (truth.of(sibling.make(opened, tmp_path / name)) for name in ("first", "again"))
    assert (first.manifest.instance, first.manifest.server) == (again.manifest.instance, again.manifest.server)
    assert first.manifest.instance != known.manifest.instance
    assert np.abs(first.residual - known.residual).max() > 0.1
    np.testing.assert_array_equal(first.residual, again.residual)
    text = ground.victims[0][:-1]
    np.testing.assert_allclose(first.keyed.rows[text], known.entry.rows[text] @ first.residual.T, atol=1e-5)
    assert not digests(first) & digests(known)


def digests(known: Any) -> set[str]:
    files = [known.manifest.server["model.safetensors"], *known.manifest.enclave.values()]
    return {each.sha256 for each in files}
