"""The plain model in vLLM, called directly: the control of `throughput` served by vLLM.

`python -m benchmarks.vllm_plain CHECKPOINT '{"dtype": ...}'` runs in vLLM's own environment, which holds nothing else
of ours: it imports the standard library and vLLM alone. Orders come as JSON lines on stdin, answers go to stdout:

    {"prompts": [[id, ...], ...], "tokens": n}  ->  {"times": [[seconds, ...], ...], "ids": [[id, ...], ...]}

The second argument is the keyword arguments of `vllm.AsyncEngineArgs`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any, TextIO


async def _stream(
    engine: Any, prompt: list[int], params: Any, name: str, begun: float
) -> tuple[list[float], list[int]]:
    times: list[float] = []
    ids: list[int] = []
    async for output in engine.generate({"prompt_token_ids": prompt}, params, name):
        new = output.outputs[0].token_ids[len(ids) :]
        times += [time.perf_counter() - begun] * len(new)
        ids += new
    return times, ids


async def _serve(checkpoint: str, settings: dict[str, Any], answers: TextIO) -> None:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=checkpoint, skip_tokenizer_init=True, **settings))
    try:
        print(json.dumps({"ready": True}), file=answers, flush=True)
        number = 0
        while line := await asyncio.to_thread(sys.stdin.readline):
            order = json.loads(line)
            params = SamplingParams(temperature=0.0, max_tokens=order["tokens"], ignore_eos=True, detokenize=False)
            begun = time.perf_counter()
            streams = []
            for prompt in order["prompts"]:
                number += 1
                streams.append(_stream(engine, prompt, params, str(number), begun))
            found = await asyncio.gather(*streams)
            print(json.dumps({"times": [a for a, _ in found], "ids": [b for _, b in found]}), file=answers, flush=True)
    finally:
        engine.shutdown()


def main() -> None:
    """Serve orders until stdin ends."""
    checkpoint, settings = sys.argv[1], json.loads(sys.argv[2])
    # vLLM and what it starts write to stdout: answers get a descriptor of their own, and stdout becomes stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asyncio.run(_serve(checkpoint, settings, answers))


if __name__ == "__main__":
    main()
