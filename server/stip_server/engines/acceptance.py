"""What a session's next slice or generation must be, whichever engine holds it."""

from __future__ import annotations

from collections.abc import Container

from stip_protocol.errors import FrameInvalid, PositionRefused, RequestInvalid
from stip_server.engine import Card, Form, Generation, Session, Slice


def require_opening(
    session: Session, *, max_positions: int, output: Form, card: Card, opened: Container[Session]
) -> None:
    """Raise `RequestInvalid` or `PositionRefused` for a session that the card does not offer or that is `opened`."""
    if session in opened:
        raise RequestInvalid.because("session", "a handle that is open", "a fresh one")
    if output not in card.forms:
        raise RequestInvalid.because("output", output, ", ".join(card.forms))
    if not 1 <= max_positions <= card.max_positions:
        raise PositionRefused.because("max_positions", max_positions, f"1 to {card.max_positions}")


def require_slice(
    piece: Slice, card: Card, output: Form, *, busy: bool, length: int, spare: int, capacity: int
) -> None:
    """Raise the `RequestInvalid` that ends the session, unless a slice may follow.

    `busy`: an answer is owed; `length`: rows or ids that the session holds, the last `spare` of which may be taken
    back; `capacity`: that it may hold.
    """
    if piece.count < 1:
        raise FrameInvalid.because("count", piece.count, "at least 1")
    most = 0 if output is Form.IDS else min(piece.count, card.max_outputs)
    if piece.outputs > most:
        raise FrameInvalid.because("outputs", piece.outputs, f"0 to {most}")
    if busy:
        raise PositionRefused.because("position", "rows while an answer is owed", "rows once it is there")
    if piece.back > spare:
        raise PositionRefused.because("back", piece.back, f"0 to {spare}")
    if piece.position != length - piece.back:
        raise PositionRefused.because("position", piece.position, length - piece.back)
    if piece.position + piece.count > capacity:
        raise PositionRefused.because("position", piece.position + piece.count - 1, f"below {capacity}")


def require_generation(generation: Generation, output: Form, *, running: bool, length: int, capacity: int) -> None:
    """Raise the `RequestInvalid` that ends the session, unless it may decode alone. Arguments as of `require_slice`."""
    if output is not Form.IDS:
        raise RequestInvalid.because("generate", f"a session of output {output}", Form.IDS)
    if running:
        raise RequestInvalid.because("generate", "a second generation", "one once the first is done")
    if generation.position != length or not length:
        raise PositionRefused.because("position", generation.position, f"{length}, after at least one id")
    if not 1 <= generation.max_ids <= capacity - length:
        raise PositionRefused.because("max_ids", generation.max_ids, f"1 to {capacity - length}")
