"""What stands on a tape: rows and answers, position by position, after everything that was taken back."""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stip_enclave.tables import NUMPY_DTYPE
from stip_keyservice.audit.view import Seen
from stip_protocol.errors import ConfigurationError, FrameInvalid
from stip_protocol.manifest import Manifest
from stip_protocol.wire import model_pb2 as wire
from stip_stack.stack import Stack
from stip_stack.tape import MAGIC, Heard, TapeWriter, Way, entries, heard

WIDTH = 3
ONE, OTHER = b"1" * 16, b"2" * 16
REQUEST = "ab" * 16


def manifest(output: str, dtype: str = "float32") -> Manifest:
    presets = {"hidden": "hardened", "top": "paper", "ids": "throughput"}
    return Manifest.model_validate(
        {
            "instance": "0" * 32, "epoch": 0, "preset": presets[output], "dtype": dtype, "width": WIDTH,
            "vocabulary": 100, "max_positions": 64, "output": output, "server": {}, "enclave": {}, "certificate": {},
        }
    )  # fmt: skip


def rows(*values: float, dtype: Any = np.float32) -> bytes:
    """One row a value: that value, its double and its triple."""
    return np.array([[value, 2 * value, 3 * value] for value in values], dtype).tobytes()


def ids(*values: int) -> bytes:
    return np.array(values, "<u4").tobytes()


def piece(position: int, count: int, session: bytes = ONE, **more: Any) -> wire.Slice:
    return wire.Slice(session=session, position=position, count=count, **more)


def opening(session: bytes = ONE, request_id: str = REQUEST) -> wire.Up:
    return wire.Up(open=wire.Open(session=session, request_id=request_id))


def feed(position: int, *values: float, session: bytes = ONE, **more: Any) -> wire.Up:
    return wire.Up(feed=wire.Feed(slices=[piece(position, len(values), session, **more)], rows=rows(*values)))


def feed_ids(position: int, *values: int, **more: Any) -> wire.Up:
    return wire.Up(feed=wire.Feed(slices=[piece(position, len(values), **more)], ids=ids(*values)))


def hidden(position: int, *values: float, session: bytes = ONE) -> wire.Down:
    return wire.Down(fed=wire.Fed(slices=[piece(position, len(values), session)], hidden=rows(*values)))


def decoded(position: int, *values: int, done: bool = True) -> wire.Down:
    slices = [piece(position, len(values), done=done)]
    return wire.Down(fed=wire.Fed(slices=slices, ids=wire.Ids(ids=ids(*values))))


def top(position: int, indices: list[int], values: list[float], log_sum_exp: float) -> wire.Down:
    return wire.Down(
        fed=wire.Fed(
            slices=[piece(position, 1)],
            top=wire.Top(
                count=len(indices),
                indices=ids(*indices),
                values=np.array(values, np.float32).tobytes(),
                log_sum_exp=np.array([log_sum_exp], "<f4").tobytes(),
            ),
        )
    )


@dataclass
class Taped:
    """A tape that messages are put on."""

    path: Path
    writers: dict[str, TapeWriter] = field(default_factory=dict)

    def put(self, *messages: wire.Up | wire.Down, link: int = 1, tape: str = "tape") -> Taped:
        writer = self.writers.setdefault(tape, TapeWriter(self.path / tape))
        for message in messages:
            way = Way.UP if isinstance(message, wire.Up) else Way.DOWN
            writer.put(link, way, message.SerializeToString())
        return self

    def heard(self, output: str = "hidden", dtype: str = "float32") -> list[Heard]:
        return heard([self.path / name for name in self.writers], manifest(output, dtype))

    def seen(self, output: str = "hidden") -> Seen:
        (only,) = self.heard(output)
        return only.seen


@pytest.fixture
def taped(tmp_path: Path) -> Taped:
    return Taped(tmp_path)


def firsts(array: Any) -> list[float]:
    """What each row was made from."""
    return [] if array is None else [float(row[0]) for row in array]


def test_rows_and_answers_stand_at_their_positions(taped: Taped) -> None:
    taped.put(
        opening(), feed(0, 5, 6), feed(2, 7, outputs=1), hidden(2, 70), feed(3, 8, outputs=1), hidden(3, 80)
    )  # fmt: skip
    (only,) = taped.heard()
    assert only.request_id == REQUEST
    np.testing.assert_array_equal(only.seen.rows, np.frombuffer(rows(5, 6, 7, 8), np.float32).reshape(4, WIDTH))
    assert only.seen.asked.tolist() == [2, 3]
    np.testing.assert_array_equal(only.seen.hidden, np.frombuffer(rows(70, 80), np.float32).reshape(2, WIDTH))


