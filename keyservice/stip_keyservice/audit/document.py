"""The report of one audited instance as a document: canonical JSON, the same bytes for the same findings.

Nothing in it is a time or a path. Figures are rounded to `DIGITS` places, so that the last bits of a sum do not make
another digest.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from stip_protocol.leakage import Interval, Leakage, LeakageCell

REPORT_NAME = "leakage.json"
REPORT_LIMIT = 16 << 20
"""Bytes of the largest report read."""
REPORT_VERSION = (1, 0)
DIGITS = 4


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Bounds(_Frozen):
    """A figure that is no share (perplexity, a distance), and its 95 % confidence interval."""

    value: float
    low: float
    high: float


class Metric(_Frozen):
    """One figure of a cell."""

    name: str
    """Of `stip_protocol.leakage.MetricName`, or `stolen_perplexity` and the like, whose interval is `Bounds`."""
    measured: Interval | Bounds
    prior: Interval | Bounds | None
    """The best guess of somebody who saw nothing, on the same positions. None where there is no such guess."""
    prior_name: str = ""
    """Which guess that was: `commonest token`, `own prediction`, ..."""
    counted: Annotated[int, Field(ge=1)]
    """Positions, sessions or entries."""


class Point(_Frozen):
    """One point of a curve."""

    curve: str
    x: float
    measured: Interval


class Cell(_Frozen):
    """One attack with one kind of knowledge: measured, or why not."""

    attack: str
    knowledge: str
    not_applicable: str | None = None
    metrics: tuple[Metric, ...] = ()
    points: tuple[Point, ...] = ()
    figures: dict[str, float] = {}


class Correlation(_Frozen):
    """How little the two "distance correlations" of the papers say: of rows and weights before and after the key."""

    what: Literal["rows", "weights"]
    one_minus_pearson: float
    """What the NDSS paper's figures call distance correlation, 1 - |Pearson| of flattened entries."""
    distance_correlation: float
    """Székely's dCor (Annals of Statistics 2007), unbiased on the sample that was taken."""


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
        """What the signed manifest says of it."""
        cells = tuple(
            LeakageCell(
                attack=cell.attack,
                knowledge=cell.knowledge,
                not_applicable=cell.not_applicable,
                metrics={
                    metric.name: metric.measured for metric in cell.metrics if isinstance(metric.measured, Interval)
                },
            )
            for cell in self.cells
        )
        return Leakage(report_sha256=hashlib.sha256(self.to_json()).hexdigest(), seed=self.seed, cells=cells)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return value
