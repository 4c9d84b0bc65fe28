"""From hidden states to answers: which rows of logits are no answer."""

from __future__ import annotations

import math

import pytest
import torch

from stip_protocol.errors import TensorInvalid
from stip_server.engine import Form
from stip_server.engines.outputs import Outputs
from stip_server.engines.transfer import Transfer
from stip_server.engines.transformers.parallel import Part


class Given(torch.nn.Module):
    """A head that says these rows."""

    def __init__(self, *rows: list[float]) -> None:
        super().__init__()
        self.rows = torch.tensor(rows)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.rows


@pytest.mark.parametrize("form", [Form.TOP, Form.IDS])
def test_a_row_of_logits_without_a_finite_largest_ends_its_session_alone(form: Form) -> None:
    head = Given(
        [1.0, 2.0, 3.0],
        [1.0, math.nan, 3.0],
        [1.0, math.inf, 3.0],
        [1.0, -math.inf, 3.0],  # an id that is never drawn
        [-math.inf] * 3,
        [3e38, -3e38, 0.0],
    )
    parts = [Part(slot, 0, 1, [], form, 1) for slot in range(6)]
    results = Outputs(head, None, Transfer(torch.device("cpu"))).results(parts, torch.zeros(6, 4), range(6))
    assert [isinstance(result.error, TensorInvalid) for result in results] == [False, True, True, False, True, False]
    assert [bool(result.logits) for result in results] == [True, False, False, True, False, True]
