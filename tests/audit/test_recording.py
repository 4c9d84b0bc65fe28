"""Recordings keep what was seen, bit by bit, and refuse what no server of that instance saw."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from stip_keyservice.audit.recording import METADATA, Recording, Session
from stip_keyservice.audit.view import Labelled, Seen, Top
from stip_protocol.errors import ConfigurationError
from stip_protocol.manifest import FileDigest, Manifest

WIDTH, VOCABULARY = 8, 11
FORMS = {"hardened": "hidden", "paper": "top", "throughput": "ids"}


def manifest(preset: str, **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "instance": "ab" * 16, "epoch": 3, "preset": preset, "dtype": "float32", "width": WIDTH,
        "vocabulary": VOCABULARY, "max_positions": 64, "output": FORMS[preset],
        "server": {"config.json": FileDigest.of(b"a"), "model.safetensors": FileDigest.of(b"b")},
        "enclave": {}, "certificate": {},
    }  # fmt: skip
    return Manifest(**{**fields, **changes})


def session(preset: str, user: Any, positions: int, prompt: int) -> Session:
    draw = np.random.default_rng([positions, prompt])
    ids, asked = draw.integers(VOCABULARY, size=positions), np.arange(prompt - 1, positions)
    rows = draw.normal(size=(positions, WIDTH)).astype(np.float32)
    values = -np.sort(-draw.normal(size=(len(asked), VOCABULARY)).astype(np.float32), axis=1)
    indices = np.tile(np.arange(VOCABULARY)[::-1], (len(asked), 1))
    seen = {
        "hidden": Seen(rows, None, asked, hidden=rows[asked]),
        "top": Seen(rows, None, asked, top=Top(indices, values, values[:, 0])),
        "ids": Seen(None, ids[::-1].copy(), asked),
    }[FORMS[preset]]
    return Session(user, "recorded", Labelled(seen, ids, draw.integers(VOCABULARY, size=len(asked))))


def recording(preset: str) -> Recording:
    sessions = [session(preset, "victim", 5, 3), session(preset, "accomplice", 7, 1), session(preset, "victim", 4, 4)]
    return Recording.of(manifest(preset), sessions)


def arrays(said: Labelled) -> dict[str, Any]:
    seen, top = said.seen, said.seen.top
    fields = {"ids": said.ids, "answers": said.answers, "rows": seen.rows, "permuted": seen.ids, "asked": seen.asked}
    tops = {} if top is None else {"indices": top.indices, "values": top.values, "log_sum_exp": top.log_sum_exp}
    return {name: array for name, array in {**fields, "hidden": seen.hidden, **tops}.items() if array is not None}


@pytest.fixture(params=FORMS)
def preset(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "traffic.safetensors"


def test_a_recording_is_read_as_it_was_written(preset: str, path: Path) -> None:
    written = recording(preset)
    written.write(path)
    read = Recording.read(path, manifest(preset))
    assert [(each.user, each.source) for each in read.sessions] == [(e.user, e.source) for e in written.sessions]
    for got, expected in zip(read.sessions, written.sessions, strict=True):
        found, wanted = arrays(got.said), arrays(expected.said)
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
    assert read.digest == written.digest
    assert [len(said.ids) for said in read.of_user("victim")] == [5, 4]


def test_a_recording_is_the_same_bytes_each_time_and_for_its_owner_alone(preset: str, path: Path) -> None:
    recording(preset).write(path)
    again = path.with_name("again")
    recording(preset).write(again)
    assert path.read_bytes() == again.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in path.parent.iterdir() if each.name.endswith(".partial")] == []


def test_the_digest_is_of_what_was_said_and_seen(preset: str) -> None:
    first = recording(preset)
    said = first.sessions[1].said
    other = replace(first.sessions[1], said=replace(said, ids=(said.ids + 1) % VOCABULARY))
    assert first.digest == recording(preset).digest
    assert replace(first, sessions=(first.sessions[0], other)).digest != first.digest


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"instance": "cd" * 16}, "instance"),
        ({"epoch": 4}, "epoch"),
        ({"server": {"config.json": FileDigest.of(b"another")}}, "server part"),
        ({"width": 4}, "width"),
        ({"vocabulary": 12}, "vocabulary"),
        ({"output": "top"}, "output"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_recording_of_another_instance_is_refused(path: Path, changes: dict[str, Any], says: str) -> None:
    recording("hardened").write(path)
    with pytest.raises(ConfigurationError, match=f"recording, {says}: got"):
        Recording.read(path, manifest("hardened", **changes))


def test_sessions_that_are_not_of_the_instances_form_are_never_written(path: Path) -> None:
    with pytest.raises(ConfigurationError, match="sessions"):
        Recording.of(manifest("paper"), []).write(path)
    said = session("paper", "victim", 5, 3)
    hidden, narrow = session("hardened", "victim", 5, 3), replace(said.said.seen, rows=np.ones((5, 7), np.float32))
    for wrong, says in (
        (hidden, "session 1 top_indices: got none"),
        (replace(said, said=replace(said.said, answers=said.said.answers[:-1])), "session 1 asked"),
        (replace(said, said=replace(said.said, ids=said.said.ids.astype(np.int32))), "session 1 ids: got int32"),
        (replace(said, said=replace(said.said, seen=narrow)), "session 1 rows"),
    ):
        with pytest.raises(ConfigurationError, match=says):
            Recording.of(manifest("paper"), [said, wrong]).write(path)
    assert not path.exists()


def changed(path: Path, header: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Write the file at `path` anew, with other tensors (None: without it) and header fields."""
    with safe_open(path, "numpy") as file:
        content = json.loads(file.metadata()[METADATA])
    kept = {name: value for name, value in (load_file(path) | tensors).items() if value is not None}
    save_file(kept, path, {METADATA: json.dumps(content | header)})


