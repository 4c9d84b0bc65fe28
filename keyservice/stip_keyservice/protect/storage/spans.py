"""Spans of a checkpoint that several row blocks gather from: read once, kept while they are in use."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

import torch

SPAN_BYTES = 256 << 20
"""Bytes of spans kept. A larger one is kept alone."""

Span = tuple[str, int, int]
"""(stored name, first row, row after the last)."""


class SpanCache:
    """The spans asked for last: `limit` bytes of them, or one. Safe to use from several threads."""

    def __init__(self, limit: int = SPAN_BYTES) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._spans: OrderedDict[Span, tuple[int, Future[torch.Tensor]]] = OrderedDict()

    def get(self, span: Span, nbytes: int, read: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The rows of `span`, `nbytes` of them: from memory, from the thread that reads them now, or by `read`.

        What `read` raises reaches every thread that waits for it, and is not kept.
        """
        with self._lock:
            if waiting := span in self._spans:
                self._spans.move_to_end(span)
            else:
                self._make_room(nbytes)
                self._spans[span] = nbytes, Future()
            future = self._spans[span][1]
        if not waiting:
            try:
                future.set_result(read())
            except BaseException as error:  # noqa: BLE001 - handed on to every thread that waits
                with self._lock:
                    self._spans.pop(span, None)
                future.set_exception(error)
        return future.result()

    def clear(self) -> None:
        """Keep none. Who waits for one gets it still."""
        with self._lock:
            self._spans.clear()

    def _make_room(self, nbytes: int) -> None:
        """Let go of the spans used least lately, before another is read."""
        while self._spans and nbytes + sum(kept for kept, _ in self._spans.values()) > self._limit:
            self._spans.popitem(last=False)
