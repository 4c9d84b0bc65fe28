"""What runs on some hundred ids do not reach, or hardly show: rows of tables, single ids, undecided routings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from stip_keyservice.protect.equivalence import tables
from stip_keyservice.protect.equivalence.certificate import Certificate, Peaks
from stip_keyservice.protect.equivalence.protected_model import InstanceFiles, PlainModel
from stip_keyservice.protect.equivalence.routing import MARGIN, Routings
from stip_keyservice.protect.equivalence.tables import Tables, adjoint
from stip_keyservice.protect.instance import protect
from stip_keyservice.protect.storage.checkpoint import Checkpoint
from stip_protocol.errors import CheckpointInvalid, ConfigurationError
from stip_protocol.keys import (
    KeyStream,
    draw_centred_orthogonal,
    draw_monomial,
    draw_orthogonal,
    draw_pair_scalars,
    draw_permutation,
    draw_signed_permutation,
)

from .decoders import DECODERS, VOCABULARY
from .laying import Laid, lay_out

Change = Callable[[torch.Tensor], None]
DRAWN = (
    draw_centred_orthogonal,
    draw_monomial,
    draw_orthogonal,
    draw_pair_scalars,
    draw_permutation,
    draw_signed_permutation,
)


@dataclass(frozen=True)
class Changed(InstanceFiles):
    """An instance, one sealed tensor of which holds other values."""

    tensor: str = ""
    change: Change = lambda rows: None

    def blocks(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        found = list(super().blocks(name))
        if name == self.tensor:
            rows = torch.cat([block for _, block in found])
            self.change(rows)
            found = [(0, rows)]
        yield from found


def changed(laid: Laid, tensor: str, change: Change) -> Laid:
    known = {name: getattr(laid.files, name) for name in InstanceFiles.__dataclass_fields__}
    return replace(laid, files=Changed(**known, tensor=tensor, change=change))


def exchange_two(rows: torch.Tensor) -> None:
    rows[:2] = rows[:2].flip(0).clone()


def zero_unused(rows: torch.Tensor) -> None:
    """All rows but those of the ids that are drawn by seed 0."""
    seen = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    unused = torch.ones(len(rows), dtype=torch.bool)
    unused[seen.flatten()] = False
    assert unused.any()
    rows[unused] = 0


def scale_last(rows: torch.Tensor) -> None:
    rows[-1] *= 1.1


@pytest.mark.parametrize("key", DRAWN)
def test_the_adjoint_is_the_transpose(key: Any) -> None:
    drawn = key(KeyStream(bytes(32), "key"), 6)
    assert np.allclose(adjoint(drawn).matrix(), drawn.matrix().T, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("gpt2", ["embedding", "positions", "head", "head_bias"]),
        ("llama", ["embedding", "head"]),
        ("gemma2", ["embedding", "head"]),
        ("opt", ["embedding", "positions", "head", "head_bias"]),
    ],
)
def test_every_row_of_the_enclave_is_compared(
    name: str, tensors: list[str], dtype: torch.dtype, tmp_path: Path
) -> None:
    laid = lay_out(DECODERS[name].store(tmp_path / "model", dtype), tmp_path / "out", "hardened")
    found = Tables(laid.files, laid.source, laid.planned, 0).compare()
    assert [table.name for table in found] == tensors
    for table in found:
        assert table.passed, table
        assert table.rows == next(out.shape[0] for out in laid.planned.enclave if out.name == table.name)
    for name in tensors:
        for change in (exchange_two, scale_last):
            wrong = changed(laid, name, change)
            told = {table.name: table.passed for table in Tables(wrong.files, laid.source, laid.planned, 0).compare()}
            if name == "head_bias" and change is exchange_two:
                continue  # two biases may be equal where none is stored
            assert told == {other: other != name for other in tensors}, (name, change)


def test_large_tables_are_compared_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    laid = lay_out(DECODERS["gpt2"].store(tmp_path / "model"), tmp_path / "out", "hardened")
    whole = Tables(laid.files, laid.source, laid.planned, 0).compare()
    monkeypatch.setattr(tables, "BLOCK_VALUES", 100)
    for blocks, at_once in zip(Tables(laid.files, laid.source, laid.planned, 0).compare(), whole, strict=True):
        assert (blocks.name, blocks.rows, blocks.bound) == (at_once.name, at_once.rows, at_once.bound)
        assert blocks.largest == pytest.approx(at_once.largest, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("preset", ["paper", "hardened"])
def test_rows_that_no_run_looks_up_are_not_certified_when_wrong(preset: str, tmp_path: Path) -> None:
    laid = lay_out(DECODERS["llama"].store(tmp_path / "model", torch.bfloat16), tmp_path / "out", preset)
    assert laid.certify().passed
    found = changed(laid, "embedding", zero_unused).certify()
    assert found.relative_rms <= found.bound, "the runs show nothing"
    assert not found.passed
    assert str(found.fault).startswith("rows of embedding differ by")


def test_one_wrong_id_of_many_has_a_bound_of_its_own(tmp_path: Path) -> None:
    """Without the comparison of tables: where the head is the server's, logits are all there is."""
    laid = lay_out(DECODERS["llama"].store(tmp_path / "model", torch.bfloat16), tmp_path / "out", "hardened")
    right, wrong = laid.certify(), changed(laid, "head", exchange_two).certify()
    assert right.passed
    differences = wrong.groups[0].differences
    assert differences.relative_largest > wrong.peaks.logit
    assert differences.relative_worst_column > wrong.peaks.id
    group = right.groups[0]
    for field in ("largest", "worst_row_rms", "worst_column_rms"):
        worse = group.model_copy(update={"differences": group.differences.model_copy(update={field: 1e3})})
        assert not right.model_copy(update={"groups": (worse,)}).passed
        unknown = group.model_copy(update={"differences": group.differences.model_copy(update={field: float("nan")})})
        assert not right.model_copy(update={"groups": (unknown,)}).passed
    assert isinstance(right.peaks, Peaks)


