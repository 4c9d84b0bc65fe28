"""How a part waits: the event loop it runs on.

A message that crosses a part wakes one thread after another, and these wake-ups are most of what it costs; uvloop takes
some of them away (benchmarks/hop.py; the numbers are in docs/decisions/0010-waiting-for-messages.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

new_event_loop: Callable[[], asyncio.AbstractEventLoop]
try:
    from uvloop import new_event_loop
except ImportError:  # there is none for Windows
    new_event_loop = asyncio.new_event_loop

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """What `asyncio.run` does, on uvloop where there is one and on asyncio's own loop elsewhere."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)
