"""Every family that the engine serves gives what transformers' own model gives, whoever else is served with it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch

from stip_protocol.errors import CheckpointInvalid
from stip_server.config import TransformersSettings
from stip_server.engine import Form, Hidden, Logits, Top
from stip_server.engines.transformers import card_for, split
from stip_server.engines.transformers.attention import slot_attention
from stip_server.engines.transformers.runner import Runner
from tests.server.models import MODELS, POSITIONS, WINDOW, tiny

BOUNDS = {torch.float32: 2e-5, torch.float64: 1e-13}
"""Largest difference of hidden states and logits, whose standard deviations are 0.2 to 2."""
FLOAT32_SOFTMAX = 5e-6
"""The same where the reference goes through float32 in a float64 model: transformers' softmax of capped scores."""


def numbers(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype)


class Reference:
    """A model of transformers, its rows, and what it computes over a whole session at once, without a cache."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.dtype = tiny(name, dtype), dtype
        # Through the module: Gemma scales its rows.
        with torch.inference_mode():
            self.table = self.model.get_input_embeddings()(torch.arange(self.model.config.vocab_size)).clone()
        self.positions = min(POSITIONS, getattr(self.model.config, "original_max_position_embeddings", POSITIONS))

    def rows(self, ids: list[int]) -> bytes:
        return self.table[ids].view(torch.uint8).numpy().tobytes()

    def prompt(self, length: int, seed: int) -> list[int]:
        high = self.model.config.vocab_size
        return torch.randint(1, high, (length,), generator=torch.Generator().manual_seed(seed)).tolist()

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> torch.Tensor:
        return self.model(torch.tensor([ids])).logits[0]

    @torch.inference_mode()
    def hidden(self, ids: list[int]) -> torch.Tensor:
        return self.model.base_model(torch.tensor([ids])).last_hidden_state[0]

    @torch.inference_mode()
    def pick(self, out: Hidden | Top) -> int:
        """The greedy id, as an enclave would find it."""
        if isinstance(out, Top):
            return int.from_bytes(out.indices[:4], "little")
        # A cap does not change which logit is the largest.
        return int(self.model.get_output_embeddings()(numbers(out.rows, self.dtype)[None])[0].argmax())


async def served(
    direct: Any, name: int, prompt: list[int], count: int, form: Form, frame: int = 1000
) -> tuple[list[int], list[Any]]:
    """Greedy ids of a session, and what the engine answered for each."""
    session = direct.open(name, form, direct.plain.positions)
    for start in range(0, len(prompt), frame):
        direct.feed(session, prompt[start : start + frame], last=start + frame >= len(prompt))
    ids: list[int] = []
    outputs = []
    while True:
        output = await direct.next(session)
        outputs.append(output.out)
        ids.append(direct.plain.pick(output.out))
        if len(ids) == count:
            direct.engine.close(session)
            return ids, outputs
        direct.feed(session, ids[-1:])


def difference(reference: Reference, prompt: list[int], ids: list[int], outputs: list[Any]) -> float:
    """The largest difference between a session's outputs and the reference's; its ids must be the reference's own."""
    session = prompt + ids[:-1]
    logits, hidden = reference.logits(session)[len(prompt) - 1 :], reference.hidden(session)[len(prompt) - 1 :]
    assert logits.argmax(dim=-1).tolist() == ids
    found = 0.0
    for i, out in enumerate(outputs):
        if isinstance(out, Top):
            at = numbers(out.indices, torch.uint32).long()
            got, expected = numbers(out.values, reference.dtype), logits[i, at]
            total = logits[i].logsumexp(0).float()
            torch.testing.assert_close(numbers(out.log_sum_exp, torch.float32)[0], total, rtol=1e-5, atol=1e-5)
        else:
            got, expected = numbers(out.rows, reference.dtype), hidden[i]
        found = max(found, float((got - expected).abs().max()))
    return found


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", MODELS)
async def test_ragged_sessions_far_past_a_window_get_what_each_gets_alone_from_transformers(
    run_direct: Any, name: str, dtype: torch.dtype
) -> None:
    reference = Reference(name, dtype)
    rounded = dtype is torch.float64 and reference.model.config._attn_implementation == "eager"
    bound = FLOAT32_SOFTMAX if rounded else BOUNDS[dtype]
    jobs = [(reference.prompt(1 + 11 * i % 41, seed=i), 12 + 9 * i % 28) for i in range(9)]
    jobs.append((reference.prompt(reference.positions - 6, seed=9), 7))
    assert all(len(prompt) + count > WINDOW for prompt, count in jobs[1:])
    gate = asyncio.Semaphore(5)

    async def one(direct: Any, i: int) -> tuple[list[int], list[Any]]:
        async with gate:
            return await served(direct, i, *jobs[i], (Form.HIDDEN, Form.TOP)[i % 2], frame=13)

    async with run_direct(reference, prefill_chunk=8, slots=5) as direct:
        answers = await asyncio.gather(*(one(direct, i) for i in range(len(jobs))))
        assert max(step.sessions for step in direct.steps) > 1
    for (prompt, _), (ids, outputs) in zip(jobs, answers, strict=True):
        assert difference(reference, prompt, ids, outputs) < bound


