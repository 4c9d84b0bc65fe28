"""An instance of random tables, and what its model says.

The model chains a digest through the rows it is fed, so that every answer depends on every row before it: a row that is
lost, repeated, moved or of somebody else changes all that follows.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from stip_enclave.sampling import Sampler, Sampling
from stip_protocol.keys import vocabulary_key
from stip_protocol.manifest import Manifest, file_digest
from stip_protocol.release import Grant
from stip_protocol.sealed import SealedWriter

SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
NUMPY = {"float32": "<f4", "float64": "<f8", "float16": "<f2", "bfloat16": ml_dtypes.bfloat16}
OUTPUTS = {"hardened": "hidden", "paper": "top", "throughput": "ids"}
TABLES = {"hardened": ("embedding", "head"), "paper": ("embedding",), "throughput": ()}
START = bytes(32)
"""The model's state before the first row."""


def safetensors_file(name: str, array: np.ndarray, dtype: str) -> bytes:
    data = np.ascontiguousarray(array).tobytes()
    header = json.dumps(
        {name: {"dtype": SAFETENSORS[dtype], "shape": list(array.shape), "data_offsets": [0, len(data)]}}
    ).encode()
    return len(header).to_bytes(8, "little") + header + data


@dataclass
class Toy:
    """An instance directory in its real form, with what is in it known to the test."""

    folder: Path
    manifest: Manifest
    digest: bytes
    grant: Grant
    developer: Ed25519PrivateKey
    arrays: dict[str, np.ndarray]

    @property
    def embedding(self) -> np.ndarray:
        return self.arrays["embedding"]

    def order(self) -> np.ndarray:
        """π_c.index: the true id at each permuted one."""
        assert self.grant.vocabulary_seed is not None
        return vocabulary_key(self.grant.vocabulary_seed, self.manifest.vocabulary).index

    def after(self, state: bytes, row: bytes) -> bytes:
        return hashlib.sha256(state + row).digest()

    def hidden(self, state: bytes) -> np.ndarray:
        """[d] in the native dtype."""
        random = np.random.Generator(np.random.Philox(key=int.from_bytes(state[:16], "little")))
        return random.standard_normal(self.manifest.width).astype(NUMPY[self.manifest.dtype])

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """float32 [V], true order."""
        logits = self.arrays["head"].astype(np.float32) @ hidden.astype(np.float32)
        return logits + self.arrays["head_bias"].astype(np.float32) if "head_bias" in self.arrays else logits

    def state(self, ids: list[int]) -> bytes:
        state = START
        for one in ids:
            state = self.after(state, self.embedding[one].tobytes())
        return state

    def generate(self, prompt: list[int], count: int, **sampling: Any) -> list[int]:
        """The plain answer to a whole sequence."""
        sampler, out, state = Sampler(Sampling(**sampling)), [], self.state(prompt)
        for step in range(count):
            out.append(sampler.pick(self.logits(self.hidden(state)), step))
            state = self.after(state, self.embedding[out[-1]].tobytes())
        return out


def make_toy(
    folder: Path,
    *,
    preset: str = "hardened",
    dtype: str = "float32",
    vocabulary: int = 101,
    width: int = 12,
    max_positions: int = 64,
    tables: tuple[str, ...] | None = None,
    chunk_bytes: int = 512,
    **fields: Any,
) -> Toy:
    """`fields` of the manifest."""
    generator = np.random.default_rng(5)
    shapes = {
        "embedding": (vocabulary, width),
        "positions": (max_positions, width),
        "head": (vocabulary, width),
        "head_bias": (vocabulary,),
    }
    names = TABLES[preset] if tables is None else tables
    arrays = {name: generator.normal(size=shapes[name]).astype(NUMPY[dtype]) for name in shapes}
    developer, part_key = Ed25519PrivateKey.generate(), secrets.token_bytes(32)
    instance = secrets.token_hex(16)
    (folder / "enclave").mkdir(parents=True)
    for name in names:
        with SealedWriter(
            folder / "enclave" / f"{name}.sealed",
            key=part_key,
            instance=instance,
            epoch=2,
            preset=preset,
            chunk_bytes=chunk_bytes,
        ) as writer:
            writer.write(safetensors_file(name, arrays[name], dtype))
    manifest = Manifest.model_validate(
        {
            "instance": instance,
            "epoch": 2,
            "preset": preset,
            "dtype": dtype,
            "width": width,
            "vocabulary": vocabulary,
            "max_positions": max_positions,
            "output": OUTPUTS[preset],
            "server": {},
            "enclave": {path.name: file_digest(path) for path in (folder / "enclave").iterdir()},
            "certificate": {},
            **fields,
        }
    )
    digest = manifest.write(folder / "manifest.json", developer)
    grant = Grant(
        instance=instance,
        epoch=2,
        preset=preset,
        manifest_digest=digest,
        part_key=part_key,
        vocabulary_seed=None if preset == "hardened" else secrets.token_bytes(32),
    )
    return Toy(folder, manifest, digest, grant, developer, {n: arrays[n] for n in {*names, "embedding", "head"}})
