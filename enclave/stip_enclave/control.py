"""The control stream: while this enclave holds leases, it lets the key service say at once what ends them.

A host that cuts the stream delays what it would have said to the next heartbeat of each lease (`lease`), and no longer:
nothing here is needed for a revocation to take effect within `heartbeat_tokens`. What comes is believed where it is the
next notice of this stream by the pinned key (`ReleaseClient.watch`); anything else ends the stream.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import aclosing

import structlog

from stip_enclave.accounts import Accounts
from stip_enclave.release import ReleaseClient
from stip_protocol.errors import StipError, Unavailable
from stip_protocol.release import Notice
from stip_protocol.runtime.logs import fault
from stip_protocol.telemetry import CONTROL_STREAM, Telemetry

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0
"""Seconds before a lost stream is opened again: twice as many after each attempt that came to nothing, and of these a
random share ("full jitter"), so that enclaves do not come back together to a key service that was restarted."""
STEADY_SECONDS = 10.0
"""A stream that lasted as long is no attempt that came to nothing."""


class ControlStream:
    """Keeps one stream open while there are leases."""

    def __init__(
        self,
        releases: ReleaseClient,
        accounts: Accounts,
        telemetry: Telemetry,
        *,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """`draw`: a share of the pause, 0 to 1."""
        self._releases, self._accounts, self._draw = releases, accounts, draw
        self._state = telemetry.gauge(CONTROL_STREAM)
        self._log = structlog.get_logger()

    async def run(self) -> None:
        """For ever."""
        pause = FIRST_PAUSE
        while True:
            await self._accounts.holding.wait()
            began = time.monotonic()
            error = await self._follow()
            if error is None:
                self._log.info("control stream ended: no leases are held")
                continue
            if time.monotonic() - began > STEADY_SECONDS:
                pause = FIRST_PAUSE
            seconds = pause * self._draw()
            self._log.warning("control stream lost", code=error.code, detail=error.message, again=round(seconds, 1))
            await asyncio.sleep(seconds)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _follow(self) -> StipError | None:
        """One stream to its end: why it was lost; None where nothing is left to hear about."""
        reading, empty = asyncio.create_task(self._read()), asyncio.create_task(self._accounts.empty.wait())
        try:
            await asyncio.wait((reading, empty), return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                return None
            return Unavailable("the control stream was cancelled") if reading.cancelled() else reading.result()
        finally:
            for task in (reading, empty):
                task.cancel()
            await asyncio.gather(reading, empty, return_exceptions=True)
            self._state.set(0)

    async def _read(self) -> StipError:
        try:
            async with aclosing(self._releases.watch()) as notices:
                async for notice in notices:
                    await self._heed(notice)
        except StipError as error:
            return error
        except Exception as defect:  # noqa: BLE001 - heartbeats go on without the stream, and so must the sessions
            self._log.error("control stream failed", fault=fault(defect))
            return StipError("internal error; see the log of the enclave")
        return Unavailable("the control stream ended")

    async def _heed(self, notice: Notice) -> None:
        if notice.kind == "watching":
            self._state.set(1)
            self._log.info("control stream open")
            # What was revoked since the last stream, or since the lease was released, is heard of now.
            self._accounts.confirm()
        elif notice.kind == "superseded":
            self._log.info("leases superseded", leases=len(notice.handles))
            self._accounts.supersede(notice.handles)
        else:
            ended = await self._accounts.revoke(notice.handles, notice.instance, notice.epoch)
            # A new stream says again what was closed before: there is nothing left to end then.
            log = self._log.warning if ended else self._log.info
            log("leases revoked", leases=ended, instance=notice.instance, epoch=notice.epoch)
