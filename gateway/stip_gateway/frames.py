"""What a frame must look like before anything is counted or handed on: counts, sizes and bounds, from the card alone.

No tensor is looked into. Where a frame carries a slice that is not handed on, its bytes are cut at the borders of the
slices.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from stip_protocol.errors import FrameInvalid
from stip_protocol.fields import ID_BYTES, STOP_IDS, require_id_bytes
from stip_protocol.tensor import FRAME_LIMIT, require_rows, row_bytes, rows_per_frame
from stip_protocol.wire import model_pb2


@dataclass(frozen=True)
class Shape:
    """The sizes that hold for all frames of one link."""

    dtype: str
    width: int
    max_positions: int
    max_rows: int
    """Of one frame."""
    max_outputs: int
    slices: int
    """Of one frame, in either direction."""

    @classmethod
    def of(cls, card: model_pb2.Card, slices: int) -> Shape:
        """A replica that does not know `max_outputs` answers one a slice; one that does not say `max_rows` takes as
        many as a frame holds."""
        rows = card.max_rows or rows_per_frame(card.dtype, card.width)
        return cls(card.dtype, card.width, card.max_positions, rows, max(1, card.max_outputs), slices)

    def require_feed(self, feed: model_pb2.Feed) -> int:
        """Bytes a row or an id of a well-formed frame. Raises `FrameInvalid` or `TensorInvalid`.

        What a replica would end the link for is refused here: a replica that ends links looks lost to its neighbours.
        """
        self._require_slices("Feed.slices", feed.slices)
        if feed.rows and feed.ids:
            raise FrameInvalid.because("Feed", "rows and ids", "one of the two")
        of_ids = bool(feed.ids)
        most = FRAME_LIMIT // ID_BYTES if of_ids else self.max_rows
        total = sum(part.count for part in feed.slices)
        if total > most:
            raise FrameInvalid.because("Feed ids" if of_ids else "Feed rows", total, f"at most {most}")
        if of_ids:
            require_id_bytes(feed.ids, total, "Feed.ids")
        else:
            require_rows(feed.rows, total, self.dtype, self.width, what="Feed.rows")
        return ID_BYTES if of_ids else row_bytes(self.dtype, self.width)

    def require_slice(self, part: model_pb2.Slice) -> None:
        """Raises `FrameInvalid` for what concerns one session alone."""
        most = min(part.count, self.max_outputs)
        for field, got, least, limit in (
            ("Slice.count", part.count, 1, self.max_positions),
            ("Slice.outputs", part.outputs, 0, most),
            ("Slice.back", part.back, 0, self.max_positions),
        ):
            if not least <= got <= limit:
                raise FrameInvalid.because(field, got, f"{least} to {limit}")

    def require_generate(self, generate: model_pb2.Generate) -> None:
        """Raises `FrameInvalid` for what concerns one session alone."""
        if not 1 <= generate.max_ids <= self.max_positions:
            raise FrameInvalid.because("Generate.max_ids", generate.max_ids, f"1 to {self.max_positions}")
        if len(generate.stop_ids) > STOP_IDS * ID_BYTES or len(generate.stop_ids) % ID_BYTES:
            got = f"{len(generate.stop_ids)} bytes"
            raise FrameInvalid.because("Generate.stop_ids", got, f"{ID_BYTES} each, at most {STOP_IDS}")

    def require_fed(self, fed: model_pb2.Fed) -> None:
        """Raises `FrameInvalid` or `TensorInvalid` for a reply whose counts nobody can have asked for."""
        self._require_slices("Fed.slices", fed.slices)
        if fed.HasField("ids"):
            require_id_bytes(fed.ids.ids, sum(part.count for part in fed.slices), "Fed.ids")
            return
        for part in fed.slices:
            if not 1 <= part.count <= self.max_outputs:
                raise FrameInvalid.because("reply Slice.count", part.count, f"1 to {self.max_outputs}")

    def _require_slices(self, what: str, slices: Collection[model_pb2.Slice]) -> None:
        if not 0 < len(slices) <= self.slices:
            raise FrameInvalid.because(what, len(slices), f"1 to {self.slices}")


def cut(data: bytes, item: int, slices: Iterable[model_pb2.Slice], kept: dict[int, int]) -> bytes:
    """What is left of `data`, `item` bytes a count: of slice i the first `kept[i]`, of one not in there nothing."""
    pieces, start = [], 0
    for number, part in enumerate(slices):
        pieces.append(data[start : start + kept.get(number, 0) * item])
        start += part.count * item
    return b"".join(pieces)
