"""What a process that is killed leaves behind, tried at every point that reaches the disk."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine


def died(act: Callable[[], object], at: int) -> bool:
    """Run `act` in a child that is killed at the `at`-th point; False where there were fewer of them.

    A point is before and after each rename and removal of a file, and before each commit.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            points = _Points(at)
            os.replace, os.unlink = points.around(os.replace), points.around(os.unlink)
            event.listen(Engine, "commit", lambda _: points.reached())
            act()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "it ended by itself, and not well"
    return os.WIFSIGNALED(status)


class _Points:
    def __init__(self, at: int) -> None:
        self._left = at

    def reached(self) -> None:
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= 1

    def around(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def acting(*arguments: Any, **options: Any) -> Any:
            self.reached()
            result = act(*arguments, **options)
            self.reached()
            return result

        return acting
