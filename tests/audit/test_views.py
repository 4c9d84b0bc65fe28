"""What attackers are given is what a server sees, and truth is what was true."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

PRESETS = ["paper", "hardened", "throughput"]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_true_key_maps_plain_rows_to_the_rows_a_server_sees(ground: Any, preset: str) -> None:
    known, view = ground.truth(preset), ground.view(preset)
    text = ground.victims[0][:-1]
    rows = view.rows(view.victims[0])
    np.testing.assert_allclose(known.entry.rows[text] @ known.residual.T, rows, atol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_what_a_server_answers_is_the_plain_models_next_token(ground: Any, preset: str) -> None:
    known, text = ground.truth(preset), ground.victims[1]
    decoded = ground.accomplice(preset).decode(ground.labelled(preset, [text])[0].seen)
    plain = known.plain.logits(known.plain.rows(text[:-1])).argmax(axis=1)
    if preset == "throughput":
        assert decoded.tolist() == text[24:-1].tolist()  # ids themselves come, sampled as they were
    else:
        assert np.mean(decoded == plain[23:]) > 0.99


@pytest.mark.parametrize("preset", ["hardened", "paper"])
def test_a_private_table_is_not_in_the_server_part(ground: Any, preset: str) -> None:
    assert not ground.view(preset).server.embedding.any()
