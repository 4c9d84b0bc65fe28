"""Structured logs: one JSON object a line on stderr, content-free by construction.

An exception is logged as its type and the place it was raised, never by its message: messages of libraries
quote their input. Our own errors carry a code and a message that is written to cross trust boundaries.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import MutableMapping
from types import TracebackType
from typing import Any

import structlog

from stip_protocol.errors import StipError
from stip_protocol.telemetry import Part


def fault(error: BaseException) -> str:
    """What a log may say of an exception: its type and where it was raised; our own errors by their code."""
    if isinstance(error, StipError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"


def _drop_exception_text(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    exc_info = event.pop("exc_info", None)
    if exc_info is True:
        exc_info = sys.exc_info()
    error = exc_info[1] if isinstance(exc_info, tuple) else exc_info
    if isinstance(error, BaseException):
        event["fault"] = fault(error)
    return event


def configure(part: Part, *, simulated: bool, level: str = "info") -> None:
    """Route structlog and the standard library's logging of this process to JSON lines on stderr."""

    def identify(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event["part"] = part
        if simulated:
            event["simulated"] = True
        return event

    def foreign_without_arguments(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        record = event.get("_record")
        if isinstance(record, logging.LogRecord) and not event.get("_from_structlog"):
            event["event"] = f"{record.name} at {record.filename}:{record.lineno}"
        return event

    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        identify,
        _drop_exception_text,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                foreign_without_arguments,
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())

    _silence_other_ways_out()


def _silence_other_ways_out() -> None:
    """Whatever Python would print by itself, with messages, arguments and source lines, becomes a log line."""
    log = structlog.get_logger()

    def uncaught(_: type[BaseException], error: BaseException, __: TracebackType | None) -> None:
        log.error("uncaught", fault=fault(error))

    def uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
        log.error("uncaught in a thread", fault="none" if args.exc_value is None else fault(args.exc_value))

    def unraisable(args: sys.UnraisableHookArgs) -> None:
        log.error("uncaught in a finalizer", fault="none" if args.exc_value is None else fault(args.exc_value))

    sys.excepthook = uncaught
    threading.excepthook = uncaught_in_thread
    sys.unraisablehook = unraisable
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a record that cannot be formatted would be printed with its arguments
