"""Where the time of a process goes: what its threads are at, looked at a hundred times a second.

The innermost line of the project that each thread stands in is sorted by a table into activities. Threads that stand
in none of its lines are idle and not counted.
"""

from __future__ import annotations

import linecache
import re
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from types import FrameType

INTERVAL = 0.01
PROJECT = re.compile(r"stip_(keyservice|protocol)")
ACTIVITIES = (
    ("checkpoint.py", r"preadv", "reading"),
    ("folding.py", r"\.double\(\)", "converting to float64"),
    ("application.py", r"addmm_", "products"),
    ("application.py", r"np\.take|np\.arange|np\.where|moved|rows \*", "moving rows and columns"),
    ("application.py", r"", "scaling and adding"),
    ("folding.py", r"isfinite|rows\.to\(", "rounding and checking"),
    ("folding.py", r"torch\.full", "constants"),
    ("folding.py", r"", "scaling and adding"),
    ("writer.py", r"_hash\.update", "hashing"),
    ("writer.py", r"_file\.write", "writing"),
    ("writer.py", r"fsync", "syncing"),
    ("sealed.py", r"", "sealing"),
    ("pipeline.py", r"result\(\)", "waiting"),
    ("spans.py", r"result\(\)|_lock", "waiting"),
    ("writer.py", r"result\(\)|islice|shutdown", "waiting"),
    ("draw.py", r"", "drawing keys"),
    ("stream.py", r"", "drawing keys"),
)
"""(file, pattern in the source line, activity): the first that fits."""


class Sampler:
    """Samples from `start` to `stop`; then `seconds` has the thread-seconds of each activity."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> dict[str, float]:
        """Thread-seconds by activity, the largest first."""
        self._ended.set()
        self._thread.join()
        return {what: round(seconds, 2) for what, seconds in sorted(self.seconds.items(), key=lambda each: -each[1])}

    def _run(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(INTERVAL):
            now = time.monotonic()
            for thread, frame in sys._current_frames().items():
                if thread != threading.get_ident() and (what := _activity(frame)):
                    self.seconds[what] += now - last
            last = now


def _activity(frame: FrameType | None) -> str | None:
    while frame and not PROJECT.search(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return None
    path = frame.f_code.co_filename
    name, line = Path(path).name, linecache.getline(path, frame.f_lineno or 0)
    found = (what for file, pattern, what in ACTIVITIES if file == name and re.search(pattern, line))
    return next(found, "other")