def test_a_worse_head_does_not_widen_what_counts_as_a_tie(tmp_path: Path) -> None:
    """Differences of any size were ties once, since the width grew with them."""

    def noisy(rows: torch.Tensor) -> None:
        rows += 2 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))

    laid = lay_out(DECODERS["llama"].store(tmp_path / "model"), tmp_path / "out", "hardened")
    found = changed(laid, "head", noisy).certify()
    assert found.top1 < 0.9
    assert found.top1_with_ties == found.top1


def test_positions_from_an_undecided_routing_on_are_left_out() -> None:
    found = Routings(torch.Size((2, 3)), MARGIN)
    scores = torch.tensor([[3.0, 1.0, 0.0]] * 6)
    scores[1] = torch.tensor([2.0, 2.0 - 1e-6, 0.0])
    found.add("router", scores, scores.topk(1).indices)
    assert found.decided.tolist() == [[True, False, False], [True, True, True]]
    assert found.taken["router"].tolist() == [True, False, False]
    found.add("all", scores, scores.topk(3).indices)
    assert found.decided.sum() == 4, "a router that takes all decides nothing"


def tied_routers(folder: Path) -> Path:
    """A model, two experts of whose first router get the same scores: rounding decides between them."""
    from safetensors.torch import load_file, save_file

    model = DECODERS["qwen3_moe"].store(folder / "model", num_experts=16)
    tensors = load_file(model / "model.safetensors")
    gate = next(name for name in tensors if "layers.0" in name and name.endswith("mlp.gate.weight"))
    tensors[gate][1] = tensors[gate][0]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("preset", ["paper", "hardened"])
def test_a_right_model_with_routing_ties_is_certified_and_tells_of_them(preset: str, tmp_path: Path) -> None:
    found = lay_out(tied_routers(tmp_path), tmp_path / "out", preset).certify(samples=8)
    assert found.passed, found.fault
    assert found.undecided > 0
    assert found.positions + found.undecided == 8 * 24
    assert 0 < found.coverage.experts_reached <= found.coverage.experts == 32
    assert found.summary()["undecided"] == found.undecided


def test_too_few_positions_are_no_certificate(tmp_path: Path) -> None:
    found = lay_out(DECODERS["llama"].store(tmp_path / "model"), tmp_path / "out", "paper").certify()
    few = found.groups[0].model_copy(update={"positions": 5, "undecided": 43})
    assert "rounding decides routings in 43 positions and leaves 5" in str(
        found.model_copy(update={"groups": (few,)}).fault
    )
    assert Certificate.model_validate_json(found.model_dump_json()) == found


def test_a_vocabulary_of_one_id_is_certified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.protect.decoders.VOCABULARY", 1)
    laid = lay_out(DECODERS["llama"].store(tmp_path / "model"), tmp_path / "out", "hardened")
    assert laid.certify().passed


def configured(folder: Path, **fields: object) -> Laid:
    laid = lay_out(DECODERS["llama"].store(folder / "model"), folder / "out", "hardened")
    shutil.copytree(folder / "model", folder / "other")
    config = json.loads((folder / "other" / "config.json").read_text()) | fields
    (folder / "other" / "config.json").write_text(json.dumps(config))
    return replace(laid, source=Checkpoint.open(folder / "other"))


@pytest.mark.parametrize(
    "fields",
    [
        {"pad_token_id": VOCABULARY},
        {"attn_implementation": "flash_attention_2"},
        {"return_dict": False},
        {"output_attentions": True},
    ],
    ids=str,
)
def test_fields_that_change_no_logit_do_not_matter(fields: dict[str, object], tmp_path: Path) -> None:
    assert configured(tmp_path, **fields).certify().passed


@pytest.mark.parametrize("fields", [{"id2label": 5}, {"dtype": "float99"}], ids=str)
def test_a_configuration_that_transformers_refuses_is_refused(fields: dict[str, object], tmp_path: Path) -> None:
    laid = configured(tmp_path, **fields)
    with pytest.raises(CheckpointInvalid, match=r"config\.json: got one that transformers refuses"):
        PlainModel(laid.source, laid.planned, torch.float32)


def test_protect_refuses_such_a_configuration_before_it_writes(tmp_path: Path) -> None:
    model = configured(tmp_path, id2label=5).source.directory
    stages: list[str] = []
    with pytest.raises(CheckpointInvalid, match="config"):
        protect(
            model,
            tmp_path / "instance",
            preset="hardened",
            developer=Ed25519PrivateKey.generate(),
            seal_to=X25519PrivateKey.generate().public_key(),
            progress=lambda stage, done, total: stages.append(stage),
        )
    assert set(stages) == {"keys"}


def test_a_sequence_that_memory_has_no_room_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    laid = lay_out(DECODERS["llama"].store(tmp_path / "model"), tmp_path / "out", "paper")
    monkeypatch.setattr("stip_keyservice.protect.equivalence.certification.BATCH_BYTES", 1)
    assert laid.certify(length=64).passed, "those that protect draws always run"
    with pytest.raises(ConfigurationError, match="length of a sequence: got 65, allowed: at most 64"):
        laid.certification(length=65)
