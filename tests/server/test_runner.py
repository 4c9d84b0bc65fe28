"""Steps of several rows of several sessions: each session gets what transformers computes over it alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stip_server.config import TransformersSettings
from stip_server.engine import Form, Hidden, Top
from stip_server.engines.transformers import card_for, split
from stip_server.engines.transformers.cache import SlotLayer
from stip_server.engines.transformers.runner import Runner
from stip_server.engines.transformers.slots import Vacate
from tests.server.models import MODELS, POSITIONS, VOCABULARY, WINDOW, tiny
from tests.server.stepping import Stepper, numbers, table_of

BOUND = 2e-5
SLOTS = 6


def stepper_of(name: str) -> tuple[Stepper, Any]:
    model = tiny(name)
    base, head = split(model)
    settings = TransformersSettings(slots=SLOTS)
    return Stepper(Runner(base, head, card_for(base, head, settings)), table_of(model)), model


def layers(stepper: Stepper) -> list[SlotLayer]:
    found: list[SlotLayer] = stepper.runner._cache._slot_layers
    return found


class Sessions:
    """Sessions of a stepper, with the ids that each one holds, and what transformers says of them."""

    def __init__(self, name: str) -> None:
        self.stepper, self.model = stepper_of(name)
        self.held: dict[int, list[int]] = {}
        self._random = torch.Generator().manual_seed(9)

    def ids(self, count: int) -> list[int]:
        return torch.randint(1, VOCABULARY, (count,), generator=self._random).tolist()

    @torch.inference_mode()
    def hidden(self, slot: int, outputs: int) -> torch.Tensor:
        return self.model.base_model(torch.tensor([self.held[slot]])).last_hidden_state[0, -outputs:].flatten()

    @torch.inference_mode()
    def logits(self, slot: int, outputs: int) -> torch.Tensor:
        return self.model(torch.tensor([self.held[slot]])).logits[0, -outputs:]

    def step(self, *wanted: tuple[int, int, int], form: Form = Form.HIDDEN, back: int = 0) -> list[Any]:
        """One step of (slot, rows, outputs)."""
        parts = []
        for slot, count, outputs in wanted:
            ids = self.ids(count)
            self.held[slot] = self.held.get(slot, [])[: len(self.held.get(slot, [])) - back] + ids
            parts.append(self.stepper.part(slot, ids, outputs, form, back))
        return self.stepper.step(*parts)

    def check(self, results: list[Any], *wanted: tuple[int, int, int]) -> None:
        for (slot, _, outputs), result in zip(wanted, results, strict=True):
            assert result.error is None
            if outputs == 0:
                assert result.out is None
            else:
                torch.testing.assert_close(numbers(result), self.hidden(slot, outputs), rtol=0, atol=BOUND)


@pytest.mark.parametrize("name", MODELS)
def test_sessions_with_different_numbers_of_rows_get_all_their_outputs_far_past_a_window(name: str) -> None:
    sessions = Sessions(name)
    for slot, prompt in ((4, 2), (0, 3 * WINDOW), (2, 17)):
        sessions.check(sessions.step((slot, prompt, 1)), (slot, prompt, 1))
    # In another order than that of the slots, with gaps between them, and with more rows than are answered.
    for step in (
        [(2, 1, 1), (4, 8, 8), (0, 3, 2)],
        [(4, 5, 1), (0, 1, 1)],
        [(0, 2, 0), (2, 8, 3), (4, 1, 1)],
        [(2, 1, 1), (0, 1, 1), (4, 1, 1)],
        [(4, 4, 4)],
    ):
        sessions.check(sessions.step(*step), *step)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mistral, sliding"])
def test_rows_that_are_taken_back_leave_no_trace(name: str) -> None:
    sessions = Sessions(name)
    for slot, prompt in ((0, 20), (1, 4)):
        sessions.step((slot, prompt, 1))
    for rows, back in ((8, 0), (5, 7), (1, 4), (8, 0), (8, 7), (2, 3)):
        wanted = (1, rows, rows), (0, rows, 1)
        sessions.check(sessions.step(*wanted, back=back), *wanted)
    sessions.check(sessions.step((0, 3, 3), back=1), (0, 3, 3))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_nobody_elses_keys_and_values_change_in_a_step(name: str) -> None:
    sessions = Sessions(name)
    for slot in range(SLOTS):
        sessions.step((slot, 5 + slot, 1))
    before = [(layer.keys.clone(), layer.values.clone()) for layer in layers(sessions.stepper)]
    sessions.step((5, 1, 1), (1, 4, 1), (3, 2, 1))
    own = torch.zeros(SLOTS, POSITIONS, dtype=torch.bool)
    for slot, count in ((5, 1), (1, 4), (3, 2)):
        own[slot, 5 + slot : 5 + slot + count] = True
    for layer, stores in zip(layers(sessions.stepper), before, strict=True):
        for now, then in zip((layer.keys, layer.values), stores, strict=True):
            changed = (now != then).any(dim=(1, 3))
            assert torch.equal(changed, own)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "opt, norms after and a projection"])
def test_ids_are_embedded_as_the_model_embeds_them_and_answered_with_the_last_row(name: str) -> None:
    sessions = Sessions(name)
    for step in ([(1, 12, 1)], [(0, 6, 0)], [(1, 1, 1), (0, 3, 1)], [(0, 1, 1), (1, 1, 1)]):
        for (slot, _, outputs), result in zip(step, sessions.step(*step, form=Form.IDS), strict=True):
            assert (result.out, result.error, len(result.logits)) == (None, None, outputs)
            for row in result.logits:
                torch.testing.assert_close(row.batch[row.index], sessions.logits(slot, 1)[0], rtol=0, atol=BOUND)


def test_every_output_of_a_top_has_its_row() -> None:
    sessions = Sessions("gemma2")
    sessions.step((0, 9, 1), form=Form.TOP)
    step = [(2, 5, 4), (0, 3, 3)]
    for (slot, _, outputs), result in zip(step, sessions.step(*step, form=Form.TOP), strict=True):
        expected, top = sessions.logits(slot, outputs), result.out
        assert isinstance(top, Top)
        assert len(result.logits) == outputs
        indices = torch.frombuffer(bytearray(top.indices), dtype=torch.uint32).long().view(outputs, top.count)
        values = torch.frombuffer(bytearray(top.values), dtype=torch.float32).view(outputs, top.count)
        sums = torch.frombuffer(bytearray(top.log_sum_exp), dtype=torch.float32)
        torch.testing.assert_close(values, expected.gather(1, indices), rtol=0, atol=BOUND)
        torch.testing.assert_close(values[:, 0], expected.amax(dim=1), rtol=0, atol=BOUND)
        torch.testing.assert_close(sums, expected.logsumexp(dim=1), rtol=1e-5, atol=BOUND)
        for row, logits in zip(result.logits, expected, strict=True):
            got = torch.frombuffer(bytearray(row.alone().read().rows), dtype=torch.float32)
            torch.testing.assert_close(got, logits, rtol=0, atol=BOUND)


def test_forms_share_a_step() -> None:
    sessions = Sessions("gemma2")
    parts, forms = [], (Form.IDS, Form.HIDDEN, Form.TOP)
    for slot, form in enumerate(forms):
        sessions.held[slot] = sessions.ids(4 + slot)
        parts.append(sessions.stepper.part(slot, sessions.held[slot], 1, form))
    ids, hidden, top = sessions.stepper.step(*parts)
    assert int(ids.logits[0].batch[ids.logits[0].index].argmax()) == int(sessions.logits(0, 1).argmax())
    torch.testing.assert_close(numbers(hidden), sessions.hidden(1, 1), rtol=0, atol=BOUND)
    assert isinstance(top.out, Top)
    assert int.from_bytes(top.out.indices[:4], "little") == int(sessions.logits(2, 1).argmax())


@pytest.mark.parametrize("at", [0, 2], ids=["in a row that is not answered", "in a row that is"])
def test_an_overflow_ends_its_session_alone(at: int) -> None:
    sessions = Sessions("gpt2")
    parts = []
    for slot in (0, 1):
        sessions.held[slot] = sessions.ids(3)
        parts.append(sessions.stepper.part(slot, sessions.held[slot], 1, Form.HIDDEN))
    rows = torch.frombuffer(bytearray(b"".join(parts[0].rows)), dtype=torch.float32).view(3, -1)
    rows[at] = 3e38
    parts[0].rows[:] = [memoryview(rows.numpy().tobytes())]
    bad, good = sessions.stepper.step(*parts)
    assert bad.error is not None
    assert bad.out is None
    assert bad.error.field == "hidden state"
    torch.testing.assert_close(numbers(good), sessions.hidden(1, 1), rtol=0, atol=BOUND)


@pytest.mark.parametrize("name", ["mistral, sliding", "gemma2", "llama"])
def test_a_layer_with_a_window_reads_no_further_back_than_the_lowest_row_sees(name: str) -> None:
    sessions = Sessions(name)
    read: list[tuple[int, int | None]] = []
    for layer in layers(sessions.stepper):
        stored = layer.update

        def update(
            keys: torch.Tensor, values: torch.Tensor, *rest: Any, stored: Any = stored, layer: SlotLayer = layer
        ) -> Any:
            seen = stored(keys, values, *rest)
            read.append((seen[0].shape[2], layer.window))
            return seen

        layer.update = update  # type: ignore[method-assign]
    sessions.step((0, 40, 1))
    sessions.step((1, 43, 1))
    for wanted in ([(0, 1, 1)], [(0, 1, 1), (1, 1, 1)]):
        read.clear()
        sessions.check(sessions.step(*wanted), *wanted)
        length = max(len(sessions.held[slot]) for slot, _, _ in wanted)
        apart = length - min(len(sessions.held[slot]) for slot, _, _ in wanted)
        assert len(read) == 3
        for positions, window in read:
            assert positions == (length if window is None else WINDOW + apart)


def test_a_slot_that_is_left_is_empty_and_the_last_one_takes_its_place() -> None:
    sessions = Sessions("llama")
    sessions.step((0, 9, 1))
    sessions.step((1, 6, 1), (0, 4, 1))
    runner = sessions.stepper.runner
    part = sessions.stepper.part(1, [5], 1, Form.HIDDEN)
    ids = [*sessions.held[1], 5]
    moved = type(part)(0, part.position, part.count, part.rows, part.form, part.outputs)
    ((result,), _) = runner.step([Vacate(0, 1, 13, 6)], [moved])
    assert isinstance(result.out, Hidden)
    with torch.inference_mode():
        expected = sessions.model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
    torch.testing.assert_close(numbers(result), expected, rtol=0, atol=BOUND)
    for layer in layers(sessions.stepper):
        assert not layer.keys[1].any()
        assert not layer.keys[0, :, 7:].any()
