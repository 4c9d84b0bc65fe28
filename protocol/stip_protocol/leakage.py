"""What an audit measured, as it stands in the signed manifest: the key service's policy holds it against its maxima.

`Leakage` is a summary. The report it was taken from, `leakage.json` beside the manifest, has curves, priors and
everything that does not decide anything; its digest is here.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
MetricName = Literal[
    "token_top1",
    "token_top10",
    "sequence_exact",
    "rouge_l",
    "vocabulary_recovered",
    "residual_permutation",
    "residual_cosine",
    "stolen_agreement",
]
"""Shares that an attacker wants large: tokens whose true id is the first, or among the first ten, of the guesses;
sessions recovered whole; longest common subsequence of texts (ROUGE-L, F1); entries of the vocabulary permutation;
entries of the residual permutation, or |cosine| between recovered and true key; next tokens on which a stolen model
agrees with the plain one."""
AttackLetter = Annotated[str, Field(pattern=r"^[A-Z]$")]
KnowledgeName = Annotated[str, Field(pattern=r"^[a-z]{1,32}$")]
Reason = Annotated[str, Field(min_length=1, max_length=400)]
"""Why an attack means nothing with some knowledge."""
CELLS_LIMIT = 512
REPORT_NAME = "leakage.json"
REPORT_LIMIT = 16 << 20
"""Bytes of the largest report read."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)


class Interval(_Frozen):
    """A share and its 95 % confidence interval."""

    value: Fraction
    low: Fraction
    high: Fraction

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low <= self.value <= self.high:
            raise ValueError("low, value, high: not in this order")
        return self


class LeakageCell(_Frozen):
    """One attack with one kind of knowledge."""

    attack: AttackLetter
    knowledge: KnowledgeName
    not_applicable: Reason | None = None
    """Otherwise it was measured."""
    metrics: dict[MetricName, Interval] = {}

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.not_applicable is None) != bool(self.metrics):
            raise ValueError("a cell has metrics, or a reason why it is not applicable")
        return self


class Leakage(_Frozen):
    """The summary of an audit."""

    report_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of `leakage.json`."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)]
    cells: Annotated[tuple[LeakageCell, ...], Field(max_length=CELLS_LIMIT)]
