"""Targets that read frames as the handlers of enclave, gateway and server first do, after gRPC has cut the stream.

An input is a series of messages, each behind its length in two bytes (little-endian). Bytes that protobuf refuses are
gRPC's business: it answers before a handler of ours is called.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cache
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from fuzz import material
from fuzz.documents import B32, good_lease
from fuzz.target import Broken, Target
from stip_enclave import replies
from stip_enclave.config import Limits as EnclaveLimits
from stip_enclave.turns import TurnRequest
from stip_gateway.admission import Admission
from stip_gateway.link import LinkSessions
from stip_protocol.manifest import FileDigest, Manifest
from stip_protocol.wire import enclave_pb2, model_pb2
from stip_server import messages
from stip_server.engine import Card, Form
from stip_server.frames import require_ids

M = TypeVar("M", bound=Message)
WIDTH, VOCABULARY = 8, 128
HANDLE = bytes(range(16))
MESSAGES = 64
"""Of one input."""


def _cut(data: bytes, kind: type[M]) -> Iterator[M]:
    at = 0
    for _ in range(MESSAGES):
        if at + 2 > len(data):
            return
        (size,) = struct.unpack_from("<H", data, at)
        piece, at = data[at + 2 : at + 2 + size], at + 2 + size
        try:
            yield kind.FromString(piece)
        except DecodeError:
            return


def _joined(*frames: Message) -> bytes:
    return b"".join(struct.pack("<H", len(frame.SerializeToString())) + frame.SerializeToString() for frame in frames)


def _card() -> model_pb2.Card:
    return model_pb2.Card(
        version=1, instance=material.INSTANCE, epoch=0, manifest_digest=B32, preset="paper", dtype="float32",
        width=WIDTH, vocabulary=VOCABULARY, max_positions=64, max_sessions=4, max_outputs=4,
    )  # fmt: skip


def _opening(output: model_pb2.Output.ValueType = model_pb2.OUTPUT_TOP) -> model_pb2.Open:
    return model_pb2.Open(
        session=HANDLE,
        lease=good_lease(),
        output=output,
        max_positions=16,
        request_id="ab" * 16,
    )


def _ups() -> list[bytes]:
    part = model_pb2.Slice(session=HANDLE, position=0, count=2, outputs=1)
    fed = model_pb2.Feed(slices=[part], rows=bytes(2 * WIDTH * 4))
    opening = model_pb2.Up(open=_opening())
    return [
        _joined(opening, model_pb2.Up(feed=fed), model_pb2.Up(close=model_pb2.Close(session=HANDLE))),
        _joined(
            model_pb2.Up(open=_opening(model_pb2.OUTPUT_IDS)),
            model_pb2.Up(feed=model_pb2.Feed(slices=[part], ids=bytes(8))),
            model_pb2.Up(generate=model_pb2.Generate(session=HANDLE, max_ids=4, stop_ids=bytes(4))),
            model_pb2.Up(halt=model_pb2.Halt(session=HANDLE)),
        ),
        _joined(opening, model_pb2.Up(renew=model_pb2.Renew(lease=good_lease(serial=2, tokens=8192)))),
        _joined(opening, model_pb2.Up(recall=model_pb2.Recall(session=HANDLE, position=1))),
    ]


def _downs() -> list[bytes]:
    part = model_pb2.Slice(session=HANDLE, position=0, count=1, outputs=1)
    top = model_pb2.Top(count=64, values=bytes(64 * 4), indices=struct.pack("<64I", *range(64)), log_sum_exp=bytes(4))
    return [
        _joined(model_pb2.Down(opened=model_pb2.Opened(session=HANDLE))),
        _joined(model_pb2.Down(fed=model_pb2.Fed(slices=[part], hidden=bytes(WIDTH * 4)))),
        _joined(model_pb2.Down(fed=model_pb2.Fed(slices=[part], top=top))),
        _joined(model_pb2.Down(fed=model_pb2.Fed(slices=[part], logits=bytes(VOCABULARY * 4)))),
        _joined(model_pb2.Down(fed=model_pb2.Fed(slices=[part], ids=model_pb2.Ids(ids=bytes(4))))),
        _joined(model_pb2.Down(closed=model_pb2.Closed(session=HANDLE, code="overloaded"))),
    ]


def _sessions() -> LinkSessions:
    admission = Admission(
        key=material.SIGNING.public_key(), audience="gateway.stip", limit=16, clock=lambda: material.NOW
    )
    return LinkSessions(_card(), admission, link_key=B32, sessions=4, slices=8, retry_after=1.0)


def _gateway_up(data: bytes) -> None:
    """What an enclave sends, on a fresh link: no more is handed on than came, and never a lease."""
    link = _sessions()
    for message in _cut(data, model_pb2.Up):
        came = message.ByteSize()
        passed = link.up(message)
        if sum(one.ByteSize() for one in passed.up) > came + 64:
            raise Broken("the gateway hands on more than came")
        if any(one.HasField("open") and one.open.lease for one in passed.up):
            raise Broken("the gateway hands a lease on to a server")
        if link.sessions > 4:
            raise Broken(f"{link.sessions} sessions open, allowed: 4")


def _gateway_down(data: bytes) -> None:
    """What a replica sends, on a link with one session that decodes alone."""
    link = _sessions()
    link.up(model_pb2.Up(open=_opening(model_pb2.OUTPUT_IDS)))
    for message in _cut(data, model_pb2.Down):
        link.down(message)


@cache
def _served() -> Card:
    forms = tuple(Form)
    return Card(instance=material.INSTANCE, epoch=0, manifest_digest=B32, preset="paper", dtype="float32", width=WIDTH,
                vocabulary=VOCABULARY, max_positions=64, max_sessions=4, forms=forms, max_outputs=4)  # fmt: skip


def _server_up(data: bytes) -> None:
    """What a gateway hands on, read by the model server before its engine sees it."""
    card = _served()
    for message in _cut(data, model_pb2.Up):
        kind = message.WhichOneof("body")
        if kind == "open":
            messages.form_of(message.open)
        elif kind == "generate":
            messages.generation_of(message.generate, card)
        elif kind == "feed":
            for piece in messages.slices_of(message.feed, 1, card):
                if message.feed.ids:
                    require_ids(message.feed.ids, sum(part.count for part in message.feed.slices), card)
                if piece.count > card.max_positions:
                    raise Broken(f"a slice of {piece.count} rows was accepted, allowed: {card.max_positions}")


@cache
def _manifest() -> Manifest:
    digest = FileDigest(sha256="ab" * 32, size=4)
    return Manifest(instance=material.INSTANCE, epoch=0, preset="paper", dtype="float32", width=WIDTH,
                    vocabulary=VOCABULARY, max_positions=64, output="top", server={"a": digest}, enclave={"b": digest},
                    certificate={})  # fmt: skip


def _enclave_down(data: bytes) -> None:
    """What a replica answers, read by the enclave that asked for as many rows as the slices say, at most 64."""
    for message in _cut(data, model_pb2.Down):
        if message.WhichOneof("body") != "fed":
            continue
        rows = min(sum(part.count for part in message.fed.slices), 64)
        if message.fed.HasField("ids"):
            replies.read_ids(message.fed.ids.ids, rows)
        else:
            replies.read_outputs(message.fed, rows, _manifest())


def _client_turn(data: bytes) -> None:
    """What a client sends: a turn, as the enclave reads it."""
    limits = EnclaveLimits()
    for message in _cut(data, enclave_pb2.ClientFrame):
        if message.WhichOneof("body") == "turn":
            read = TurnRequest.read(message.turn, limits)
            if len(read.ids) > limits.ids_per_turn:
                raise Broken("more ids than a turn may have")


def _turns() -> list[bytes]:
    sampling = enclave_pb2.Sampling(temperature=0.7, top_k=5, top_p=0.9, seed=3, stop_ids=bytes(8), max_tokens=4)
    turn = enclave_pb2.Turn(ids=bytes(16), sampling=sampling)
    return [_joined(enclave_pb2.ClientFrame(turn=turn))]


TARGETS = (
    Target("gateway-frames-up", _gateway_up, _ups),
    Target("gateway-frames-down", _gateway_down, _downs),
    Target("server-frames", _server_up, _ups),
    Target("enclave-replies", _enclave_down, _downs),
    Target("enclave-turns", _client_turn, _turns),
)
