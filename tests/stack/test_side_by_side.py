"""Commands side by side: all run to their end, or the first failure ends them all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from stip_protocol.errors import StipError
from stip_stack.processes import run_side_by_side


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_every_command_runs_also_where_there_are_more_than_run_at_once(tmp_path: Path) -> None:
    names = [f"file-{number}" for number in range(5)]
    ended: list[str] = []
    run_side_by_side(
        {name: python(f"open({str(tmp_path / name)!r}, 'w').close()") for name in names},
        at_once=2,
        ended=lambda name, took: ended.append(name),
    )
    assert sorted(ended) == names
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_failure_is_told_with_its_words_and_stops_what_runs_and_what_waits(tmp_path: Path) -> None:
    ended: list[str] = []
    waits = python("import signal; signal.pause()")  # for ever, unless it is stopped
    with pytest.raises(StipError, match=r"failed \(3\): what was wrong"):
        run_side_by_side(
            {
                "waits": waits,
                "fails": python("import sys; sys.stderr.write('what was wrong'); sys.exit(3)"),
                "waits too": waits,
            },
            at_once=2,
            ended=lambda name, took: ended.append(name),
        )
    assert ended == []
