"""What a recorder keeps of real sessions is what their server must see, computed from the instance's parts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest

import stip
from stip_keyservice.audit import truth
from stip_keyservice.audit.recording import Recording
from stip_keyservice.audit.traffic import observe
from stip_keyservice.audit.truth import Truth
from stip_keyservice.audit.view import Labelled, Top
from stip_protocol.errors import IntegrityError
from stip_stack.said import Said, converse, recorded
from stip_stack.trials import Job, Served

if TYPE_CHECKING:
    from tests.e2e.conftest import System

ROUNDING = 2e-5
"""Of the largest value: float32, the same sums in another order."""


@pytest.fixture(scope="module")
def truths(recording: System) -> dict[str, Truth]:
    home = recording.stack.workspace.home
    return {
        name: truth.read(served.published.folder, Path(served.plain.model.config._name_or_path), home)
        for name, served in recording.served.items()
    }


def kept(recording: System, served: Served, *said: Said) -> Recording:
    tape = recording.stack.tape(recording.server(served.name))
    return recorded(said, [tape], served.published.manifest)


def require_close(got: object, expected: object) -> None:
    got, expected = np.asarray(got), np.asarray(expected)
    np.testing.assert_allclose(got, expected, rtol=0, atol=ROUNDING * np.abs(expected).max())


def require_same(got: Labelled, expected: Labelled) -> None:
    np.testing.assert_array_equal(got.ids, expected.ids)
    np.testing.assert_array_equal(got.answers, expected.answers)
    np.testing.assert_array_equal(got.seen.asked, expected.seen.asked)
    if expected.seen.ids is not None:
        np.testing.assert_array_equal(got.seen.ids, expected.seen.ids)
    else:
        np.testing.assert_array_equal(got.seen.rows, expected.seen.rows)
    if expected.seen.hidden is not None:
        require_close(got.seen.hidden, expected.seen.hidden)
    if expected.seen.top is not None:
        require_same_top(cast(Top, got.seen.top), expected.seen.top)


def require_same_top(got: Top, expected: Top) -> None:
    """The same entries, but for places whose values rounding may swap."""
    require_close(got.values, expected.values)
    require_close(got.log_sum_exp, expected.log_sum_exp)
    near = ROUNDING * np.abs(expected.values).max()
    alone = np.diff(expected.values, axis=1, prepend=np.inf, append=-np.inf)
    settled = (-alone[:, 1:] > near) & (-alone[:, :-1] > near)
    assert settled.mean() > 0.9
    np.testing.assert_array_equal(got.indices[settled], expected.indices[settled])


async def test_sessions_of_two_users_at_once_are_kept_as_the_parts_say(
    recording: System, taped: Served, truths: dict[str, Truth], tmp_path: Path
) -> None:
    jobs = [
        Job(taped.prompt(number, 5 + 17 * number), max_tokens=9, temperature=1.0, seed=number) for number in range(6)
    ]
    said = await converse(taped.profile, "victim", jobs[:4]) + await converse(taped.profile, "accomplice", jobs[4:])
    found = kept(recording, taped, *said)
    assert [session.user for session in found.sessions] == ["victim"] * 4 + ["accomplice"] * 2
    for job, each, session in zip(jobs, said, found.sessions, strict=True):
        assert session.source == "recorded"
        require_same(session.said, observe(truths[taped.name], each.ids, len(job.ids)))
    found.write(tmp_path / "recording")
    assert Recording.read(tmp_path / "recording", taped.published.manifest).digest == found.digest


async def test_what_was_drafted_in_vain_or_cancelled_is_not_what_was_said(
    recording: System, taped: Served, truths: dict[str, Truth]
) -> None:
    turns: list[tuple[list[int], list[int]]] = []
    async with await stip.aconnect(taped.profile) as connection, await connection.session() as session:
        prompts = taped.prompt(20, 30), taped.prompt(21, 4), taped.prompt(22, 7)
        for prompt, until in zip(prompts, (None, 3, None), strict=True):
            got: list[int] = []
            async for chunk in session.generate(prompt * 2, max_tokens=24, stop_ids=(), drafts=7):
                if chunk.id is not None:
                    got.append(chunk.id)
                if len(got) == until:
                    await session.cancel()
            turns.append((prompt * 2, got))
    said = Said.of("victim", session.request_id, turns)
    (one,) = kept(recording, taped, said).sessions
    whole = observe(truths[taped.name], said.ids, 1)
    np.testing.assert_array_equal(one.said.ids, said.ids[:-1])
    assert one.said.answers.tolist() == [id_ for _, answer in turns for id_ in answer]
    np.testing.assert_array_equal(one.said.seen.asked + 1, np.flatnonzero(said.given))
    if whole.seen.ids is not None:
        np.testing.assert_array_equal(one.said.seen.ids, whole.seen.ids)
    else:
        np.testing.assert_array_equal(one.said.seen.rows, whole.seen.rows)
    if whole.seen.hidden is not None:
        require_close(one.said.seen.hidden, whole.seen.hidden[one.said.seen.asked])


def test_a_session_that_no_tape_shows_is_refused(recording: System, taped: Served) -> None:
    with pytest.raises(IntegrityError, match="passed no recorder"):
        kept(recording, taped, Said.of("victim", "ab" * 16, [([1], [2])]))


async def test_an_answer_that_no_tape_shows_is_refused(recording: System, taped: Served) -> None:
    (said,) = await converse(taped.profile, "victim", [Job(taped.prompt(1, 5), max_tokens=2)])
    ids = said.ids.tolist()
    with pytest.raises(IntegrityError, match="answers that no tape shows"):
        kept(recording, taped, Said.of("victim", said.request_id, [(ids[:3], ids[3:])]))
    with pytest.raises(IntegrityError, match=r"[67] of 9 positions"):
        kept(recording, taped, Said.of("victim", said.request_id, [([*ids, 1, 2, 3], [])]))
