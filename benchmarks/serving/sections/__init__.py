"""One module a section: a plan of cells for each scale, and how to run them. `SECTIONS` is their table."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from benchmarks.serving.bench import Bench, Draft
from benchmarks.serving.sections import curves, delay, drafting, memory, prefill, throughput, tokens

Section = Callable[[Bench, Draft], Coroutine[Any, Any, None]]

SECTIONS: Mapping[str, Section] = {
    "tokens": tokens.run,
    "prefill": prefill.run,
    "throughput": throughput.run,
    "delay": delay.run,
    "drafting": drafting.run,
    "memory": memory.run,
    "curves": curves.run,
}
"""In the order in which they run and stand in the report."""