def test_a_file_of_another_form_is_refused_before_its_tensors_are_read(path: Path) -> None:
    ids, entry = np.arange(VOCABULARY), {"user": "victim", "source": "recorded", "positions": 16, "answers": 1}
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"more": ids}, {}, "tensors: got .*'more'"),
        ({"rows": None}, {}, "tensors: got"),
        ({"rows": np.ones((16, WIDTH), np.float64)}, {}, r"rows: got F64 \[16, 8\], allowed: F32"),
        ({"hidden": np.ones((1, WIDTH), np.float32)}, {}, r"hidden: got F32 \[1, 8\]"),
        ({}, {"sessions": [entry]}, "(asked|answers): got"),
        ({}, {"sessions": [entry | {"positions": 2**40}]}, "positions"),
        ({}, {"sessions": [entry | {"user": "neighbour"}]}, "user"),
        ({}, {"sessions": []}, "sessions"),
        ({}, {"version": [2, 0]}, "version: got"),
        ({}, {"instance": "nobody"}, "instance"),
    ]
    for tensors, header, says in cases:
        recording("hardened").write(path)
        changed(path, header, tensors)
        with pytest.raises(ConfigurationError, match=says):
            Recording.read(path, manifest("hardened"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("preset", "name"), [("hardened", "rows"), ("hardened", "hidden"), ("paper", "rows"), ("paper", "top_values")]
)
def test_values_that_are_not_finite_are_refused(preset: str, path: Path, name: str, value: float) -> None:
    recording(preset).write(path)
    values = load_file(path)[name]
    values[0, 0] = value
    changed(path, {}, {name: values})
    with pytest.raises(ConfigurationError, match=f"{name}: got values that are not finite"):
        Recording.read(path, manifest(preset))


@pytest.mark.parametrize(
    ("preset", "name", "value"),
    [
        ("hardened", "ids", VOCABULARY),
        ("hardened", "answers", -1),
        ("paper", "top_indices", 99),
        ("throughput", "permuted", 99),
    ],
)
def test_ids_beyond_the_vocabulary_are_refused(path: Path, preset: str, name: str, value: int) -> None:
    recording(preset).write(path)
    ids = load_file(path)[name]
    ids[1] = value
    changed(path, {}, {name: ids})
    with pytest.raises(ConfigurationError, match=f"{name}: got ids beyond the vocabulary"):
        Recording.read(path, manifest(preset))


def test_answers_to_positions_that_were_not_fed_are_refused(path: Path) -> None:
    for asked in ([2, 4, 3], [2, 2, 3], [2, 3, 5], [-1, 3, 4]):
        recording("paper").write(path)
        found = load_file(path)["asked"]
        found[:3] = asked
        changed(path, {}, {"asked": found})
        with pytest.raises(ConfigurationError, match="session 0 asked: got other positions"):
            Recording.read(path, manifest("paper"))


def test_logits_that_are_not_the_largest_first_are_refused(path: Path) -> None:
    recording("paper").write(path)
    changed(path, {}, {"top_values": np.ascontiguousarray(load_file(path)["top_values"][:, ::-1])})
    with pytest.raises(ConfigurationError, match="top_values: got another order"):
        Recording.read(path, manifest("paper"))


def test_what_is_no_recording_is_refused(path: Path) -> None:
    with pytest.raises(ConfigurationError, match="recording"):
        Recording.read(path, manifest("paper"))
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ConfigurationError, match="no safetensors"):
        Recording.read(path, manifest("paper"))
    save_file({"rows": np.ones(3)}, path)
    with pytest.raises(ConfigurationError, match="header: got 0 characters"):
        Recording.read(path, manifest("paper"))


def test_a_file_in_the_way_is_not_written_through(path: Path) -> None:
    target = path.with_name("precious")
    target.write_text("precious")
    path.with_name(path.name + ".partial").symlink_to(target)
    with pytest.raises(ConfigurationError, match="recording"):
        recording("paper").write(path)
    assert target.read_text() == "precious"


def test_what_is_no_file_is_refused_and_not_waited_for(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(ConfigurationError, match="no file"):
        Recording.read(path, manifest("paper"))
    with pytest.raises(ConfigurationError, match="no file"):
        Recording.read(path.parent, manifest("paper"))


def test_what_a_file_says_does_not_reach_the_terminal_as_it_is(path: Path) -> None:
    header = json.dumps({"rows": {"dtype": "\x1b[31m", "shape": [1], "data_offsets": [0, 4]}}, ensure_ascii=False)
    data = header.encode().replace(b"\\u001b", b"\x1b")
    path.write_bytes(len(data).to_bytes(8, "little") + data + bytes(4))
    with pytest.raises(ConfigurationError) as refused:
        Recording.read(path, manifest("paper"))
    assert refused.value.message.isprintable()


def test_a_writing_that_was_ended_leaves_no_prompts_and_can_be_done_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended(BaseException):
        pass

    def end(handle: int) -> None:
        raise Ended

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", end)
        with pytest.raises(Ended):
            recording("paper").write(path)
    assert not list(path.parent.iterdir())
    recording("paper").write(path)
    assert [each.name for each in path.parent.iterdir()] == [path.name]