def test_sessions_that_share_frames_are_told_apart(taped: Taped) -> None:
    together = wire.Feed(
        slices=[piece(0, 2, ONE, outputs=1), piece(0, 1, OTHER, outputs=1)],
        rows=rows(1, 2, 9),
    )
    answered = wire.Fed(slices=[piece(0, 1, OTHER), piece(1, 1, ONE)], hidden=rows(90, 20))
    taped.put(opening(), opening(OTHER, "cd" * 16), wire.Up(feed=together), wire.Down(fed=answered))
    one, other = taped.heard()
    assert (firsts(one.seen.rows), one.seen.asked.tolist(), firsts(one.seen.hidden)) == ([1, 2], [1], [20])
    assert (firsts(other.seen.rows), other.seen.asked.tolist(), firsts(other.seen.hidden)) == ([9], [0], [90])


def test_the_same_handle_on_two_links_is_two_sessions(taped: Taped) -> None:
    taped.put(opening(), feed(0, 1), link=1).put(opening(request_id="cd" * 16), feed(0, 2), link=2)
    assert [firsts(each.seen.rows) for each in taped.heard()] == [[1], [2]]


def test_drafts_that_were_taken_back_are_gone_with_their_answers(taped: Taped) -> None:
    taped.put(
        opening(),
        feed(0, 1, 2, 3, 4, outputs=4), hidden(0, 10, 20, 30, 40),
        feed(2, 5, outputs=1, back=2), hidden(2, 50),
    )  # fmt: skip
    seen = taped.seen()
    assert firsts(seen.rows) == [1, 2, 5]
    assert (seen.asked.tolist(), firsts(seen.hidden)) == ([0, 1, 2], [10, 20, 50])


def test_a_recalled_row_of_logits_is_noted_and_no_second_answer(taped: Taped) -> None:
    logits = wire.Fed(slices=[piece(0, 1)], logits=np.zeros(100, np.float32).tobytes())
    taped.put(opening(), feed(0, 1, outputs=1), top(0, [9, 4], [2.0, 1.0], 2.5), wire.Down(fed=logits))
    (only,) = taped.heard("top")
    assert only.recalled == (0,)
    assert only.seen.top is not None
    assert only.seen.top.indices.tolist() == [[9, 4]]
    assert only.seen.top.values.tolist() == [[2.0, 1.0]]
    assert only.seen.top.log_sum_exp.tolist() == [2.5]


def test_ids_that_a_server_decodes_are_asked_for_behind_the_position_before(taped: Taped) -> None:
    taped.put(opening(), feed_ids(0, 3, 4), decoded(2, 5, done=False), decoded(3, 6, 7), decoded(5))
    seen = taped.seen("ids")
    assert seen.rows is None
    assert seen.ids is not None
    assert seen.ids.tolist() == [3, 4, 5, 6, 7]
    assert seen.asked.tolist() == [1, 2, 3]


def test_ids_beyond_a_halt_are_taken_back_and_the_one_that_goes_again_stays_an_answer(taped: Taped) -> None:
    taped.put(opening(), feed_ids(0, 3), decoded(1, 5, 6, 7), feed_ids(1, 5, 8, back=3), decoded(3, 9))
    seen = taped.seen("ids")
    assert seen.ids is not None
    assert seen.ids.tolist() == [3, 5, 8, 9]
    assert seen.asked.tolist() == [0, 2]


def test_a_session_that_went_on_elsewhere_is_one_with_the_answers_of_both_seats(taped: Taped) -> None:
    taped.put(opening(), feed(0, 1, 2, outputs=1), hidden(1, 20), feed(2, 3, outputs=1), tape="a")
    taped.put(opening(OTHER), feed(0, 1, 2, 3, session=OTHER, outputs=1), hidden(2, 30, session=OTHER), tape="b")
    seen = taped.seen()
    assert firsts(seen.rows) == [1, 2, 3]
    assert (seen.asked.tolist(), firsts(seen.hidden)) == ([1, 2], [20, 30])


def test_a_seat_that_was_left_while_the_other_went_on_does_not_stand(taped: Taped) -> None:
    taped.put(opening(), feed(0, 1, outputs=1), hidden(0, 10), feed(1, 2, outputs=1))
    taped.put(opening(OTHER), feed(0, 1, 4, 5, session=OTHER, outputs=1), hidden(2, 50, session=OTHER), link=2)
    taped.put(hidden(1, 20), feed(2, 3, outputs=1), hidden(2, 30))
    seen = taped.seen()
    assert firsts(seen.rows) == [1, 2, 3]
    assert (seen.asked.tolist(), firsts(seen.hidden)) == ([0, 1, 2], [10, 20, 30])


