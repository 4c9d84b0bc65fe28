"""A checkpoint is checked before anything is allocated for it, and what is wrong with it is named."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from stip_keyservice.protect.storage.checkpoint import INDEX, WEIGHTS, Checkpoint
from stip_keyservice.protect.storage.headers import HEADER_LIMIT, read_header
from stip_protocol.errors import CheckpointInvalid

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(4, 3),
    "b": torch.arange(5, dtype=torch.bfloat16),
    "mask": torch.ones(2, 2, dtype=torch.bool),
    "scalar": torch.tensor(2.0, dtype=torch.float64),
}


def whole(folder: Path) -> Path:
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    save_file(TENSORS, folder / WEIGHTS)
    return folder


def sharded(folder: Path) -> Path:
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    save_file({"a": TENSORS["a"]}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": TENSORS["b"]}, folder / "model-00002-of-00002.safetensors")
    write_index(folder, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def raw_file(path: Path, header: object, body: bytes = b"", length: int | None = None) -> None:
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(data) if length is None else length).to_bytes(8, "little") + data + body)


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def test_a_single_file_gives_headers_rows_and_tensors(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(whole(tmp_path))
    assert checkpoint.config == {"model_type": "gpt2"}
    assert checkpoint.generation_config == {}
    assert {name: (h.dtype, h.shape) for name, h in checkpoint.headers.items()} == {
        "a": ("F32", (4, 3)),
        "b": ("BF16", (5,)),
        "mask": ("BOOL", (2, 2)),
        "scalar": ("F64", ()),
    }
    assert torch.equal(checkpoint.rows("a", 1, 3), TENSORS["a"][1:3])
    assert torch.equal(checkpoint.span("b", 0, 5), TENSORS["b"])
    assert checkpoint.rows("a", 2, 2).shape == (0, 3)


def test_shards_read_as_one(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(sharded(tmp_path))
    assert checkpoint.headers.keys() == {"a", "b"}
    assert torch.equal(checkpoint.rows("b", 4, 5), TENSORS["b"][4:])


@pytest.mark.parametrize(
    ("name", "break_it", "says"),
    [
        ("config.json", Path.unlink, r"config\.json: No such file"),
        ("config.json", lambda path: path.write_text("{"), r"config\.json: got not JSON"),
        ("config.json", lambda path: path.write_text("[]"), "allowed: an object"),
        ("config.json", lambda path: path.write_text('{"a": 1, "a": 2}'), "a key occurs twice"),
        ("config.json", lambda path: path.write_text("[" * 10**5), "not JSON"),
        ("config.json", lambda path: path.write_bytes(bytes((16 << 20) + 1)), "at most 16777216 bytes"),
        (WEIGHTS, Path.unlink, rf"model: got no weights, allowed: {WEIGHTS}"),
    ],
)
def test_a_missing_or_malformed_file_is_named(
    tmp_path: Path, name: str, break_it: Callable[[Path], object], says: str
) -> None:
    break_it(whole(tmp_path) / name)
    with pytest.raises(CheckpointInvalid, match=says):
        Checkpoint.open(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid, match="no such folder"):
        Checkpoint.open(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_never_read(tmp_path: Path, name: str) -> None:
    (whole(tmp_path) / WEIGHTS).unlink()
    (tmp_path / name).write_bytes(b"pickle")
    with pytest.raises(CheckpointInvalid, match=rf"{name}, a pickle that could run code, allowed: {WEIGHTS}"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("header", "body", "says"),
    [
        ({"a": entry(0, 8)}, 4, r"size: got 4 bytes of tensors, allowed: the 8 bytes of its header: is the file cut\?"),
        ({"a": entry(0, 8)}, 9, "size: got 9 bytes"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "tensor b data_offsets: got begin 4, allowed: 8: no overlap"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, 16, "tensor b data_offsets: got begin 12, allowed: 8"),
        ({"a": entry(4, 8)}, 8, "tensor a data_offsets: got begin 4, allowed: 0"),
        ({"a": entry(0, 8, shape=[3])}, 8, r"tensor a data_offsets: got 8 bytes, allowed: 12 \(F32 \[3\]\)"),
        ({"a": entry(8, 0, shape=[0])}, 8, "got -8 bytes"),
        ({"a": entry(0, 8, shape=[-2])}, 8, "natural numbers"),
        ({"a": entry(0, 8, shape=[2.0])}, 8, "natural numbers"),
        ({"a": entry(0, 8, shape=[True, 2])}, 8, "natural numbers"),
        ({"a": entry(0, 8, shape="2")}, 8, "natural numbers"),
        ({"a": entry(0, 8) | {"data_offsets": [0, 4, 8]}}, 8, "natural numbers"),
        ({"a": entry(0, 8, dtype="F8_E4M3")}, 8, "tensor a dtype: got 'F8_E4M3', allowed: F64, F32, F16, BF16"),
        ({"a": entry(0, 8, dtype=["F32"])}, 8, "tensor a dtype"),
        ({"a": entry(0, 8) | {"more": 1}}, 8, "dtype, shape and data_offsets"),
        ({"a": []}, 0, "dtype, shape and data_offsets"),
        ({"\x1b[2Ja": entry(0, 8)}, 8, "printable"),
        ({"n" * 513: entry(0, 8)}, 8, "at most 512"),
        ({"__metadata__": {"a": 1}}, 0, "a map of strings"),
        (b'{"a": {}, "a": {}}', 0, "a key occurs twice"),
        (b'{"a":' + b"9" * 10**4 + b"}", 0, "not JSON"),
        (b"\xff\xfe", 0, "not JSON"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: object, body: int, says: str) -> None:
    raw_file(tmp_path / WEIGHTS, header, bytes(body))
    with pytest.raises(CheckpointInvalid, match=says) as caught:
        read_header(tmp_path / WEIGHTS)
    assert WEIGHTS in caught.value.message


@pytest.mark.parametrize(
    "shape", [[1] * 9, [10**4000] * 10_000, [(1 << 48) + 1]], ids=["axes", "thousands of digits", "one too large"]
)
def test_a_shape_whose_product_would_take_for_ever_is_refused(tmp_path: Path, shape: list[int]) -> None:
    raw_file(tmp_path / WEIGHTS, {"a": entry(0, 4, shape=shape)}, bytes(4))
    with pytest.raises(CheckpointInvalid, match=f"at most 8 and two natural numbers up to {1 << 48}") as caught:
        read_header(tmp_path / WEIGHTS)
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", WEIGHTS, INDEX])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    whole(tmp_path)
    if name in (WEIGHTS, INDEX):
        (tmp_path / WEIGHTS).unlink()
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointInvalid, match=rf"{name}: got no regular file"):
        Checkpoint.open(tmp_path)


def test_a_source_of_links_is_read(tmp_path: Path) -> None:
    """As the cache of a hub lays models out."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "model").mkdir()
    for path in whole(tmp_path / "blobs").iterdir():
        (tmp_path / "model" / path.name).symlink_to(path)
    assert torch.equal(Checkpoint.open(tmp_path / "model").rows("a", 0, 4), TENSORS["a"])


