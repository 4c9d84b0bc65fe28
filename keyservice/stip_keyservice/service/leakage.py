"""The policy's leakage maxima: what an audit must have found before an instance's keys are released.

    [leakage]
    required = true                 # an instance without an audit in its signed manifest is refused

    [[leakage.maxima]]
    knowledge = ["server"]          # rows of the audit's matrix, each of them
    metric = "token_top1"           # of stip_protocol.leakage.MetricName
    at_most = 0.2                   # the upper end of the 95 % confidence interval may reach it
    attacks = ["A", "B"]            # default: every attack that was run
    presets = ["hardened"]          # default: every preset

A maximum is held against each row that it names, over the cells of its attacks. It refuses where

- the row or a named attack is not in the audit: what nobody tried is not known to be small;
- a cell has the metric, and its upper end is above;
- no cell has the metric: the maximum would say nothing. Only where *every* cell says "not applicable" it holds.

Pure: the measured figures come from the signed manifest (`stip_protocol.leakage`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field, model_validator

from stip_protocol.errors import LeakageRefused
from stip_protocol.leakage import AttackLetter, KnowledgeName, Leakage, MetricName
from stip_protocol.manifest import Preset
from stip_protocol.runtime.config import Settings

MAXIMA_LIMIT = 128
Share = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]


class Maximum(Settings):
    """How much one metric may reach, by who knows what."""

    knowledge: tuple[KnowledgeName, ...] = Field(min_length=1, max_length=16)
    metric: MetricName
    at_most: Share
    attacks: tuple[AttackLetter, ...] | None = Field(default=None, min_length=1, max_length=26)
    """None: every attack that was run."""
    presets: tuple[Preset, ...] | None = Field(default=None, min_length=1, max_length=8)
    """None: every preset."""

    def words(self) -> str:
        """The rule in one line, for people."""
        bounds = (("attacks", self.attacks), ("presets", self.presets))
        within = "".join(f"; {name} {', '.join(named)}" for name, named in bounds if named is not None)
        return f"{self.metric} at most {self.at_most} with {', '.join(self.knowledge)}{within}"

    def concerns(self, preset: str) -> bool:
        """Whether the rule speaks of instances of this preset."""
        return self.presets is None or preset in self.presets

    def objection(self, measured: Leakage) -> str | None:
        """Why the rule refuses, naming the first row that breaks it; None where it holds."""
        return next(filter(None, (self._objection(row, measured) for row in self.knowledge)), None)

    def _objection(self, row: str, measured: Leakage) -> str | None:
        cells = [cell for cell in measured.cells if cell.knowledge == row]
        if not cells:
            return f"{row} was not audited"
        if self.attacks is not None:
            audited = {cell.attack for cell in cells}
            missing = [attack for attack in self.attacks if attack not in audited]
            if missing:
                return f"attack {missing[0]} with {row} was not audited"
            cells = [cell for cell in cells if cell.attack in self.attacks]
        if all(cell.not_applicable is not None for cell in cells):
            return None
        figures = [(cell.metrics[self.metric].high, cell.attack) for cell in cells if self.metric in cell.metrics]
        if not figures:
            return f"no attack with {row} measured {self.metric}"
        upper, attack = max(figures)
        if upper > self.at_most:
            return f"attack {attack} with {row} reaches {upper}, the upper end of its 95 % interval"
        return None


class LeakagePolicy(Settings):
    """The table `[leakage]`."""

    required: bool = Field(default=False, strict=True)
    """Refuse instances without an audit, whatever their preset."""
    maxima: tuple[Maximum, ...] = Field(default=(), max_length=MAXIMA_LIMIT)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.required and not self.maxima:
            raise ValueError("leakage: got no rule, allowed: required = true, or at least one of leakage.maxima")
        return self

    def require(self, measured: Leakage | None, preset: str) -> None:
        """Hold an instance's audit against every rule.

        `measured` is what its signed manifest says, None where that has no audit. Raises `LeakageRefused` naming
        the first rule that is broken.
        """
        if self.required and measured is None:
            raise LeakageRefused("leakage.required: the instance was not audited", field="leakage.required")
        for number, maximum in enumerate(self.maxima, start=1):
            if not maximum.concerns(preset):
                continue
            objection = "the instance was not audited" if measured is None else maximum.objection(measured)
            if objection is not None:
                raise LeakageRefused(
                    f"leakage.maxima, rule {number} ({maximum.words()}): {objection}", field="leakage.maxima"
                )


@dataclass(frozen=True)
class Worst:
    """The largest upper end of a row, and where it was measured."""

    upper: float
    metric: MetricName
    attack: str


def worst(measured: Leakage) -> Mapping[str, Worst | None]:
    """By knowledge, in the audit's order, what leaks most; None where no attack of the row is applicable."""
    rows: dict[str, Worst | None] = {}
    for cell in measured.cells:
        found = [Worst(figure.high, metric, cell.attack) for metric, figure in cell.metrics.items()]
        known = rows.get(cell.knowledge)
        candidates = found if known is None else [known, *found]
        rows[cell.knowledge] = max(candidates, key=lambda each: each.upper, default=None)
    return rows