def test_rows_that_a_server_refuses_and_what_follows_them_do_not_stand(taped: Taped) -> None:
    taped.put(opening(), feed(0, 1, 2), feed(5, 9), feed(2, 3))
    assert firsts(taped.seen().rows) == [1, 2]


def test_what_comes_for_a_closed_session_does_not_stand(taped: Taped) -> None:
    taped.put(opening(), feed(0, 1, outputs=1), wire.Up(close=wire.Close(session=ONE)), hidden(0, 10), feed(1, 2))
    seen = taped.seen()
    assert (firsts(seen.rows), seen.asked.tolist(), firsts(seen.hidden)) == ([1], [], [])


def test_a_refused_session_that_fed_nothing_is_none(taped: Taped) -> None:
    taped.put(opening(), wire.Down(closed=wire.Closed(session=ONE, code="overloaded")))
    assert taped.heard() == []


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_rows_of_every_dtype_are_read_by_value(taped: Taped, dtype: str) -> None:
    data = rows(1.5, -2.5, dtype=NUMPY_DTYPE[dtype])
    taped.put(opening(), wire.Up(feed=wire.Feed(slices=[piece(0, 2)], rows=data)))
    (only,) = taped.heard(dtype=dtype)
    assert only.seen.rows is not None
    assert only.seen.rows.dtype == np.float32
    assert only.seen.rows.tolist() == [[1.5, 3.0, 4.5], [-2.5, -5.0, -7.5]]


def test_a_tape_is_its_owners_alone_and_goes_on_where_it_ended(taped: Taped) -> None:
    taped.put(opening(), feed(0, 1))
    path = taped.path / "tape"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    taped.writers["tape"].close()
    Taped(taped.path).put(feed(1, 2))
    assert path.read_bytes().count(MAGIC) == 1
    assert firsts(taped.seen().rows) == [1, 2]


def test_an_entry_that_was_cut_off_at_the_end_is_none(taped: Taped) -> None:
    taped.put(opening(), feed(0, 1), feed(1, 2))
    path = taped.path / "tape"
    path.write_bytes(path.read_bytes()[:-1])
    assert firsts(taped.seen().rows) == [1]


@pytest.mark.parametrize("content", [b"", b"safetensors or so"])
def test_another_file_is_no_tape(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tape"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="allowed: a tape of this version"):
        list(entries(path))


def test_a_tape_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        list(entries(tmp_path / "tape"))


def test_an_entry_of_an_impossible_size_is_refused_before_it_is_read(taped: Taped) -> None:
    taped.put(opening())
    path = taped.path / "tape"
    path.write_bytes(path.read_bytes() + b"\0" * 12 + b"\1" + b"\xff" * 4 + b"rest")
    with pytest.raises(FrameInvalid, match="tape entry"):
        taped.heard()


@pytest.mark.parametrize(
    "message",
    [
        wire.Up(feed=wire.Feed(slices=[piece(0, 2)], rows=rows(1))),
        wire.Up(feed=wire.Feed(slices=[piece(0, 2)], ids=ids(1))),
        wire.Down(fed=wire.Fed(slices=[piece(0, 2)], hidden=rows(1))),
        wire.Down(fed=wire.Fed(slices=[piece(0, 1)], top=wire.Top(count=2, indices=ids(1)))),
    ],
    ids=["rows", "ids", "hidden", "top"],
)
def test_a_message_whose_counts_do_not_add_up_is_refused(taped: Taped, message: wire.Up | wire.Down) -> None:
    taped.put(opening(), message)
    with pytest.raises(FrameInvalid, match="tape"):
        taped.heard()


def test_what_is_no_message_is_refused(taped: Taped) -> None:
    taped.put()
    TapeWriter(taped.path / "tape").put(1, Way.UP, b"\xff\xff\xff")
    with pytest.raises(FrameInvalid, match="no message of the wire"):
        heard([taped.path / "tape"], manifest("hidden"))


def test_a_server_that_does_not_exist_cannot_be_recorded(tmp_path: Path) -> None:
    with Stack(tmp_path / "work") as stack:
        with pytest.raises(ConfigurationError, match="recorded: got server-0-0, allowed:"):
            stack.start([], recorded=["server-0-0"])
        assert stack.processes == {}
