"""Checkpoints of real shapes with random weights, made at the speed of a disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LLAMA2_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "vocab_size": 32000,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
"""The published shape of meta-llama/Llama-2-7b-hf: 6.74e9 parameters, 13.5 GB in bfloat16."""
TINY = LLAMA2_7B | {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 12000,
}
"""The same form for smoke runs; its tables are larger than one of its shards."""
BLOCK_BYTES = 64 << 20
SMALL, ONE = 0x3C80, 0x3F80
"""bfloat16 bits of 2^-6 and of 1: with random sign and mantissa, weights of ±[1, 2)/64 and norms of [1, 2)."""

Tensor = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Written:
    """A checkpoint that was made."""

    files: tuple[Path, ...]
    nbytes: int
    largest: int
    """Bytes of the largest shard."""


def llama(layers: int) -> dict[str, Any]:
    """LLaMA2-7B with so many layers."""
    return LLAMA2_7B | {"num_hidden_layers": layers}


def tensors(config: dict[str, Any]) -> Iterator[Tensor]:
    """Names and shapes of a Llama checkpoint, in the model's order."""
    width, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocabulary, width)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name in "qkvo":
            yield f"{prefix}self_attn.{name}_proj.weight", (width, width)
        yield f"{prefix}mlp.gate_proj.weight", (inner, width)
        yield f"{prefix}mlp.up_proj.weight", (inner, width)
        yield f"{prefix}mlp.down_proj.weight", (width, inner)
        yield f"{prefix}input_layernorm.weight", (width,)
        yield f"{prefix}post_attention_layernorm.weight", (width,)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (vocabulary, width)


def nbytes(config: dict[str, Any]) -> int:
    """Bytes of the tensors of a Llama checkpoint."""
    return sum(_bytes(shape) for _, shape in tensors(config))


def write(folder: Path, config: dict[str, Any], *, shard_bytes: int, seed: int) -> Written:
    """A sharded bfloat16 checkpoint of `config` in `folder`, which is made."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shards = _shards(tensors(config), shard_bytes)
    random = np.random.Generator(np.random.SFC64(seed))
    weight_map: dict[str, str] = {}
    files = []
    for number, shard in enumerate(shards, start=1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(path, sorted(shard), random)
        weight_map |= {name: path.name for name, _ in shard}
        files.append(path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    sizes = [path.stat().st_size for path in files]
    return Written(tuple(files), sum(sizes), max(sizes))


def _shards(found: Iterator[Tensor], limit: int) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for name, shape in found:
        if shards[-1] and filled + _bytes(shape) > limit:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled += _bytes(shape)
    return shards


def _write_shard(path: Path, shard: list[Tensor], random: np.random.Generator) -> None:
    header: dict[str, Any] = {}
    reached = 0
    for name, shape in shard:
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [reached, reached + _bytes(shape)]}
        reached += _bytes(shape)
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)
    with path.open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        for _, shape in shard:
            mask, base = (0x007F, ONE) if len(shape) == 1 else (0x807F, SMALL)
            for first in range(0, _bytes(shape), BLOCK_BYTES):
                size = min(BLOCK_BYTES, _bytes(shape) - first)
                bits = np.frombuffer(bytearray(random.bytes(size)), np.uint16)
                np.bitwise_and(bits, mask, out=bits)
                np.bitwise_or(bits, base, out=bits)
                file.write(bits.data)


def _bytes(shape: tuple[int, ...]) -> int:
    return 2 * int(np.prod(shape))
