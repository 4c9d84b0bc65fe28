"""The enclave part: opened only whole and only by its grant; rows handed out bit for bit."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from stip_enclave.config import Limits
from stip_enclave.head import Head
from stip_enclave.instances import Instance
from stip_enclave.tables import Tables, open_part
from stip_protocol.errors import (
    InstanceRefused,
    ManifestMismatch,
    PositionRefused,
    PresetRefused,
    RequestInvalid,
    SealedPartInvalid,
    SignatureInvalid,
    StipError,
)
from stip_protocol.manifest import file_digest
from stip_protocol.telemetry import Telemetry

Toys = Callable[..., Any]
DTYPES = ("float32", "bfloat16", "float16", "float64")


def opened(toy: Any, **grant: Any) -> Any:
    return open_part(toy.folder / "enclave", toy.manifest, toy.digest, toy.grant.model_copy(update=grant))


def resigned(toy: Any) -> Any:
    """The toy with its manifest saying what the files now are."""
    files = {path.name: file_digest(path) for path in (toy.folder / "enclave").iterdir()}
    toy.manifest = toy.manifest.model_copy(update={"enclave": files})
    return toy


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_the_tables_own_bytes(toys: Toys, dtype: str) -> None:
    toy = toys(dtype=dtype)
    rows = Tables(opened(toy)).rows(np.array([3, 0, 100, 3], np.uint32), np.arange(4))
    assert rows == toy.embedding[[3, 0, 100, 3]].tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_positions_are_added_and_rounded_as_torch_does(toys: Toys, dtype: str) -> None:
    toy = toys(dtype=dtype, tables=("embedding", "positions", "head"))
    ids, positions = np.array([7, 7, 99], np.uint32), np.array([0, 63, 5])
    rows = Tables(opened(toy)).rows(ids, positions)

    def tensor(name: str, index: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(toy.arrays[name][index].view(np.uint8).copy()).view(getattr(torch, dtype))

    expected = tensor("embedding", ids) + tensor("positions", positions)
    assert rows == expected.view(torch.uint8).numpy().tobytes()


def test_an_id_outside_the_vocabulary_is_refused_unnamed(toys: Toys) -> None:
    tables = Tables(opened(toys()))
    for bad in (101, 2**32 - 1):
        with pytest.raises(RequestInvalid) as caught:
            tables.rows(np.array([1, bad], np.uint32), np.arange(2))
        assert str(bad) not in caught.value.message


def test_a_position_outside_the_table_is_refused(toys: Toys) -> None:
    tables = Tables(opened(toys(tables=("embedding", "positions", "head"))))
    for bad in (-1, 64):
        with pytest.raises(PositionRefused):
            tables.rows(np.array([1], np.uint32), np.array([bad]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_the_head_computes_what_torch_computes_in_the_native_dtype(toys: Toys, dtype: str, bias: bool) -> None:
    toy = toys(dtype=dtype, tables=("embedding", "head", *(("head_bias",) if bias else ())))
    part = opened(toy)
    hidden = toy.embedding[[4, 9, 50]]
    logits = Head(part.head, part.head_bias, dtype).logits(hidden)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.view(np.uint8).copy()).view(getattr(torch, dtype))

    weight = tensor(toy.arrays["head"])
    expected = torch.nn.functional.linear(tensor(hidden), weight, tensor(toy.arrays["head_bias"]) if bias else None)
    assert logits.dtype == (np.float64 if dtype == "float64" else np.float32)
    # The order of sums in the product is another in float32; rounded to half precision it does not show.
    order = 64 * float(np.finfo(np.float32).eps) if dtype == "float32" else 0.0
    np.testing.assert_allclose(logits, expected.to(torch.float64).numpy(), rtol=0, atol=order)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_capped_head_computes_what_gemma2_computes_in_the_native_dtype(toys: Toys, dtype: str) -> None:
    toy = toys(dtype=dtype)
    part = opened(toy)
    vocabulary, width = toy.arrays["head"].shape
    config = Gemma2Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, tie_word_embeddings=False, final_logit_softcapping=0.5,
    )  # fmt: skip
    torch.manual_seed(3)
    model = Gemma2ForCausalLM(config).to(getattr(torch, dtype)).eval()
    model.lm_head.weight.data = torch.from_numpy(toy.arrays["head"].view(np.uint8).copy()).view(model.dtype)
    with torch.inference_mode():
        rows = torch.randn(1, 5, width).to(model.dtype)
        hidden = model.model(inputs_embeds=rows).last_hidden_state[0]
        expected = model(inputs_embeds=rows).logits[0]
    array = hidden.view(torch.uint8).numpy().view(toy.embedding.dtype)
    logits = torch.from_numpy(Head(part.head, None, dtype, logit_cap=0.5).logits(array))
    assert logits.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    # Rounded to the native dtype; what is left is the order of sums in the product.
    assert torch.equal(logits.to(model.dtype).to(logits.dtype), logits)
    torch.testing.assert_close(
        logits.to(model.dtype), expected, rtol=0, atol=max(1e-14, torch.finfo(model.dtype).eps / 2)
    )


async def test_an_opened_instance_caps_its_head_as_its_manifest_says(toys: Toys) -> None:
    toy = toys(logit_cap=0.5)
    instance = instance_of(toy)
    await instance.load(toy.grant)
    head = instance.opened.decoder._head
    assert head is not None
    logits = head.logits(toy.embedding[:3])
    plain = Head(opened(toy).head, None, "float32").logits(toy.embedding[:3])
    assert np.array_equal(logits, (torch.tanh(torch.from_numpy(plain) / 0.5) * 0.5).numpy())


@pytest.mark.parametrize(
    "toy", [{"preset": "hardened", "output": "ids"}, {"preset": "throughput", "output": "hidden"}], ids=str
)
def test_an_output_that_is_not_the_presets_is_refused(toys: Toys, toy: dict[str, str]) -> None:
    with pytest.raises(PresetRefused, match="manifest output"):
        instance_of(toys(**toy))


async def test_where_the_server_decodes_alone_the_enclave_holds_no_tables(toys: Toys) -> None:
    toy = toys(preset="throughput")
    instance = instance_of(toy)
    await instance.load(toy.grant)
    assert (instance.manifest.enclave, instance.loaded) == ({}, True)
    listed = toys(preset="throughput", tables=("embedding",))
    with pytest.raises(SealedPartInvalid, match="enclave part"):
        await instance_of(listed).load(listed.grant)


@pytest.mark.parametrize("field", ["instance", "epoch", "preset", "manifest_digest"])
async def test_a_grant_for_something_else_opens_no_substitution(toys: Toys, field: str) -> None:
    toy = toys(preset="throughput")
    other = {"instance": "0" * 32, "epoch": 3, "preset": "paper", "manifest_digest": bytes(32)}[field]
    with pytest.raises(ManifestMismatch, match=field):
        await instance_of(toy).load(toy.grant.model_copy(update={field: other}))


def flip(path: Any, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def swap(path: Any) -> None:
    """Exchange the first two chunks (512 bytes of plaintext and a tag each, after a header of 48 bytes)."""
    data, size = path.read_bytes(), 512 + 16
    path.write_bytes(data[:48] + data[48 + size : 48 + 2 * size] + data[48 : 48 + size] + data[48 + 2 * size :])


DAMAGE: dict[str, Callable[[Any], None]] = {
    "a flipped header byte": lambda path: flip(path, 20),
    "a flipped first chunk": lambda path: flip(path, 60),
    "a flipped last byte": lambda path: flip(path, -1),
    "swapped chunks": swap,
    "a file cut at a chunk border": lambda path: path.write_bytes(path.read_bytes()[: 48 + 528]),
    "a file cut anywhere": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "an extended file": lambda path: path.write_bytes(path.read_bytes() + os.urandom(528)),
    "an empty file": lambda path: path.write_bytes(b""),
    "no file": lambda path: path.unlink(),
    "another file's content": lambda path: path.write_bytes((path.parent / "head.sealed").read_bytes()),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("manifest_says_so_too", [False, True])
def test_a_damaged_part_does_not_open(toys: Toys, damage: str, manifest_says_so_too: bool) -> None:
    toy = toys()
    path = toy.folder / "enclave" / "embedding.sealed"
    DAMAGE[damage](path)
    if manifest_says_so_too and path.exists():
        resigned(toy)
    with pytest.raises(SealedPartInvalid):
        opened(toy)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("part_key", bytes(32), SealedPartInvalid),
        ("instance", "0" * 32, ManifestMismatch),
        ("epoch", 3, ManifestMismatch),
        ("preset", "paper", ManifestMismatch),
        ("manifest_digest", bytes(32), ManifestMismatch),
    ],
)
def test_a_grant_for_something_else_does_not_open(toys: Toys, field: str, value: Any, error: type[StipError]) -> None:
    with pytest.raises(error):
        opened(toys(), **{field: value})


@pytest.mark.parametrize(
    "change",
    [{"dtype": "float16"}, {"width": 13}, {"vocabulary": 102}, {"vocabulary": 100}, {"dtype": "bfloat16", "width": 24}],
)
def test_a_table_of_another_shape_or_dtype_is_refused(toys: Toys, change: dict[str, Any]) -> None:
    toy = toys()
    toy.manifest = toy.manifest.model_copy(update=change)
    with pytest.raises(SealedPartInvalid):
        opened(toy)


def test_a_part_needs_its_head_where_the_server_has_none(toys: Toys) -> None:
    with pytest.raises(SealedPartInvalid, match="head"):
        opened(toys(tables=("embedding",)))


def test_a_part_with_a_file_of_unknown_meaning_is_refused(toys: Toys) -> None:
    toy = toys()
    (toy.folder / "enclave" / "embedding.sealed").rename(toy.folder / "enclave" / "other.sealed")
    with pytest.raises(SealedPartInvalid, match="other"):
        opened(resigned(toy))


def instance_of(toy: Any, developer: Any = None) -> Instance:
    key = (developer or toy.developer).public_key()
    return Instance(toy.folder, key, lambda certificate: None, Limits(), Telemetry("enclave", simulated=True))  # type: ignore[arg-type,return-value]


async def test_an_instance_that_failed_to_open_stays_closed_and_opens_once_mended(toys: Toys) -> None:
    toy = toys()
    path = toy.folder / "enclave" / "head.sealed"
    whole = path.read_bytes()
    flip(path, 100)
    instance = instance_of(toy)
    with pytest.raises(SealedPartInvalid):
        await instance.load(toy.grant)
    assert not instance.loaded
    with pytest.raises(InstanceRefused):
        _ = instance.opened
    path.write_bytes(whole)
    await instance.load(toy.grant)
    assert instance.loaded


def test_a_manifest_of_another_developer_is_refused(toys: Toys) -> None:
    with pytest.raises(SignatureInvalid):
        instance_of(toys(), toys().developer)


@pytest.mark.parametrize("preset", ["paper", "throughput"])
async def test_a_grant_without_the_vocabulary_opens_no_instance_whose_head_is_outside(toys: Toys, preset: str) -> None:
    toy = toys(preset=preset)
    with pytest.raises(ManifestMismatch, match="vocabulary_seed"):
        await instance_of(toy).load(toy.grant.model_copy(update={"vocabulary_seed": None}))


def test_nothing_of_the_tables_shows_in_a_repr(toys: Toys) -> None:
    toy = toys()
    part = opened(toy)
    shown = repr(part) + repr(part.embedding) + repr(Tables(part)) + repr(toy.grant)
    assert toy.grant.part_key.hex() not in shown
    assert repr(toy.grant.part_key) not in shown
    assert str(float(toy.embedding[0, 0]))[:6] not in shown
