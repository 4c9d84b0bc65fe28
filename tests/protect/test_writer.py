"""What the streaming writer writes, the reference readers read."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from stip_keyservice.protect import writer
from stip_keyservice.protect.checkpoint import INDEX, WEIGHTS, Checkpoint
from stip_keyservice.protect.folding import TORCH_DTYPE
from stip_keyservice.protect.plan import Output
from stip_protocol.errors import CheckpointInvalid

OUTPUTS = [
    Output("half", "F16", (3,)),
    Output("wide", "F64", (5, 2)),
    Output("brain", "BF16", (7, 3, 2)),
    Output("single", "F32", (11, 4)),
]


def value(output: Output, rows: slice) -> torch.Tensor:
    count = torch.Size(output.shape).numel()
    return torch.arange(count).reshape(output.shape).to(TORCH_DTYPE[output.dtype])[rows]


def given(tensor: torch.Tensor, output: Output, rows: slice) -> torch.Tensor:
    return tensor


def test_tensors_written_in_row_blocks_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "BLOCK_BYTES", 40)
    blocks: list[int] = []
    writer.write_checkpoint(tmp_path, OUTPUTS, value, blocks.append)
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]
    read = load_file(tmp_path / WEIGHTS)
    assert read.keys() == {output.name for output in OUTPUTS}
    for output in OUTPUTS:
        assert torch.equal(read[output.name], value(output, slice(None)))
        assert read[output.name].dtype == TORCH_DTYPE[output.dtype]
    assert len(blocks) > len(OUTPUTS)
    assert sum(blocks) == sum(map(writer.output_bytes, OUTPUTS))
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_stay_under_their_limit_and_the_index_names_them(tmp_path: Path) -> None:
    writer.write_checkpoint(tmp_path, OUTPUTS, value, lambda step: None, shard_bytes=100)
    index = json.loads((tmp_path / INDEX).read_text())
    assert set(index["weight_map"].values()) == {path.name for path in tmp_path.glob("*.safetensors")}
    assert set(index["weight_map"]) == {output.name for output in OUTPUTS}
    assert index["weight_map"]["half"] == index["weight_map"]["wide"] != index["weight_map"]["single"]
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    for output in OUTPUTS:
        assert torch.equal(checkpoint.tensor(output.name), value(output, slice(None)))


def test_the_index_is_last_so_that_a_broken_write_is_not_taken_for_whole(tmp_path: Path) -> None:
    def breaks(output: Output, rows: slice) -> torch.Tensor:
        if output.name == "single":
            raise OSError("disk full")
        return value(output, rows)

    with pytest.raises(OSError, match="disk full"):
        writer.write_checkpoint(tmp_path, OUTPUTS, breaks, lambda step: None, shard_bytes=100)
    assert not (tmp_path / INDEX).exists()


def test_a_block_of_another_form_is_refused(tmp_path: Path) -> None:
    for wrong in (torch.zeros(3), torch.zeros(4, dtype=torch.float16)):
        with pytest.raises(CheckpointInvalid, match=r"tensor half: got .*, allowed: float16 \[3\]"):
            writer.write_checkpoint(tmp_path, OUTPUTS[:1], partial(given, wrong), lambda step: None)
        (tmp_path / WEIGHTS).unlink()
