"""Decoding steps of fixed shapes: the same answers as steps of any shape. On a CPU they run unrecorded."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stip_protocol.errors import ConfigurationError
from stip_server.config import TransformersSettings
from stip_server.engine import Card, Form
from stip_server.engines.family import shape_of
from stip_server.engines.transfer import Transfer
from stip_server.engines.transformers import card_for, graphs, split
from stip_server.engines.transformers.attention import Run
from stip_server.engines.transformers.graphs import Bucket, Buckets
from stip_server.engines.transformers.layout import Layout
from stip_server.engines.transformers.parallel import Part
from stip_server.engines.transformers.runner import Runner
from tests.server.models import MODELS, tiny
from tests.server.stepping import Stepper, numbers, table_of

graphs.SHORTEST = 16  # So that the tiny models have buckets of several lengths.
RECORDABLE = [name for name in MODELS if shape_of(MODELS[name]()).unrecordable is None]
CPU = torch.device("cpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: recording CUDA graphs")


def card(sessions: int, positions: int, outputs: int = 8) -> Card:
    return Card("0" * 32, 0, b"", "plain", "float32", 1, 0, positions, sessions, (Form.HIDDEN,), outputs)


def part(slot: int, position: int, count: int) -> Part:
    return Part(slot, position, count, [], Form.HIDDEN, 1)


@st.composite
def steps(draw: st.DrawFn) -> tuple[Card, list[Part]]:
    made = card(draw(st.integers(1, 40)), draw(st.integers(1, 5000)), draw(st.integers(1, 9)))
    slots = draw(st.lists(st.integers(0, made.max_sessions - 1), min_size=1, max_size=9, unique=True))
    counts = st.integers(1, min(made.max_outputs, made.max_positions))
    work = []
    for slot, count in [(slot, draw(counts)) for slot in slots]:
        work.append(part(slot, draw(st.integers(0, made.max_positions - count)), count))
    return made, work


@given(steps())
def test_every_step_has_a_bucket_that_is_recorded_and_holds_it(step: tuple[Card, list[Part]]) -> None:
    made, work = step
    buckets = Buckets(made)
    bucket = buckets.holding(work)
    assert bucket is not None
    assert bucket in set(buckets)
    assert max(w.slot for w in work) < bucket.slots <= made.max_sessions
    assert max(w.count for w in work) <= bucket.rows <= made.max_outputs
    assert max(w.position + w.count for w in work) <= bucket.length <= made.max_positions
    assert bucket.slots < 2 * (max(w.slot for w in work) + 1)


def test_buckets_are_few_and_the_largest_is_recorded_first() -> None:
    buckets = list(Buckets(card(16, 4096)))
    assert len(buckets) == len(set(buckets)) == 5 * 2 * 9
    assert buckets[0] == Bucket(16, 8, 4096)
    assert list(Buckets(card(3, 100, outputs=1))) == [
        Bucket(slots, 1, length) for slots in (3, 2, 1) for length in (100, 64, 32, 16)
    ]


def test_a_chunk_of_a_prompt_has_no_bucket() -> None:
    assert Buckets(card(4, 100)).holding([part(0, 0, 9)]) is None


@given(steps())
def test_a_layout_stores_every_members_rows_and_nothing_else(step: tuple[Card, list[Part]]) -> None:
    made, work = step
    nowhere = made.max_positions
    bucket = Buckets(made).holding(work)
    assert bucket is not None
    for layout in (
        Layout.of(work, nowhere),
        Layout.within(work, nowhere, range(bucket.slots), bucket.rows),
    ):
        stored = {
            (slot, position)
            for slot, row in zip(layout.slots, layout.targets, strict=True)
            for position in row
            if position != nowhere
        }
        assert stored == {(w.slot, w.position + i) for w in work for i in range(w.count)}
        flat = [(slot, at) for slot, row in zip(layout.slots, layout.positions, strict=True) for at in row]
        for w, start in zip(work, layout.starts, strict=True):
            assert flat[start : start + w.count] == [(w.slot, w.position + i) for i in range(w.count)]
        assert all(0 <= at < layout.length <= made.max_positions for _, at in flat)
        runs = layout.runs or (Run(0, len(layout.slots), 0),)
        read = [layout.first + run.slot + i for run in runs for i in range(run.end - run.begin)]
        assert read == list(layout.slots)
        assert [run.begin for run in runs] == [0, *(run.end for run in runs[:-1])]
        assert len(runs) == 1 + sum(b != a + 1 for a, b in pairwise(layout.slots))


def runners(name: str, recorded: bool) -> tuple[Runner, Any]:
    model = tiny(name)
    base, head = split(model)
    settings = TransformersSettings(slots=6, graphs=recorded)
    return Runner(base, head, card_for(base, head, settings), settings), model


@pytest.mark.parametrize("name", RECORDABLE)
def test_fixed_shapes_give_the_hidden_states_of_any_shape(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    model = tiny(name)
    fixed, free = (Stepper(runners(name, wanted)[0], table_of(model)) for wanted in (True, False))

    def ids(count: int) -> list[int]:
        return torch.randint(1, 211, (count,), generator=generator).tolist()

    # Sessions join at different lengths, most of them apart; then steps of a few rows, some of them taken back.
    plans: list[list[tuple[int, list[int], int, int]]] = [[(slot, ids(3 + 4 * slot), 1, 0)] for slot in (0, 2, 4, 5)]
    for turn in range(8):
        members = [slot for slot in (5, 0, 4, 2) if (turn + slot) % 4]
        plans.append([(slot, ids(count), count, 0) for slot in members for count in [1 + (turn * slot) % 4]])
        plans.append([(slot, ids(1 + slot), 1, (turn * slot) % 4) for slot in members[:2]])
    for plan in plans:
        answers = []
        for stepper in (fixed, free):
            form = Form.HIDDEN
            answers.append(stepper.step(*(stepper.part(s, i, outputs, form, back) for s, i, outputs, back in plan)))
        for ours, expected in zip(*answers, strict=True):
            torch.testing.assert_close(numbers(ours), numbers(expected), rtol=0, atol=2e-5)


@pytest.mark.parametrize("form", list(Form))
def test_fixed_shapes_give_the_plain_models_tokens(form: Form) -> None:
    runner, model = runners("gemma2", True)
    generator = torch.Generator().manual_seed(6)
    prompts = [torch.randint(1, 211, (length,), generator=generator).tolist() for length in (1, 30, 9)]
    answers = Stepper(runner, table_of(model)).greedy(prompts, 14, form, model, chunk=7)
    with torch.inference_mode():
        for prompt, ids in zip(prompts, answers, strict=True):
            logits = model(torch.tensor([prompt + ids[:-1]])).logits[0, len(prompt) - 1 :]
            assert logits.argmax(dim=-1).tolist() == ids


async def test_an_engine_of_fixed_shapes_serves_sessions_that_come_and_go(plain: Any, run_direct: Any) -> None:
    jobs = [(plain.prompt(1 + 7 * i, seed=i), 9 + i) for i in range(6)]
    gate = asyncio.Semaphore(3)

    async def one(direct: Any, name: int) -> list[int]:
        async with gate:
            answer: list[int] = await direct.generate(name, *jobs[name], (Form.HIDDEN, Form.TOP)[name % 2])
            return answer

    async with run_direct(plain, graphs=True, slots=3) as direct:
        answers = await asyncio.gather(*(one(direct, i) for i in range(len(jobs))))
    assert answers == [plain.greedy(*job) for job in jobs]


def test_a_fixed_step_reads_only_its_buffers() -> None:
    runner, model = runners("llama", True)
    steps = runner._steps
    assert steps is not None
    addresses = {bucket: (s.rows.data_ptr(), s.positions.data_ptr()) for bucket, s in steps._steps.items()}
    stepper = Stepper(runner, table_of(model))
    for ids in ([4], [5], [6, 7]):
        stepper.step(stepper.part(1, ids, 1, Form.HIDDEN))
    bucket = Bucket(2, 1, 16)
    assert steps._steps[bucket].positions.tolist() == [[1], [1]]
    assert steps._steps[bucket].targets.tolist() == [[96], [1]]
    assert addresses == {b: (s.rows.data_ptr(), s.positions.data_ptr()) for b, s in steps._steps.items()}


@pytest.mark.parametrize("name", ["mixtral", "phi3, longrope"])
def test_a_model_that_cannot_be_recorded_is_refused_where_it_is_asked_for_and_served_otherwise(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^engine.graphs: got True, allowed: false"):
        runners(name, True)
    shape = shape_of(MODELS[name]())
    assert Buckets.chosen(None, shape, card(4, 64), torch.device("cuda"), cut=False) is None


def test_graphs_are_the_default_on_a_gpu_alone_and_not_for_a_model_that_is_cut() -> None:
    shape = shape_of(MODELS["llama"]())
    assert Buckets.chosen(None, shape, card(4, 64), torch.device("cuda"), cut=False) is not None
    assert Buckets.chosen(None, shape, card(4, 64), CPU, cut=False) is None
    assert Buckets.chosen(False, shape, card(4, 64), torch.device("cuda"), cut=False) is None
    assert Buckets.chosen(None, shape, card(4, 64), torch.device("cuda"), cut=True) is None
    with pytest.raises(ConfigurationError, match="other processes"):
        Buckets.chosen(True, shape, card(4, 64), CPU, cut=True)


def test_copies_for_a_cpu_are_no_copies() -> None:
    tensor = torch.arange(3)
    transfer = Transfer(CPU)
    assert transfer.up(tensor) is tensor
    (same,) = transfer.down([tensor])
    assert same is tensor


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_steps_give_what_steps_that_are_not_recorded_give(dtype: torch.dtype) -> None:
    model = tiny("llama", dtype).cuda()
    base, head = split(model)
    answers = []
    for recorded in (True, False):
        settings = TransformersSettings(slots=6, graphs=recorded, device="cuda")
        runner = Runner(base, head, card_for(base, head, settings), settings)
        stepper = Stepper(runner, table_of(model).cpu())
        for slot in (0, 1, 3):
            stepper.step(stepper.part(slot, [5 + slot] * (4 + slot), 1, Form.HIDDEN))
        answers.append(
            [
                numbers(result, dtype)
                for ids in ([7], [8, 9], [1])
                for result in stepper.step(*(stepper.part(slot, ids, len(ids), Form.HIDDEN) for slot in (3, 0, 1)))
            ]
        )
    for ours, expected in zip(*answers, strict=True):
        torch.testing.assert_close(ours, expected)
