"""The report of one audited instance as a document: canonical JSON, the same bytes for the same findings.

Nothing in it is a time or a path. Figures are rounded to `DIGITS` places, so that the last bits of a sum do not make
another digest; the signed summary has the rounded ones too.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stip_protocol.leakage import REPORT_LIMIT as REPORT_LIMIT
from stip_protocol.leakage import REPORT_NAME as REPORT_NAME
from stip_protocol.leakage import (
    AttackLetter,
    Interval,
    KnowledgeName,
    Leakage,
    LeakageCell,
    MetricName,
    Reason,
)

REPORT_VERSION = (1, 0)
DIGITS = 4
SUMMARISED = frozenset(get_args(MetricName))
"""Figures that the signed manifest carries: shares, larger ones worse."""
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Bounds(_Frozen):
    """A figure that is no share (perplexity, a distance), and its 95 % confidence interval."""

    value: Finite
    low: Finite
    high: Finite

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low <= self.value <= self.high:
            raise ValueError("low, value, high: not in this order")
        return self


class Metric(_Frozen):
    """One figure of a cell."""

    name: str
    """Of `stip_protocol.leakage.MetricName`, or `stolen_perplexity` and the like, whose interval is `Bounds`."""
    of: str = ""
    """Which of several models, where an attack makes more than one; the best comes first."""
    measured: Interval | Bounds
    prior: Interval | Bounds | None
    """The best guess of somebody who saw nothing, on the same positions. None where there is no such guess."""
    prior_name: str = ""
    """Which guess that was: `commonest token`, `own prediction`, ..."""
    weaker_priors: dict[str, Interval | Bounds] = {}
    """The other guesses. The best one may take more for granted than any attacker has (`own prediction`: the true text
    before each token of a prompt): a figure below it, but above these, is a finding all the same."""
    counted: Annotated[int, Field(ge=1)]
    """Positions, sessions or entries."""

    @model_validator(mode="after")
    def _share(self) -> Self:
        if self.name in SUMMARISED and not isinstance(self.measured, Interval):
            raise ValueError(f"{self.name} is a share")
        return self


class Point(_Frozen):
    """One point of a curve."""

    curve: str
    x: Finite
    measured: Interval
    """Share of tokens whose true id is the first guess."""


class Cell(_Frozen):
    """One attack with one kind of knowledge: measured, or why not."""

    attack: AttackLetter
    knowledge: KnowledgeName
    not_applicable: Reason | None = None
    metrics: tuple[Metric, ...] = ()
    points: tuple[Point, ...] = ()
    figures: dict[str, Finite] = {}

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.not_applicable is None) != bool(self.metrics):
            raise ValueError("a cell has metrics, or a reason why it is not applicable")
        return self


class Correlation(_Frozen):
    """How little the two "distance correlations" of the papers say: of rows and weights before and after the key."""

    what: Literal["rows", "weights"]
    one_minus_pearson: Finite
    """What the NDSS paper's figures call distance correlation, 1 - |Pearson| of flattened entries."""
    distance_correlation: Finite
    """Székely's dCor (Annals of Statistics 2007) of entries one by one, as the papers look at them; unbiased on the
    sample that was taken."""
    distance_correlation_of_rows: Finite | None = None
    """The same of whole rows. 1 where the key is orthogonal: it leaves every distance as it is."""


class Subject(_Frozen):
    """What was audited."""

    instance: str
    epoch: int
    preset: str
    dtype: str
    width: int
    vocabulary: int
    layers: int
    tied: bool
    origin: str
    """In words, for readers: "bundled model", "a fine-tune of the bundled model"."""
    server_sha256: str
    """SHA-256 over the digests of the server part's files, in their order."""


class Traffic(_Frozen):
    """What the victims said."""

    source: Literal["recorded", "computed"]
    """From a link of a running stack, or computed from the instance's parts."""
    sha256: str
    sessions: int
    positions: int
    accomplice_tokens: int
    accomplice_computed: int = 0
    """How many of these were computed from the instance's parts, whatever the victims' source is."""


class Report(_Frozen):
    """Everything that was found about one instance."""

    version: tuple[int, int] = REPORT_VERSION
    subject: Subject
    traffic: Traffic
    seed: int
    versions: dict[str, str]
    """Of torch, transformers, numpy and stip."""
    cells: tuple[Cell, ...]
    correlations: tuple[Correlation, ...]

    def to_json(self) -> bytes:
        """Canonical: keys sorted, figures rounded, one newline at the end."""
        content = _rounded(self.model_dump(mode="json"))
        return (json.dumps(content, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Raises pydantic's `ValidationError` where it is no report."""
        return cls.model_validate_json(data)

    def summary(self) -> Leakage:
        """What the signed manifest says of it: the figures of the JSON, digit for digit.

        A cell none of whose figures is `SUMMARISED` is left out: to a policy, it was not measured.
        """
        data = self.to_json()
        cells = tuple(_summarised(cell) for cell in self.from_json(data).cells if _has_summary(cell))
        return Leakage(report_sha256=hashlib.sha256(data).hexdigest(), seed=self.seed, cells=cells)


def _has_summary(cell: Cell) -> bool:
    return cell.not_applicable is not None or any(metric.name in SUMMARISED for metric in cell.metrics)


def _summarised(cell: Cell) -> LeakageCell:
    """Of several models with one figure, the most that any of them reaches."""
    found: dict[str, list[Interval]] = {}
    for metric in cell.metrics:
        if isinstance(metric.measured, Interval) and metric.name in SUMMARISED:
            found.setdefault(metric.name, []).append(metric.measured)
    return LeakageCell.model_validate(
        {
            "attack": cell.attack,
            "knowledge": cell.knowledge,
            "not_applicable": cell.not_applicable,
            "metrics": {name: _most(intervals) for name, intervals in found.items()},
        }
    )


def _most(intervals: list[Interval]) -> Interval:
    return Interval(
        value=max(each.value for each in intervals),
        low=max(each.low for each in intervals),
        high=max(each.high for each in intervals),
    )


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DIGITS) + 0.0  # no negative zero
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return value
