"""Between the wire's messages and the engine's types. Everything that came in is checked here, before it is used."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice

from stip_protocol.errors import MESSAGE_LIMIT, FrameInvalid, RequestInvalid, StipError
from stip_protocol.tensor import row_bytes
from stip_protocol.versions import WIRE_MAJOR, WIRE_MINOR
from stip_protocol.wire import model_pb2 as wire
from stip_server.engine import Card, Form, Hidden, Logits, Output, Slice, Top
from stip_server.frames import require_rows

HANDLE_BYTES = 16
REQUEST_ID = re.compile(r"[0-9a-f]{32}")
FORMS = {wire.OUTPUT_HIDDEN: Form.HIDDEN, wire.OUTPUT_TOP: Form.TOP}
OUTPUTS = {form: number for number, form in FORMS.items()}


def card_message(card: Card, replica: str) -> wire.Card:
    """The card as the wire says it."""
    return wire.Card(
        version=WIRE_MAJOR,
        wire_minor=WIRE_MINOR,
        instance=card.instance,
        epoch=card.epoch,
        manifest_digest=card.manifest_digest,
        preset=card.preset,
        dtype=card.dtype,
        width=card.width,
        vocabulary=card.vocabulary,
        max_positions=card.max_positions,
        max_sessions=card.max_sessions,
        max_rows=card.max_rows,
        outputs=[OUTPUTS[form] for form in card.forms],
        replicas=[replica],
    )


def require_handle(handle: bytes) -> bytes:
    """A session's handle. Raises `FrameInvalid`: without one there is no session that could be closed."""
    if len(handle) != HANDLE_BYTES:
        raise FrameInvalid.because("session", f"{len(handle)} bytes", HANDLE_BYTES)
    return handle


def form_of(message: wire.Open) -> Form:
    """The output a session asks for. Raises `RequestInvalid` for what this version reserves."""
    if message.space != wire.SPACE_RESIDUAL:
        raise RequestInvalid.because("space", message.space, "residual")
    if message.mode != wire.MODE_GENERATE:
        raise RequestInvalid.because("mode", message.mode, "generate")
    if message.request_id and not REQUEST_ID.fullmatch(message.request_id):
        raise RequestInvalid.because("request_id", "another form", "32 hexadecimal digits")
    form = FORMS.get(message.output)
    if form is None:
        raise RequestInvalid.because("output", message.output, ", ".join(Form))
    return form


def slices_of(message: wire.Feed, link: int, card: Card) -> list[Slice]:
    """The slices of a frame with views on their rows. Raises `FrameInvalid` or `TensorInvalid` for the frame as a
    whole: where its counts do not add up, nothing in it can be told apart."""
    total = 0
    for piece in message.slices:
        require_handle(piece.session)
        if piece.count < 1:
            raise FrameInvalid.because("count", piece.count, "at least 1")
        total += piece.count
        if total > card.max_rows:
            raise FrameInvalid.because("rows of a frame", f"more than {card.max_rows}", f"1 to {card.max_rows}")
    if not total:
        raise FrameInvalid.because("slices", "none", "at least 1")
    require_rows(message.rows, total, card)
    rows, size, start = memoryview(message.rows), row_bytes(card.dtype, card.width), 0
    slices = []
    for piece in message.slices:
        stop = start + piece.count * size
        slices.append(Slice((link, piece.session), piece.position, piece.count, piece.last, rows[start:stop]))
        start = stop
    return slices


def closed(handle: bytes, error: StipError) -> wire.Down:
    """The end of a session."""
    return wire.Down(closed=wire.Closed(session=handle, code=error.code, message=error.message[:MESSAGE_LIMIT]))


def fed_frames(outputs: Iterable[Output], card: Card) -> Iterator[wire.Down]:
    """Outputs of one link as homogeneous frames: one form and one account of compute each."""
    groups: dict[tuple[type, int], list[Output]] = {}
    for output in outputs:
        groups.setdefault((type(output.out), round(output.compute * 1e6)), []).append(output)
    for (form, compute), group in groups.items():
        limit = 1 if form is Logits else card.max_rows
        pieces = iter(group)
        while part := list(islice(pieces, limit)):
            yield wire.Down(fed=_fed(part, compute))


def _fed(outputs: list[Output], compute: int) -> wire.Fed:
    fed = wire.Fed(
        slices=[wire.Slice(session=o.session[1], position=o.position, count=1) for o in outputs],
        compute_us=compute,
        queue_us=round(max(o.queue for o in outputs) * 1e6),
    )
    match outputs[0].out:
        case Hidden():
            fed.hidden = b"".join(o.out.row for o in outputs if isinstance(o.out, Hidden))
        case Logits(row):
            fed.logits = row
        case Top(count):
            tops = [o.out for o in outputs if isinstance(o.out, Top)]
            fed.top.count = count
            fed.top.indices = b"".join(top.indices for top in tops)
            fed.top.values = b"".join(top.values for top in tops)
            fed.top.log_sum_exp = b"".join(top.log_sum_exp for top in tops)
    return fed