def test_the_fingerprint_is_of_the_configuration_that_was_read(tmp_path: Path) -> None:
    before = Checkpoint.open(whole(tmp_path))
    fingerprint = before.fingerprint
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert before.fingerprint == fingerprint != Checkpoint.open(tmp_path).fingerprint


@pytest.mark.parametrize("length", [HEADER_LIMIT + 1, 2**63, 2**64 - 1])
def test_a_header_larger_than_the_format_allows_is_refused_unread(tmp_path: Path, length: int) -> None:
    raw_file(tmp_path / WEIGHTS, {}, length=length)
    with pytest.raises(CheckpointInvalid, match=f"header: got {length} bytes"):
        read_header(tmp_path / WEIGHTS)


@pytest.mark.parametrize("size", [0, 5, 8, 20, 200])
def test_a_truncated_shard_is_refused(tmp_path: Path, size: int) -> None:
    path = sharded(tmp_path) / "model-00002-of-00002.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: min(size, len(data) - 1)])
    with pytest.raises(CheckpointInvalid, match=r"model-00002-of-00002\.safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({"a": "model-00001-of-00002.safetensors", "b": "gone.safetensors"}, "shard 'gone.safetensors': got no such"),
        ({"a": "../model.safetensors"}, "got no such file, allowed: a file beside the index"),
        (
            {"a": "model-00001-of-00002.safetensors"} | {"c": "model-00001-of-00002.safetensors"},
            "tensor 'c'.* got not in",
        ),
        ({"a": "model-00001-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"}, "tensor 'b'"),
        ({"c": "model-00001-of-00002.safetensors"}, "tensor a: got in model-00001.*, not in the index"),
        (["a"], "a map of tensor names to files"),
        ({"a": 1}, "a map of tensor names to files"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path, weight_map: Any, says: str) -> None:
    write_index(sharded(tmp_path), weight_map)
    with pytest.raises(CheckpointInvalid, match=says):
        Checkpoint.open(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, sharded(tmp_path) / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointInvalid, match=r"tensor a: got model-00001.* and model-00002.*, allowed: one shard"):
        Checkpoint.open(tmp_path)


@given(data=st.data())
def test_a_damaged_header_is_refused_or_read_within_the_file(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    save_file(TENSORS, folder / WEIGHTS)
    content = bytearray((folder / WEIGHTS).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / WEIGHTS).write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        headers = read_header(folder / WEIGHTS).headers
    except CheckpointInvalid:
        return
    assert len(headers) <= len(TENSORS)


@given(content=st.binary(max_size=300))
def test_any_bytes_are_refused_by_the_same_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(content)
    with contextlib.suppress(CheckpointInvalid):
        assert read_header(path).headers == {}
