"""Errors across gRPC: a handler's refusal is the caller's exception, with when to try again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stip_protocol import rpc
from stip_protocol.errors import Draining, FrameInvalid, Overloaded, StipError
from stip_protocol.wire import keyservice_pb2, keyservice_pb2_grpc, model_pb2, model_pb2_grpc


class Refusing(model_pb2_grpc.ModelServicer):
    """Refuses whatever is asked with the error of its test, after one reply where it streams."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def Describe(self, request: model_pb2.InstanceRef, context: Any) -> model_pb2.Card:  # noqa: N802
        raise self.error


class Yielding(Refusing):
    async def Link(self, requests: AsyncIterator[model_pb2.Up], context: Any) -> AsyncIterator[model_pb2.Down]:  # noqa: N802
        yield model_pb2.Down(load=7)
        raise self.error


class Writing(Refusing):
    async def Link(self, requests: AsyncIterator[model_pb2.Up], context: Any) -> None:  # type: ignore[override]  # noqa: N802
        await context.write(model_pb2.Down(load=7))
        raise self.error


async def outcome(servicer: Refusing, reported: list[BaseException]) -> tuple[StipError, StipError]:
    """How `Describe` and `Link` end, the latter after its one reply."""
    server = grpc.aio.server(interceptors=[rpc.ErrorInterceptor(reported.append)])
    model_pb2_grpc.add_ModelServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub: Any = model_pb2_grpc.ModelStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as unary:
                await stub.Describe(model_pb2.InstanceRef())
            call = stub.Link()
            assert (await call.read()).load == 7
            with pytest.raises(grpc.aio.AioRpcError) as streamed:
                await call.read()
            return rpc.from_rpc(unary.value), rpc.from_rpc(streamed.value)
    finally:
        await server.stop(0)


@pytest.mark.parametrize("kind", [Yielding, Writing])
async def test_a_refusal_crosses_with_its_code_and_when_to_try_again(kind: type[Refusing]) -> None:
    reported: list[BaseException] = []
    error = Overloaded("links: got 3, allowed: at most 2", retry_after=1.5)
    for came in await outcome(kind(error), reported):
        assert type(came) is Overloaded
        assert (came.message, came.retry_after) == (error.message, 1.5)
    assert reported == [error, error]


@pytest.mark.parametrize("kind", [Yielding, Writing])
async def test_a_refusal_that_does_not_say_when_carries_nothing(kind: type[Refusing]) -> None:
    for came in await outcome(kind(Draining("no new links")), []):
        assert type(came) is Draining
        assert came.retry_after is None


@pytest.mark.parametrize("kind", [Yielding, Writing])
async def test_the_text_of_an_unexpected_failure_stays_in_the_process(kind: type[Refusing]) -> None:
    reported: list[BaseException] = []
    for came in await outcome(kind(ValueError("SENTINEL")), reported):
        assert type(came) is StipError
        assert "SENTINEL" not in str(came)
    assert [type(error) for error in reported] == [ValueError, ValueError]


class YieldingNotices(keyservice_pb2_grpc.KeyServiceServicer):
    """Answers one request with a stream that ends in an error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def Watch(  # noqa: N802 - the name is the wire's
        self, request: keyservice_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[keyservice_pb2.WatchReply]:
        yield keyservice_pb2.WatchReply(notice=b"first")
        raise self.error


class WritingNotices(YieldingNotices):
    async def Watch(self, request: keyservice_pb2.WatchRequest, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        await context.write(keyservice_pb2.WatchReply(notice=b"first"))
        raise self.error


@pytest.mark.parametrize("kind", [YieldingNotices, WritingNotices])
@pytest.mark.parametrize("error", [Overloaded("streams: too many", retry_after=1.5), ValueError("SENTINEL")])
async def test_a_stream_of_replies_ends_with_its_error(kind: type[YieldingNotices], error: Exception) -> None:
    reported: list[BaseException] = []
    server = grpc.aio.server(interceptors=[rpc.ErrorInterceptor(reported.append)])
    keyservice_pb2_grpc.add_KeyServiceServicer_to_server(kind(error), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = keyservice_pb2_grpc.KeyServiceStub(channel)
        call = stub.Watch(keyservice_pb2.WatchRequest())
        assert (await call.read()).notice == b"first"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    await server.stop(0)
    came = rpc.from_rpc(caught.value)
    assert type(came) is (Overloaded if isinstance(error, StipError) else StipError)
    assert "SENTINEL" not in str(came)
    assert reported == [error]


def refused_with(*metadata: tuple[str, str | bytes]) -> StipError:
    error = grpc.aio.AioRpcError(
        grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.aio.Metadata(), grpc.aio.Metadata(*metadata), details="full"
    )
    return rpc.from_rpc(error)


@pytest.mark.parametrize("said", ["", "-1", "soon", "1.5", "٣", "9" * 11])
def test_a_time_that_is_no_number_of_milliseconds_says_nothing(said: str) -> None:
    error = refused_with((rpc.ERROR_CODE_KEY, "overloaded"), (rpc.RETRY_KEY, said))
    assert isinstance(error, Overloaded)
    assert error.retry_after is None


def test_nobody_is_told_to_wait_for_longer_than_an_hour() -> None:
    error = refused_with((rpc.ERROR_CODE_KEY, "overloaded"), (rpc.RETRY_KEY, "9" * 10))
    assert error.retry_after == rpc.RETRY_LIMIT


@given(st.floats(min_value=0.0, max_value=rpc.RETRY_LIMIT))
def test_seconds_survive_the_way_to_the_millisecond_and_are_never_none(seconds: float) -> None:
    error = FrameInvalid("x", retry_after=seconds)
    back = refused_with(*rpc.trailing(error)).retry_after
    assert back is not None
    assert back > 0
    assert abs(back - seconds) <= 0.001


LOOPS = """
import asyncio, sys
sys.modules.update({name: None for name in sys.argv[1:]})
from stip_protocol.runtime import loop
async def main():
    return type(asyncio.get_running_loop()).__module__
print(loop.run(main()))
"""


@pytest.mark.parametrize(("missing", "expected"), [((), "uvloop"), (("uvloop",), "asyncio.unix_events")])
def test_a_part_runs_on_uvloop_and_without_it_on_asyncio(missing: tuple[str, ...], expected: str) -> None:
    done = subprocess.run([sys.executable, "-c", LOOPS, *missing], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
