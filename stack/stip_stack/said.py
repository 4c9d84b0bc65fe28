"""What users say to a running stack, and the recording that comes of it: what the server saw, with what it was.

The server's side is a tape (`stip_stack.tape`); what its sessions were, only the users know, who sent the prompts and
got the answers. A session has the same `request_id` on both sides.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

import stip
from stip_keyservice.audit.recording import Recording, Session, User
from stip_keyservice.audit.view import Ids, Labelled, Seen, Top
from stip_protocol.errors import IntegrityError
from stip_protocol.manifest import Manifest
from stip_stack.tape import Heard, heard
from stip_stack.trials import Job

STREAMS = 16
"""Sessions of one user at once."""


@dataclass(frozen=True)
class Said:
    """One session, as its user knows it."""

    user: User
    request_id: str
    ids: Ids = field(repr=False)
    """[n] true ids, prompts and answers, in order."""
    given: NDArray[np.bool_] = field(repr=False)
    """[n] which of them the user was given."""

    @classmethod
    def of(cls, user: User, request_id: str, turns: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Self:
        """From (prompt, answer) of each turn."""
        parts = [(part, given) for turn in turns for part, given in zip(turn, (False, True), strict=True)]
        ids = np.array([id_ for part, _ in parts for id_ in part], np.int64)
        return cls(user, request_id, ids, np.array([given for part, given in parts for _ in part], np.bool_))


async def converse(
    profile: Path, user: User, jobs: Sequence[Job], *, ended: Callable[[int], None] = lambda positions: None
) -> list[Said]:
    """Put each job in a session of its own, `STREAMS` at a time; `ended` is told how long each session was.

    Raises what a session raises.
    """
    said: dict[int, Said] = {}
    waiting = list(enumerate(jobs))
    async with await stip.aconnect(profile) as connection:

        async def stream() -> None:
            while waiting:
                number, job = waiting.pop(0)
                async with await connection.session() as session:
                    answer = await job.run(session)
                said[number] = Said.of(user, session.request_id, [(job.ids, answer.ids)])
                ended(len(said[number].ids))

        async with asyncio.TaskGroup() as group:
            for _ in range(min(STREAMS, len(jobs))):
                group.create_task(stream())
    return [said[number] for number in range(len(jobs))]


def recorded(said: Sequence[Said], tapes: Sequence[Path], manifest: Manifest) -> Recording:
    """The sessions of an instance in the order they are given, each with what its servers saw.

    Raises `IntegrityError` where a tape lacks one of them or a part of it, or shows an answer that nobody got.
    """
    seen = {each.request_id: each for each in heard(tapes, manifest)}
    sessions = []
    for each in said:
        if each.request_id not in seen:
            raise IntegrityError(f"recording: session {each.request_id} passed no recorder")
        sessions.append(Session(each.user, "recorded", labelled(each, seen[each.request_id])))
    return Recording.of(manifest, sessions)


def labelled(said: Said, shown: Heard) -> Labelled:
    """One session on both sides. The last id is what nobody fed; what the server saw beyond that was given up."""
    fed, seen = len(said.ids) - 1, shown.seen
    if len(seen) < fed:
        raise IntegrityError(f"recording: session {said.request_id} has {len(seen)} of {fed} positions on the tapes")
    behind = seen.asked[seen.asked < fed]
    chosen = said.given[behind + 1]
    if chosen.sum() != said.given.sum():
        raise IntegrityError(f"recording: session {said.request_id} was given answers that no tape shows")
    asked = behind[chosen]
    kept = np.flatnonzero(np.isin(seen.asked, asked))
    return Labelled(
        Seen(
            None if seen.rows is None else seen.rows[:fed],
            None if seen.ids is None else seen.ids[:fed],
            asked,
            None if seen.hidden is None else seen.hidden[kept],
            None if seen.top is None else _rows_of(seen.top, kept),
        ),
        said.ids[:fed],
        said.ids[asked + 1],
    )


def _rows_of(top: Top, kept: NDArray[np.int64]) -> Top:
    return Top(top.indices[kept], top.values[kept], top.log_sum_exp[kept])
