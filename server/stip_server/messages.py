"""Between the wire's messages and the engine's types. Everything that came in is checked here, before it is used."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np

from stip_protocol.errors import MESSAGE_LIMIT, FrameInvalid, RequestInvalid, StipError
from stip_protocol.fields import ACCOUNT_BYTES, ID_BYTES, REQUEST_ID, STOP_IDS, require_handle, require_id_bytes
from stip_protocol.rpc import retry_after_ms
from stip_protocol.tensor import FRAME_LIMIT, row_bytes
from stip_protocol.versions import WIRE_MAJOR, WIRE_MINOR
from stip_protocol.wire import model_pb2 as wire
from stip_server.engine import Card, Form, Generation, Hidden, Ids, Logits, Output, Slice, Top
from stip_server.frames import require_rows

FORMS = {wire.OUTPUT_HIDDEN: Form.HIDDEN, wire.OUTPUT_TOP: Form.TOP, wire.OUTPUT_IDS: Form.IDS}
OUTPUTS = {form: number for number, form in FORMS.items()}
SLICES = 4096
"""Of one frame, at most: as many as any engine has sessions. Each may have to be answered by itself."""
UINT32 = 2**32 - 1
Answer = Output | Ids


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
        max_outputs=card.max_outputs,
    )


def form_of(message: wire.Open) -> Form:
    """The output a session asks for. Raises `RequestInvalid` for what this version reserves."""
    if message.space != wire.SPACE_RESIDUAL:
        raise RequestInvalid.because("space", message.space, "residual")
    if message.mode != wire.MODE_GENERATE:
        raise RequestInvalid.because("mode", message.mode, "generate")
    if message.request_id and not REQUEST_ID.fullmatch(message.request_id):
        raise RequestInvalid.because("request_id", "another form", "32 hexadecimal digits")
    if len(message.account) not in (0, ACCOUNT_BYTES):
        raise RequestInvalid.because("account", f"{len(message.account)} bytes", f"0 or {ACCOUNT_BYTES}")
    form = FORMS.get(message.output)
    if form is None:
        raise RequestInvalid.because("output", message.output, ", ".join(Form))
    return form


def slices_of(message: wire.Feed, link: int, card: Card) -> list[Slice]:
    """The slices of a frame with views on their rows, or on their ids. Raises `FrameInvalid` or `TensorInvalid` for
    the frame as a whole: where its counts do not add up, nothing in it can be told apart."""
    if message.rows and message.ids:
        raise FrameInvalid.because("frame", "rows and ids", "one of them")
    of_ids = bool(message.ids)
    most = FRAME_LIMIT // ID_BYTES if of_ids else card.max_rows
    if len(message.slices) > SLICES:
        raise FrameInvalid.because("slices", len(message.slices), f"1 to {SLICES}")
    total = 0
    for piece in message.slices:
        require_handle(piece.session, "session")
        if piece.count < 1:
            raise FrameInvalid.because("count", piece.count, "at least 1")
        total += piece.count
        if total > most:
            raise FrameInvalid.because("rows of a frame", f"more than {most}", f"1 to {most}")
    if not total:
        raise FrameInvalid.because("slices", "none", "at least 1")
    if not of_ids:
        require_rows(message.rows, total, card)
    else:
        require_id_bytes(message.ids, total, "ids")
    rows = memoryview(message.ids if of_ids else message.rows)
    size, start = ID_BYTES if of_ids else row_bytes(card.dtype, card.width), 0
    slices = []
    for piece in message.slices:
        stop = start + piece.count * size
        session = link, piece.session
        slices.append(Slice(session, piece.position, piece.count, piece.outputs, rows[start:stop], piece.back))
        start = stop
    return slices


def generation_of(message: wire.Generate, card: Card) -> Generation:
    """What a session is asked to decode alone. Raises `RequestInvalid`, which ends the session."""
    if len(message.stop_ids) % ID_BYTES or len(message.stop_ids) > ID_BYTES * STOP_IDS:
        allowed = f"at most {STOP_IDS} ids of {ID_BYTES} bytes"
        raise RequestInvalid.because("stop_ids", f"{len(message.stop_ids)} bytes", allowed)
    stop_ids = frozenset(np.frombuffer(message.stop_ids, "<u4").tolist())
    for name, good, allowed in (
        ("stop_ids", all(one < card.vocabulary for one in stop_ids), f"0 to {card.vocabulary - 1}"),
        ("temperature", math.isfinite(message.temperature) and message.temperature >= 0, "finite, at least 0"),
        ("top_p", 0.0 <= message.top_p <= 1.0, "0 to 1"),
    ):
        if not good:
            raise RequestInvalid.because(name, "another value", allowed)
    return Generation(
        position=message.position,
        max_ids=message.max_ids,
        stop_ids=stop_ids,
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        seed=message.seed,
        step=message.step,
    )


def closed(handle: bytes, error: StipError) -> wire.Down:
    """The end of a session."""
    message = error.message[:MESSAGE_LIMIT]
    return wire.Down(
        closed=wire.Closed(session=handle, code=error.code, message=message, retry_after_ms=retry_after_ms(error))
    )


def fed_frames(answers: Iterable[Answer]) -> Iterator[wire.Down]:
    """Answers of one link as homogeneous frames: one form and one account of compute each."""
    groups: dict[tuple[type, int], list[Answer]] = {}
    for answer in answers:
        form = Ids if isinstance(answer, Ids) else type(answer.out)
        groups.setdefault((form, _microseconds(answer.compute)), []).append(answer)
    for (_, compute), group in groups.items():
        for part in _fitting(group):
            yield wire.Down(fed=_fed(part, compute))


def _fitting(answers: list[Answer]) -> Iterator[list[Answer]]:
    """In parts that a frame holds: each answer does, by the bounds of a frame of rows."""
    part: list[Answer] = []
    size = 0
    for answer in answers:
        more = _bytes(answer)
        if part and size + more > FRAME_LIMIT:
            yield part
            part, size = [], 0
        part.append(answer)
        size += more
    yield part


def _bytes(answer: Answer) -> int:
    """Of tensors."""
    if isinstance(answer, Ids):
        return len(answer.ids)
    out = answer.out
    return len(out.indices) + len(out.values) + len(out.log_sum_exp) if isinstance(out, Top) else len(out.rows)


def _fed(answers: list[Answer], compute: int) -> wire.Fed:
    """One frame of answers of one form."""
    fed = wire.Fed(
        slices=[_slice(answer) for answer in answers],
        compute_us=compute,
        queue_us=_microseconds(max(answer.queue for answer in answers)),
    )
    outs = [answer.out for answer in answers if isinstance(answer, Output)]
    if not outs:
        fed.ids.ids = b"".join(answer.ids for answer in answers if isinstance(answer, Ids))
        return fed
    match outs[0]:
        case Hidden():
            fed.hidden = b"".join(out.rows for out in outs if isinstance(out, Hidden))
        case Logits():
            fed.logits = b"".join(out.rows for out in outs if isinstance(out, Logits))
        case Top(count):
            tops = [out for out in outs if isinstance(out, Top)]
            fed.top.count = count
            fed.top.indices = b"".join(top.indices for top in tops)
            fed.top.values = b"".join(top.values for top in tops)
            fed.top.log_sum_exp = b"".join(top.log_sum_exp for top in tops)
    return fed


def _microseconds(seconds: float) -> int:
    """As far as the field goes: 71 minutes."""
    return min(round(seconds * 1e6), UINT32)


def _slice(answer: Answer) -> wire.Slice:
    count, done = (len(answer.ids) // ID_BYTES, answer.done) if isinstance(answer, Ids) else (answer.count, False)
    return wire.Slice(session=answer.session[1], position=answer.position, count=count, done=done)
