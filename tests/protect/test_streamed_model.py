"""A streamed model is the model of transformers, with nothing in memory but what runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stip_keyservice.protect.equivalence import streamed_model
from stip_keyservice.protect.equivalence.protected_model import PlainModel
from stip_keyservice.protect.equivalence.streamed_model import ENTRY, FINAL
from stip_keyservice.protect.equivalence.weights import Weights, moved_within_rounding
from stip_keyservice.protect.plan import Plan, plan
from stip_keyservice.protect.storage.checkpoint import Checkpoint
from stip_protocol.errors import CheckpointInvalid, IntegrityError

from .decoders import DECODERS, VOCABULARY

IDS = torch.randint(VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(5))


def planned(source: Checkpoint, preset: str = "paper") -> Plan:
    return plan(source.config, source.headers, preset, bytes(32), accept_tied_head=True)


class Loads:
    """A checkpoint that notes which rows are read."""

    def __init__(self, source: Checkpoint) -> None:
        self.source = source
        self.read: list[tuple[str, int, int]] = []

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        self.read.append((name, start, stop))
        return self.source.rows(name, start, stop)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


@pytest.mark.parametrize("name", DECODERS)
def test_it_gives_what_transformers_gives(name: str, tmp_path: Path) -> None:
    source = Checkpoint.open(DECODERS[name].store(tmp_path / "model"))
    whole: Any = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}
    found = PlainModel(source, planned(source), torch.float32).logits(IDS, seen.__setitem__)
    with torch.inference_mode():
        expected = whole(input_ids=IDS, use_cache=False, output_hidden_states=True)
    assert torch.allclose(found, expected.logits, rtol=0, atol=2e-5)
    entry, first, final = expected.hidden_states
    assert list(seen) == [ENTRY, "layer 0", "layer 1", FINAL]
    for place, states in ((ENTRY, entry), ("layer 0", first), (FINAL, final)):
        assert torch.allclose(seen[place], states, rtol=0, atol=2e-5), place


def test_each_tensor_is_read_once_a_pass_and_of_the_table_the_asked_rows(tmp_path: Path) -> None:
    source = Checkpoint.open(DECODERS["llama"].store(tmp_path / "model"))
    loads = Loads(source)
    model = PlainModel(loads, planned(source), torch.float32)  # type: ignore[arg-type]
    assert loads.read == [], "nothing is read before a pass"
    model.logits(torch.tensor([[7, 8, 9, 3, 7], [3, 3, 120, 9, 8]]), lambda name, states: None)
    table = [read for read in loads.read if "embed" in read[0]]
    assert [read[1:] for read in table] == [(3, 4), (7, 10), (120, 121)]
    others = [read for read in loads.read if "embed" not in read[0]]
    assert len(others) == len(set(others)) == len(source.headers) - 1


def test_parameters_are_held_while_their_layer_runs_and_not_longer(tmp_path: Path) -> None:
    source = Checkpoint.open(DECODERS["gpt2"].store(tmp_path / "model"))
    model = PlainModel(source, planned(source), torch.float32)
    inner: torch.nn.Module = model._model._model

    def held() -> set[str]:
        return {name for name, parameter in inner.named_parameters() if not parameter.is_meta}

    during: list[set[str]] = []
    model.logits(IDS, lambda name, states: during.append(held()))
    assert held() == set()
    for place, names in zip(("h.0", "h.0", "h.1", "ln_f"), during, strict=True):
        assert all(f".{place}." in name for name in names), names
    assert all(during[1:])


def test_a_head_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Checkpoint.open(DECODERS["llama"].store(tmp_path / "model"))
    expected = PlainModel(source, planned(source), torch.float32).logits(IDS, lambda name, states: None)
    monkeypatch.setattr(streamed_model, "BLOCK_BYTES", 4 * 48 * 10)
    loads = Loads(source)
    found = PlainModel(loads, planned(source), torch.float32).logits(IDS, lambda name, states: None)  # type: ignore[arg-type]
    blocks = [read[1:] for read in loads.read if read[0] == "lm_head.weight"]
    assert blocks == [(start, min(start + 10, VOCABULARY)) for start in range(0, VOCABULARY, 10)]
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)


def test_a_class_of_another_name_is_refused(tmp_path: Path) -> None:
    source = Checkpoint.open(DECODERS["llama"].store(tmp_path / "model"))
    with pytest.raises(CheckpointInvalid, match=r"class of transformers: got .*, allowed: NoSuchModel"):
        streamed_model.StreamedModel(
            source.directory,
            Weights(source, {}, {}, torch.float32, CheckpointInvalid),
            class_name="NoSuchModel",
            prefix="",
            table="",
            stored=torch.float32,
            final_norm=None,
        )


def weights(**places: tuple[str, int, int]) -> Weights:
    class Rows:
        def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
            return torch.arange(start, stop)[:, None] + {"stack": 0, "alone": 100}[name]

    stored = {name: SimpleNamespace(name=place[0], start=place[1], stop=place[2]) for name, place in places.items()}
    return Weights(Rows(), stored, {"fused": ("b", "a")}, torch.float32, IntegrityError, what="part")


def test_fused_parameters_are_rows_of_their_tensors_one_after_another() -> None:
    found = weights(a=("stack", 2, 5), b=("alone", 0, 2))
    assert found.rows("fused", 0, 5).flatten().tolist() == [100, 101, 2, 3, 4]
    assert found.rows("fused", 1, 4).flatten().tolist() == [101, 2, 3]
    assert found.rows("a", 1, 2).flatten().tolist() == [3]
    assert found.chosen("fused", torch.tensor([0, 2, 3])).flatten().tolist() == [100, 2, 3]
    whole = torch.zeros(5, 1, 1)
    found.fill("fused", whole)
    assert whole.flatten().tolist() == [100, 101, 2, 3, 4]


def test_a_parameter_without_a_tensor_and_a_tensor_without_a_parameter_are_refused() -> None:
    found = weights(a=("stack", 2, 5), b=("alone", 0, 2))
    found.check({"fused": (5, 1)})
    found.check({"a": (3, 1), "b": (2, 1)})
    with pytest.raises(IntegrityError, match="part, tensor c: got none, allowed: one, for c"):
        found.check({"fused": (5, 1), "c": (1,)})
    with pytest.raises(IntegrityError, match="part, tensor b: got one, allowed: none: no parameter reads it"):
        found.check({"a": (3, 1)})
    with pytest.raises(IntegrityError, match="part, rows of fused: got 5, allowed: 6"):
        found.check({"fused": (2, 3, 1)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_move_within_half_a_step_of_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    source = Checkpoint.open(DECODERS["llama"].store(tmp_path / "model", dtype))
    tensors = load_file(source.directory / "model.safetensors")
    alter = moved_within_rounding(dtype, 3, lambda tensor: tensor != "left")

    def move(block: str, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.clone()
        alter(block, rows)
        return rows

    for name, stored in tensors.items():
        wide = stored.float()
        moved = move(f"{name}/0", wide)
        if name.endswith("norm.weight"):
            assert torch.equal(moved, wide)
            continue
        assert torch.equal(move(f"{name}/0", wide), moved), "the same again"
        assert not torch.equal(move(f"{name}/1", wide), moved), "and another elsewhere"
        assert (moved != wide).float().mean() > 0.9
        back = moved.to(dtype).float()
        assert ((back - wide).abs() <= torch.finfo(dtype).eps * wide.abs()).all()
        assert (back == wide).float().mean() > 0.9
        assert torch.equal(move("left/0", wide), wide)
    assert not move("zeros/0", torch.zeros(4, 4)).any()
