"""The end: every part leaves when it is told to. Last in its group, because it stops the stack."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from tests.e2e.conftest import System


def test_every_part_exits_0_and_no_process_is_left(refusing: System) -> None:
    stack = refusing.stack
    assert all(process.running for process in stack.processes.values())
    assert set(stack.stop().values()) == {0}
    work = str(stack.workspace.path)
    left = [
        process.info["pid"]
        for process in psutil.process_iter(["pid", "cmdline"])
        if any(work in word for word in process.info["cmdline"] or ())
    ]
    assert left == []
    for name in stack.processes:
        assert json.loads(refusing.log(name).splitlines()[-1])["event"] == "stopped", name