@pytest.mark.parametrize("name", MODELS)
async def test_every_row_of_a_lone_session_is_right_whatever_the_chunks(run_direct: Any, name: str) -> None:
    reference = Reference(name)
    ids = reference.prompt(3 * WINDOW, seed=4)
    expected = reference.hidden(ids)
    for chunk, frames in ((1, [1] * len(ids)), (4, [1, 3, *([4] * 5), 3]), (64, [WINDOW, 1, WINDOW + 2, 6])):
        async with run_direct(reference, prefill_chunk=chunk) as direct:
            session = direct.open(1, positions=reference.positions)
            fed = 0
            for count in frames:
                direct.feed(session, ids[fed : fed + count])
                fed += count
                row = numbers((await direct.next(session)).out.rows, torch.float32)
                assert float((row - expected[fed - 1]).abs().max()) < BOUNDS[torch.float32]
            assert fed == len(ids)


@pytest.mark.parametrize("name", MODELS)
async def test_a_session_gets_the_same_alone_and_between_idle_hostile_and_leaving_neighbours(
    run_direct: Any, name: str
) -> None:
    reference = Reference(name)
    prompt, count = reference.prompt(14, seed=1), 20
    async with run_direct(reference, prefill_chunk=8) as direct:
        alone = await served(direct, 0, prompt, count, Form.HIDDEN)

    async def comes_and_goes(direct: Any, first: int) -> None:
        for i in range(4):
            await served(direct, first + i, reference.prompt(3 + i, seed=first + i), 3 + i, Form.TOP)

    async with run_direct(reference, prefill_chunk=8) as direct:
        idle = [direct.open(i, positions=reference.positions) for i in (1, 2)]
        direct.feed(idle[0], reference.prompt(30, seed=2))
        await direct.next(idle[0])
        first = asyncio.create_task(served(direct, 3, prompt, count, Form.HIDDEN))
        direct.feed(idle[1], reference.prompt(5, seed=3))
        await direct.next(idle[1])
        hostile = direct.open(4, positions=reference.positions)
        direct.raw(hostile, torch.full((1, direct.card.width), 3e38).numpy().tobytes(), 1)
        second = asyncio.create_task(served(direct, 5, prompt, count, Form.HIDDEN))
        await comes_and_goes(direct, 10)
        together = [await first, await second]
    for ids, outputs in together:
        assert ids == alone[0]
        for got, expected in zip(outputs, alone[1], strict=True):
            distance = numbers(got.rows, torch.float32) - numbers(expected.rows, torch.float32)
            assert float(distance.abs().max()) < BOUNDS[torch.float32]


