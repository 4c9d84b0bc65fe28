"""What stolen models are trained on is what was said, in its order, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from stip_keyservice.audit.attacks.stolen import text_of
from stip_keyservice.audit.view import Labelled, Seen


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ([1, 2], [5, 6, 7, 91]),  # the answer behind the last position comes next
        ([0, 1], [5, 6, 7]),  # an answer behind an earlier one does not
        ([], [5, 6, 7]),
    ],
)
def test_a_text_goes_on_with_the_answer_behind_its_last_position_alone(asked: list[int], text: list[int]) -> None:
    seen = Seen(None, np.array([1, 2, 3]), np.array(asked, np.int64))
    answers = np.array([90, 91][: len(asked)], np.int64)
    assert text_of(Labelled(seen, np.array([5, 6, 7]), answers)).tolist() == text
