"""The plain model, run by transformers alone: what protected answers are held against."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


class Picks(Protocol):
    """The choice of the next id from one row of logits; the enclave's sampler is one."""

    def pick(self, logits: Any, step: int) -> int: ...


@dataclass(frozen=True)
class Divergence:
    """The first position where two greedy answers differ, and how close the plain model's own choice was there."""

    position: int
    plain_gap: float
    """Plain's best logit minus its second best."""


class PlainModel:
    """A checkpoint in its stored dtype on the CPU, with an ordinary KV cache."""

    def __init__(self, folder: Path, *, dtype: torch.dtype | str = "auto") -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        self.model.train(False)
        self.dtype: torch.dtype = self.model.dtype
        self.vocabulary: int = self.model.config.vocab_size

    @torch.inference_mode()
    def generate(self, ids: list[int], sampler: Picks, *, max_tokens: int, stop_ids: frozenset[int]) -> list[int]:
        """The ids after `ids`, one at a time, by the same picks as the enclave's; a stop id is not part of them."""
        out: list[int] = []
        step_ids, cache = torch.tensor([ids]), None
        while len(out) < max_tokens:
            result = self.model(input_ids=step_ids, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            chosen = sampler.pick(result.logits[0, -1].float().numpy(), len(out))
            if chosen in stop_ids:
                break
            out.append(chosen)
            step_ids = torch.tensor([[chosen]])
        return out

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """Teacher-forced: row i [V] is what the model says after `ids[: i + 1]`."""
        rows: NDArray[np.float32] = self.model(input_ids=torch.tensor([ids])).logits[0].float().numpy()
        return rows

    @torch.inference_mode()
    def divergence(self, ids: list[int], plain: list[int], protected: list[int]) -> Divergence | None:
        """None where both answers are the same; otherwise the first difference with plain's top-two gap there."""
        for at, (ours, theirs) in enumerate(zip(plain, protected, strict=False)):
            if ours != theirs:
                logits = self.model(input_ids=torch.tensor([ids + plain[:at]])).logits[0, -1].double()
                best = logits.topk(2).values
                return Divergence(at, float(best[0] - best[1]))
        return None if len(plain) == len(protected) else Divergence(min(len(plain), len(protected)), 0.0)


@torch.inference_mode()
def without_keys(server_part: Path, plain: PlainModel, ids: list[int], *, max_tokens: int) -> list[int]:
    """What the server part says to somebody who has no key (the paper's Table 4).

    Generous to them: they are handed the plain embedding table, and where the server part has no head, the plain
    head too. This shows that the server part is of no use as it stands. It is no measure of security: what an
    attacker does with more effort is in docs/security.md.
    """
    architecture = AutoConfig.from_pretrained(server_part, local_files_only=True).architectures[0]
    stolen: Any = getattr(transformers, architecture).from_pretrained(server_part, dtype="auto", local_files_only=True)
    stolen.train(False)
    base = stolen.base_model
    head = stolen.get_output_embeddings() or plain.model.get_output_embeddings()
    embed = plain.model.get_input_embeddings()
    out: list[int] = []
    while len(out) < max_tokens:
        rows = embed(torch.tensor([ids + out]))
        hidden = base(inputs_embeds=rows).last_hidden_state[:, -1]
        out.append(int(head(hidden)[0].argmax()))
    return out