@pytest.mark.parametrize("name", MODELS)
async def test_bfloat16_stays_about_as_close_to_float32_as_transformers_does(run_direct: Any, name: str) -> None:
    exact, reference = Reference(name), Reference(name, torch.bfloat16)
    ours = theirs = 0.0
    async with run_direct(reference, prefill_chunk=8) as direct:
        for seed in range(8):
            prompt = reference.prompt(25 + seed, seed)
            _, (out,) = await served(direct, seed, prompt, 1, Form.HIDDEN)
            expected = exact.hidden(prompt)[-1]
            ours += float((numbers(out.rows, torch.bfloat16).float() - expected).norm())
            theirs += float((reference.hidden(prompt)[-1].float() - expected).norm())
    assert 0 < ours <= 1.3 * theirs


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
async def test_a_recalled_row_is_capped_as_the_model_caps_it(run_direct: Any, name: str) -> None:
    reference = Reference(name)
    prompt = reference.prompt(20, seed=1)
    async with run_direct(reference) as direct:
        session = direct.open(1, Form.TOP)
        direct.feed(session, prompt)
        output = await direct.next(session)
        direct.engine.recall(session, output.position)
        recalled = (await direct.next(session)).out
    assert isinstance(recalled, Logits)
    torch.testing.assert_close(
        numbers(recalled.rows, torch.float32), reference.logits(prompt)[-1], rtol=0, atol=BOUNDS[torch.float32]
    )


CHANGES: dict[str, tuple[str, dict[str, Any], str]] = {
    "a family that is not in the table": ("llama", {"model_type": "cohere"}, "model_type"),
    "attention to what follows": ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "attention that is not causal": ("llama", {"is_causal": False}, "is_causal"),
    "attention that is computed in another order": ("gpt2", {"reorder_and_upcast_attn": True}, "reorder"),
    "an empty window": ("mistral, sliding", {"sliding_window": 0}, "sliding_window"),
    "layers that slide without a window": ("gemma2", {"sliding_window": None}, "sliding_window"),
    "an unknown kind of layer": ("qwen3, some layers slide", {"layer_types": ["chunked_attention"] * 3}, "layer_types"),
    "dynamic rotary frequencies": ("llama", {"rope_parameters": {"rope_type": "dynamic"}}, "rope_type"),
    "an unknown rotary type": ("llama", {"rope_parameters": {"rope_type": "spiral"}}, "rope_type"),
    "dynamic rotary frequencies of one kind of layer": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {}}},
        "rope_type",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_engine_would_get_wrong_is_refused_by_field(change: str) -> None:
    name, fields, field = CHANGES[change]
    base, head = split(tiny(name))
    for key, value in fields.items():
        setattr(base.config, key, value)
    with pytest.raises(CheckpointInvalid, match=f"^{field}"):
        card_for(base, head, TransformersSettings())


def test_sessions_of_a_longrope_model_stay_within_its_original_length() -> None:
    base, head = split(tiny("phi3, longrope"))
    card = card_for(base, head, TransformersSettings(max_positions=90))
    assert card.max_positions == 72
    with pytest.raises(CheckpointInvalid, match="max_positions"):
        Runner(base, head, replace(card, max_positions=73))


def test_a_model_that_does_not_fit_its_configuration_is_refused_at_the_start() -> None:
    base, head = split(tiny("llama"))
    card = card_for(base, head, TransformersSettings())
    base.config.head_dim = 16
    with pytest.raises(CheckpointInvalid, match="does not step"):
        Runner(base, head, card)


@pytest.mark.parametrize("name", ["s_aux", "is_causal", "something_new"])
def test_an_argument_that_could_change_attention_is_refused(name: str) -> None:
    tensors = [torch.zeros(1, 2, 3, 4)] * 3
    slot_attention(torch.nn.Identity(), *tensors, None, sliding_window=9, **{name: None})
    with pytest.raises(CheckpointInvalid, match=name):
        slot_attention(torch.nn.Identity(), *tensors, None, **{name: torch.zeros(2)})
