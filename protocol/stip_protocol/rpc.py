"""gRPC between the parts: limits, credentials, and errors that stay themselves across a process boundary."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from stip_protocol.errors import MESSAGE_LIMIT, DeadlineExceeded, StipError, Unavailable, from_code
from stip_protocol.tensor import FRAME_LIMIT

MESSAGE_BYTES = FRAME_LIMIT + (1 << 17)
"""The largest gRPC message: one full frame of tensors and its envelope."""
ERROR_CODE_KEY = "stip-error-code"
REQUEST_ID_KEY = "stip-request-id"
INSTANCE_KEY = "stip-instance"
EPOCH_KEY = "stip-epoch"
REPLICA_KEY = "stip-replica"
RETRY_KEY = "grpc-retry-pushback-ms"
"""Milliseconds after which trying again may help: the name and form of gRFC A6 ("pushback")."""
RETRY_LIMIT = 3600.0
"""Seconds: what a peer asks beyond this is taken for this."""

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.enable_http_proxy", 0),
    # A peer that came back is to be found within seconds; gRPC's own limit is two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]
SERVER_OPTIONS: list[tuple[str, int]] = [
    *CHANNEL_OPTIONS,
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.max_concurrent_streams", 1024),
]


def server_credentials(certificate: bytes, private_key: bytes, *, client_ca: bytes | None) -> grpc.ServerCredentials:
    """TLS for a server (PEM). With `client_ca`, clients must present a certificate under it (mTLS)."""
    return grpc.ssl_server_credentials(
        [(private_key, certificate)], root_certificates=client_ca, require_client_auth=client_ca is not None
    )


def channel(
    address: str,
    *,
    roots: bytes,
    identity: tuple[bytes, bytes] | None = None,
    server_name: str | None = None,
) -> grpc.aio.Channel:
    """A TLS channel that trusts `roots` (PEM) alone, with an optional client (certificate, key) in PEM.

    `server_name` is the name the certificate must carry where it is not the host of `address`.
    """
    certificate, key = identity or (None, None)
    credentials = grpc.ssl_channel_credentials(roots, private_key=key, certificate_chain=certificate)
    options: list[tuple[str, Any]] = list(CHANNEL_OPTIONS)
    if server_name is not None:
        options.append(("grpc.ssl_target_name_override", server_name))
    return grpc.aio.secure_channel(address, credentials, options=options)


def retry_after_ms(error: StipError) -> int:
    """`error.retry_after` as messages carry it: whole milliseconds, at least 1; 0 where it is not said."""
    return 0 if error.retry_after is None else max(1, round(error.retry_after * 1000))


def retry_after(milliseconds: int) -> float | None:
    """`StipError.retry_after` of what a message carries, bounded; None where it is not said."""
    return min(milliseconds / 1000, RETRY_LIMIT) or None


def trailing(error: StipError) -> tuple[tuple[str, str], ...]:
    """Trailing metadata that carries the stable code and, where it is known, when to try again."""
    code = (ERROR_CODE_KEY, error.code)
    return (code,) if error.retry_after is None else (code, (RETRY_KEY, str(retry_after_ms(error))))


def from_rpc(error: grpc.aio.AioRpcError) -> StipError:
    """The error a peer raised, or what the transport's failure means."""
    metadata = {key: _text(value) for key, value in error.trailing_metadata() or ()}
    code = metadata.get(ERROR_CODE_KEY)
    details = (error.details() or "")[:MESSAGE_LIMIT]
    if code is not None:
        return from_code(code, details, _pushback(metadata.get(RETRY_KEY, "")))
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded("the peer did not answer in time")
    return Unavailable(f"the peer cannot be reached or broke off ({error.code().name.lower()})")


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _pushback(milliseconds: str) -> float | None:
    """Seconds. What is no number of milliseconds says nothing: gRFC A6 has it that one should not try again then."""
    if not (milliseconds.isascii() and milliseconds.isdigit() and 0 < len(milliseconds) <= 10):
        return None
    return min(int(milliseconds) / 1000, RETRY_LIMIT)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns a `StipError` raised in a handler into a status with its code.

    Anything else becomes a bare INTERNAL: the text of an unexpected exception stays in the process, and
    `report` gets the exception to count and log it. A streaming handler yields its replies, or reads and writes
    through its context: the latter costs one task and one queue less a message.
    """

    def __init__(self, report: Callable[[BaseException], None]) -> None:
        self._report = report

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                self._awaited(handler.unary_unary), handler.request_deserializer, handler.response_serializer
            )
        for behaviour, made in (
            (handler.unary_stream, grpc.unary_stream_rpc_method_handler),
            (handler.stream_stream, grpc.stream_stream_rpc_method_handler),
        ):
            if behaviour is not None:
                wrap = self._yielding if inspect.isasyncgenfunction(behaviour) else self._awaited
                return made(wrap(behaviour), handler.request_deserializer, handler.response_serializer)
        return handler

    def _awaited(self, behaviour: Any) -> Any:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                result = behaviour(request, context)
                return await result if inspect.isawaitable(result) else result
            except StipError as error:
                await self._abort(context, error)
            except Exception as error:  # noqa: BLE001 - the boundary: nothing may cross it as text
                await self._abort(context, self._unexpected(error))

        return call

    def _yielding(self, behaviour: Any) -> Any:
        async def call(asked: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            try:
                async for reply in behaviour(asked, context):
                    yield reply
            except StipError as error:
                await self._abort(context, error)
            except Exception as error:  # noqa: BLE001 - the boundary: nothing may cross it as text
                await self._abort(context, self._unexpected(error))

        return call

    async def _abort(self, context: grpc.aio.ServicerContext[Any, Any], error: StipError) -> None:
        if type(error) is not StipError:
            self._report(error)
        await context.abort(grpc.StatusCode[error.grpc_status], error.message[:MESSAGE_LIMIT], trailing(error))

    def _unexpected(self, error: Exception) -> StipError:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        self._report(error)
        return StipError("internal error; see the log of this part")
