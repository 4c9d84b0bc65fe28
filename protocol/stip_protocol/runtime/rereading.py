"""SIGHUP: a running part reads one table of its configuration file again, and nothing else of it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from stip_protocol.errors import ConfigurationError, StipError
from stip_protocol.runtime.config import Settings
from stip_protocol.runtime.logs import fault

S = TypeVar("S", bound=Settings)


async def on_hangup(current: S, reread: Callable[[], S], table: str, apply: Callable[[S], Awaitable[None]]) -> None:
    """For ever: on each SIGHUP, hand what `reread` gives to `apply`, where nothing but `table` has changed.

    What is refused, and whatever `reread` and `apply` raise, is logged, and the part goes on with what it had. To be
    started before the part announces itself: a process without a handler ends with the signal.
    """
    hangup, log = asyncio.Event(), structlog.get_logger()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hangup.set)
    while True:
        await hangup.wait()
        hangup.clear()
        try:
            wanted = await asyncio.to_thread(reread)
            require_only(table, current, wanted)
            await apply(wanted)
        except StipError as error:
            log.error("configuration not taken", table=table, code=error.code, detail=error.message)
        except Exception as defect:  # noqa: BLE001 - nothing in a file may end a part that serves
            log.error("configuration not taken", table=table, code="internal", fault=fault(defect))
        else:
            current = wanted
            log.info("configuration taken", table=table)


def require_only(table: str, current: Settings, wanted: Settings) -> None:
    """Raise `ConfigurationError` where anything but `table` differs: it takes a new process."""
    fields = type(current).model_fields
    changed = [name for name in fields if name != table and getattr(current, name) != getattr(wanted, name)]
    if changed:
        raise ConfigurationError.because("configuration", f"a change of {', '.join(changed)}", f"a change of {table}")
