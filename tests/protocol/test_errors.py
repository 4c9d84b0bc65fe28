"""The error tree: one stable code each, carried whole across a process boundary."""

from __future__ import annotations

from collections import Counter

import grpc

from stip_protocol.errors import BY_CODE, MESSAGE_LIMIT, Action, StipError, from_code


def classes(root: type[StipError] = StipError) -> list[type[StipError]]:
    return [root, *(each for child in root.__subclasses__() for each in classes(child))]


def test_every_error_has_a_code_of_its_own_an_action_and_a_grpc_status() -> None:
    codes = Counter(each.code for each in classes())
    assert not [code for code, count in codes.items() if count > 1]
    for each in classes():
        assert isinstance(each.action, Action)
        assert each.grpc_status in grpc.StatusCode.__members__


def test_an_error_comes_back_as_itself_by_its_code() -> None:
    for code, kind in BY_CODE.items():
        assert type(from_code(code, "message")) is kind


def test_an_unknown_code_becomes_the_root_and_its_text_is_bounded() -> None:
    error = from_code("made-up-by-a-newer-peer", "x" * 10_000)
    assert type(error) is StipError
    assert "made-up-by-a-newer-peer" in error.message
    assert len(error.message) < MESSAGE_LIMIT + 200


def test_a_peers_message_cannot_move_the_cursor_start_a_line_or_turn_the_text_around() -> None:
    for code in ("frame_invalid", "made-up\x1b[2J"):
        text = str(from_code(code, "one\x1b[2J\x1b]0;title\x07\r\ntwo\u202e\u2028three"))
        assert text.isprintable()
        assert text.startswith("one")


def test_the_docstring_draws_the_whole_tree() -> None:
    from stip_protocol import errors

    assert errors.__doc__ is not None
    assert not [each.__name__ for each in classes() if each.__name__ not in errors.__doc__]
