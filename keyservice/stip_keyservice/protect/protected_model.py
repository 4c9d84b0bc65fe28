"""Running a protected instance as enclave and server together would, for certificates and audits.

Keyed rows come from the sealed tables, the blocks run in transformers on the server part, and the head is the
enclave's (its sealed head, or π_c undone on the server's logits). The whole server part is held in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load
from transformers import AutoModel, AutoModelForCausalLM

from stip_keyservice.protect.plan import EMBEDDING, HEAD, HEAD_BIAS, POSITIONS
from stip_protocol.errors import CheckpointInvalid, IntegrityError
from stip_protocol.keys import vocabulary_key
from stip_protocol.sealed import read_sealed


@dataclass(frozen=True)
class InstanceFiles:
    """Where an instance lies, and what opens it."""

    directory: Path
    instance: str
    epoch: int
    preset: str
    output: Literal["hidden", "top", "ids"]
    vocabulary: int
    part_key: bytes = field(repr=False)
    vocabulary_seed: bytes | None = field(repr=False)
    """Where the head is on the server."""

    def table(self, name: str, dtype: torch.dtype) -> torch.Tensor | None:
        """One tensor of the enclave part, None where the model has no such tensor. Raises `SealedPartInvalid`."""
        path = self.directory / "enclave" / f"{name}.sealed"
        if not path.exists():
            return None
        plain = read_sealed(
            path, key=self.part_key, instance=self.instance, epoch=self.epoch, preset=self.preset, file=path.name
        )
        return load(bytes(plain))[name].to(dtype)


class PlainModel:
    """The source checkpoint in transformers, computing in `dtype`."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        self._model, info = _load(AutoModelForCausalLM, directory, dtype)
        if missing := sorted(info["missing_keys"]):
            raise CheckpointInvalid.because("tensor", f"no {missing[0]}", "every tensor of the architecture")

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """[n, vocabulary] logits of one sequence of n ids."""
        with torch.inference_mode():
            logits: torch.Tensor = self._model(input_ids=ids[None], use_cache=False).logits[0]
        return logits


class ProtectedModel:
    """A protected instance in transformers, computing in `dtype`; its logits are in true order."""

    def __init__(self, files: InstanceFiles, dtype: torch.dtype) -> None:
        """Raises `IntegrityError` where the server part lacks tensors, has unknown ones, or the parts disagree."""
        embedding = files.table(EMBEDDING, dtype)
        if embedding is None:
            raise IntegrityError.because("enclave part", f"no {EMBEDDING}", "the keyed input table")
        self._embedding = embedding
        self._positions = files.table(POSITIONS, dtype)
        self._head = files.table(HEAD, dtype)
        self._head_bias = files.table(HEAD_BIAS, dtype)
        self._true_order: torch.Tensor | None = None
        if files.output == "top":
            if files.vocabulary_seed is None:
                raise IntegrityError.because("vocabulary seed", "none", "one, where the head is on the server")
            inverse = vocabulary_key(files.vocabulary_seed, files.vocabulary).inverse
            self._true_order = torch.from_numpy(inverse.index.copy())
        elif self._head is None:
            raise IntegrityError.because("enclave part", f"no {HEAD}", "the keyed head")
        kind = AutoModelForCausalLM if files.output == "top" else AutoModel
        self._model, info = _load(kind, files.directory / "server", dtype)
        for field_name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if found := sorted(map(str, info[field_name])):
                raise IntegrityError.because(f"server part {field_name}", found[0], "none")

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """[n, vocabulary] logits of one sequence of n ids."""
        with torch.inference_mode():
            rows = self._embedding[ids]
            if self._positions is not None:
                rows = rows + self._positions[: len(ids)]
            result = self._model(inputs_embeds=rows[None], use_cache=False)
            if self._true_order is not None:
                permuted: torch.Tensor = result.logits[0]
                return permuted[:, self._true_order]
            if self._head is None:
                raise IntegrityError.because("enclave part", f"no {HEAD}", "the keyed head")
            return torch.nn.functional.linear(result.last_hidden_state[0], self._head, self._head_bias)

    def move_within_rounding(self, dtype: torch.dtype, seed: int) -> None:
        """Move every weight at random by up to half the distance of its neighbours in `dtype`, to what it might
        have been before it was rounded. Norm weights, which are not rounded anew, stay.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self._model.named_parameters():
            if parameter.ndim > 1 or name.endswith("bias"):
                _move_within_rounding(parameter.data, dtype, generator)
        for table in (self._embedding, self._positions, self._head, self._head_bias):
            if table is not None:
                _move_within_rounding(table, dtype, generator)


def _move_within_rounding(tensor: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> None:
    """In place, for a float32 tensor of normal numbers of `dtype`; zeros stay."""
    step = torch.ldexp(torch.full_like(tensor, torch.finfo(dtype).eps / 2), torch.frexp(tensor).exponent)
    drawn = torch.rand(tensor.shape, generator=generator) - 0.5
    tensor.add_(torch.where(tensor == 0, 0.0, step * drawn))


def _load(kind: Any, directory: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """(model in evaluation mode, what loading found missing or left over)."""
    model, info = kind.from_pretrained(directory, dtype=dtype, local_files_only=True, output_loading_info=True)
    return model.eval(), info
