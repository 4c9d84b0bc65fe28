"""What is asked of vLLM: one request a step, or one a generation. Nothing is tokenized, detokenized or logged."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import torch
from vllm import PoolingParams, SamplingParams
from vllm.sampling_params import RequestOutputKind

from stip_protocol.errors import RequestInvalid
from stip_server.engine import Generation
from stip_server.engines.vllm.sequence import Ids, Rows

SEED_DOMAIN = b"stip vllm seed\x00"
MOST_TEMPERATURE = 2.0
"""vLLM takes no larger one."""
STOPPED = "stop"
"""vLLM's reason for an end by one of our stop ids: the id is then the last of the output."""


@dataclass(frozen=True)
class Delta:
    """Ids that a generation brought since the one before."""

    ids: list[int]
    done: bool


def seed_of(generation: Generation) -> int:
    """vLLM draws from one stream a request: one of its own for each (seed, step), so that a generation that goes on
    elsewhere repeats no draw. 63 bits, what torch takes."""
    message = SEED_DOMAIN + generation.seed.to_bytes(8, "little") + generation.step.to_bytes(4, "little")
    return int.from_bytes(hashlib.sha256(message).digest()[:8], "little") >> 1


def sampling(generation: Generation, vocabulary: int) -> SamplingParams:
    """vLLM's words for a generation. Its own idea of an end of sequence is switched off.

    Raises `RequestInvalid` for what vLLM does not offer.
    """
    if generation.temperature > MOST_TEMPERATURE:
        raise RequestInvalid.because("temperature", "a larger value", f"0 to {MOST_TEMPERATURE:g}, which vLLM offers")
    return SamplingParams(
        temperature=generation.temperature,
        top_k=generation.top_k,
        top_p=generation.top_p or 1.0,
        seed=seed_of(generation) if generation.temperature else None,
        max_tokens=generation.max_ids,
        stop_token_ids=sorted(each for each in generation.stop_ids if each < vocabulary),
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


async def generated(
    llm: Any, name: str, history: Ids, salt: str, params: SamplingParams
) -> AsyncGenerator[Delta, None]:
    """Ids that follow `history`, until it is done; closing it ends the request."""
    prompt = {"type": "token", "prompt_token_ids": list(history.ids), "cache_salt": salt}
    async with contextlib.aclosing(llm.generate(prompt, params, name)) as outputs:
        async for output in outputs:
            (completion,) = output.outputs
            ids = list(completion.token_ids)
            if completion.finish_reason == STOPPED:
                del ids[-1]
            yield Delta(ids, output.finished)


async def last_state(llm: Any, name: str, history: Rows, salt: str) -> torch.Tensor:
    """The hidden state [d] after the final norm of the last row. Blocks of rows that were sent before are found in the
    prefix cache; the rows themselves travel again."""
    prompt = {"type": "embeds", "prompt_embeds": history.tensor(), "cache_salt": salt}
    state: torch.Tensor | None = None
    async for output in llm.encode(prompt, PoolingParams(task="embed", use_activation=False), name):
        state = output.outputs.data
    if state is None or not state.numel():
        raise RuntimeError("no hidden state came back")
    return state
