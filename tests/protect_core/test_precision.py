"""What protection costs in bfloat16, against what bfloat16 costs the plain model.

The checkpoint is stored in bfloat16, and the truth is its float64 evaluation. The plain model's error is then that
of its arithmetic alone. `paper` moves bits and adds nothing. A dense key does two things: its arithmetic rounds
other coordinates of the same vectors, and each keyed weight was rounded once more when it was stored. The second
is there as long as tensors keep their dtype: one rounding more in each product, beside those of the plain model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from tests.protect_core.fixed import FIXED
from tests.protect_core.models import Models, Plain, Protected, run

SEEDS = 4
"""Models of a configuration, each with 16 prompts of 12 ids and a root secret of its own: 192 rows of logits each.
The ratios over these four and over twelve models differ by 0.07 at most, by 0.02 for most families."""
NOT_DENSE, RMS_NORM, LAYER_NORM, NO_BIAS = (1.1, 1.1), (1.1, 1.25), (1.1, 1.3), (1.15, 1.4)
"""Bounds of the arithmetic and of the whole, as parts of the plain model's error."""


def bounds(name: str) -> tuple[float, float]:
    if name == "gpt_neox one after another, without biases":
        return NO_BIAS
    if FIXED[name]["model_type"].startswith("gemma"):
        return NOT_DENSE
    return LAYER_NORM if FIXED[name]["model_type"] in ("gpt2", "gpt_neox", "opt") else RMS_NORM


@dataclass
class Errors:
    """Mean absolute errors of logits, summed over models."""

    plain: float = 0.0
    total: float = 0.0
    arithmetic: float = 0.0
    weights: float = 0.0


def in_float64(protected: Protected) -> Protected:
    """The same keyed values, evaluated in float64."""
    server, enclave = (
        {name: tensor.double() for name, tensor in part.items()} for part in (protected.server, protected.enclave)
    )
    return Protected(replace(protected.plan, dtype="float64"), server, enclave)


def measure(models: Models, name: str) -> dict[str, Errors]:
    """By preset, over all models of a configuration."""
    errors: dict[str, Errors] = {}
    for seed in range(SEEDS):
        rounded = models.make(FIXED[name], dtype=torch.bfloat16, seed=seed)
        wide = models.make(FIXED[name], seed=seed)
        wide.model.load_state_dict({key: tensor.double() for key, tensor in rounded.model.state_dict().items()})
        ids = rounded.ids(12, seed=seed, rows=16)
        truth, plain = wide.logits(ids), rounded.logits(ids).double()
        for preset in rounded.presets:
            protected = rounded.protect(preset, bytes([seed]) * 32)
            got, keyed = protected.logits(ids).double(), in_float64(protected).logits(ids)
            sums = errors.setdefault(preset, Errors())
            sums.plain += float((plain - truth).abs().mean())
            sums.total += float((got - truth).abs().mean())
            sums.arithmetic += float((got - keyed).abs().mean())
            sums.weights += float((keyed - truth).abs().mean())
    return errors


@pytest.mark.parametrize("name", FIXED)
def test_bfloat16_costs_what_it_costs_the_plain_model_and_one_rounding_of_the_weights(
    models: Models, name: str
) -> None:
    """`paper` stays within 1.1 of the plain model's error, and under dense keys the arithmetic does.

    The rounding of keyed weights alone is 0.21 to 0.82 of the plain model's error. With it the whole is, over twelve
    models of each configuration, 1.02 for Gemma, whose residual has no dense key, 1.05 to 1.17 for others with
    RMSNorm, 1.13 to 1.23 with LayerNorm, and 1.23 to 1.28 where no bias takes β up: the norm then carries a constant
    that its rows lose digits to. So 1.1 is met by the whole for some; the bounds are what was measured and room for
    the scatter of four models.
    """
    errors = measure(models, name)
    assert errors["paper"].total < 1.1 * errors["paper"].plain
    arithmetic, total = bounds(name)
    for preset in errors.keys() - {"paper"}:
        of = errors[preset]
        assert of.arithmetic < arithmetic * of.plain, preset
        assert of.weights < 0.9 * of.plain, preset
        assert of.total < total * of.plain, preset


@pytest.mark.parametrize("name", FIXED)
def test_paper_rounds_no_weight(models: Models, name: str) -> None:
    """Evaluated in float64, the keyed bfloat16 values are the plain ones; but Gemma's factor of the embedding is
    rounded by the plain model as well, row by row, and the enclave holds those rows."""
    rounded = models.make(FIXED[name], dtype=torch.bfloat16)
    wide = models.make(FIXED[name])
    wide.model.load_state_dict({key: tensor.double() for key, tensor in rounded.model.state_dict().items()})
    ids = rounded.ids(12)
    truth, protected = wide.logits(ids), in_float64(rounded.protect("paper"))
    scale = protected.plan.architecture.tables[0].scale
    if scale != 1.0:
        table = rounded.state[protected.plan.architecture.tables[0].tensor]
        rows = table[ids] * torch.tensor(scale).to(torch.bfloat16)
        truth = run(wide.model, inputs_embeds=rows.double()).logits
    assert (protected.logits(ids) - truth).abs().max() < 1e-9 * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_paper_costs_nothing_in_low_precision(plain: Plain, models: Models, dtype: torch.dtype) -> None:
    """Only the order of summing differs: the mean over prompts is that of the plain model."""
    rounded = models.make(plain.config, dtype=dtype)
    ids = plain.ids(12, rows=8)
    truth = plain.logits(ids)
    error = (rounded.logits(ids).double() - truth).abs().mean()
    got = (rounded.protect("paper").logits(ids).double() - truth).abs().mean()
    assert got < 1.1 * error
