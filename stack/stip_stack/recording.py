"""Records what a model server sees: stands before it as its operator could, and keeps every message of its links.

`python -m stip_stack.recording --config FILE` listens as the server would, with a certificate of the operator's, and
forwards the `Model` service to the server byte by byte, both ways. Each message is on the tape (`stip_stack.tape`)
before it goes on, so that the order on the tape is the order in which one led to the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from pathlib import Path
from typing import Any

import click
import grpc
import grpc.aio

from stip_protocol.errors import ConfigurationError
from stip_protocol.rpc import EPOCH_KEY, INSTANCE_KEY, REPLICA_KEY, channel, server_credentials
from stip_protocol.runtime import logs, loop
from stip_protocol.runtime.config import Address, ConfigPath, Serving, Settings, load
from stip_protocol.runtime.files import read_file
from stip_protocol.runtime.serving import serve
from stip_protocol.telemetry import Telemetry
from stip_protocol.wire import model_pb2
from stip_stack.tape import TapeWriter, Way

_MODEL = model_pb2.DESCRIPTOR.services_by_name["Model"]
DESCRIBE, LINK = (f"/{_MODEL.full_name}/{name}" for name in ("Describe", "Link"))
DESCRIBE_SECONDS = 20.0
PASSED_ON = frozenset({INSTANCE_KEY, EPOCH_KEY, REPLICA_KEY})
"""Metadata that a link has a meaning by."""


class RecorderSettings(Settings):
    """`recorder-….toml`."""

    serving: Serving = Serving()
    server: Address
    """Of the model server."""
    certificate: ConfigPath
    private_key: ConfigPath
    """For both sides: the operator's."""
    ca: ConfigPath
    """PEM of the operator's CA, which gateway and server trust, too."""
    tape: ConfigPath
    simulated: bool = False


class Recorder(grpc.GenericRpcHandler):
    """Forwards the two methods as bytes: nothing that passes is parsed and written anew."""

    def __init__(self, server: grpc.aio.Channel, tape: TapeWriter) -> None:
        self._server: Any = server  # the stubs know messages alone, no bytes
        self._tape = tape
        self._numbers = itertools.count(1)
        self._handlers: dict[str, Any] = {
            DESCRIBE: grpc.unary_unary_rpc_method_handler(self._describe),
            LINK: grpc.stream_stream_rpc_method_handler(self._link),
        }

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return self._handlers.get(handler_call_details.method)

    async def _describe(self, request: bytes, context: Any) -> Any:
        call = self._server.unary_unary(DESCRIBE)(request, timeout=DESCRIBE_SECONDS)
        try:
            return await call
        except grpc.aio.AioRpcError:
            await _end_as(call, context)

    async def _link(self, _: object, context: Any) -> None:
        """One stream. It ends as the server's does."""
        number = next(self._numbers)
        metadata = tuple((key, value) for key, value in context.invocation_metadata() or () if key in PASSED_ON)
        call = self._server.stream_stream(LINK)(metadata=metadata)
        upward = asyncio.create_task(self._upward(number, context, call))
        try:
            with contextlib.suppress(grpc.aio.AioRpcError):  # how it ended is asked for below
                while (message := await call.read()) is not grpc.aio.EOF:
                    self._tape.put(number, Way.DOWN, message)
                    await context.write(message)
            await _end_as(call, context)
        finally:
            # A link that nobody ends keeps its sessions on the server.
            call.cancel()
            upward.cancel()
            await asyncio.gather(upward, return_exceptions=True)

    async def _upward(self, number: int, context: Any, call: Any) -> None:
        # A stream that has ended takes nothing more: why it ended, the other direction tells.
        with contextlib.suppress(grpc.aio.BaseError, asyncio.InvalidStateError):
            while (message := await context.read()) is not grpc.aio.EOF:
                self._tape.put(number, Way.UP, message)
                await call.write(message)
            await call.done_writing()


async def _end_as(call: Any, context: Any) -> None:
    """End our side as the server ended its own, with its code, its words and its metadata."""
    code = await call.code()
    if code is not grpc.StatusCode.OK:
        await context.abort(code, await call.details() or "", tuple(await call.trailing_metadata() or ()))


async def run(settings: RecorderSettings) -> None:
    """Serve until SIGTERM. Raises `ConfigurationError` before it listens."""
    logs.configure("server", simulated=settings.simulated, level=settings.serving.log_level)
    roots = read_file(settings.ca, field="ca")
    certificate = read_file(settings.certificate, field="certificate")
    identity = certificate, read_file(settings.private_key, field="private_key")
    with TapeWriter(settings.tape) as tape:
        async with channel(settings.server, roots=roots, identity=identity) as server:
            recorder = Recorder(server, tape)
            await serve(
                settings.serving,
                Telemetry("server", simulated=settings.simulated),  # which it is, to its peers
                server_credentials(*identity, client_ca=roots),
                lambda made: made.add_generic_rpc_handlers((recorder,)),
                _at_once,
            )


async def _at_once() -> None:
    """Links end with the process: there is no session of its own to wait for."""


@click.command()
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The recorder's TOML.")
def main(config: Path) -> None:
    """Record what a model server sees, while it serves. Shows what an operator can keep; for audits and tests."""
    try:
        loop.run(run(load(RecorderSettings, config)))
    except ConfigurationError as error:
        click.echo(f"stip-stack recorder: {error} ({error.action})", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
