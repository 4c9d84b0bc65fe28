"""What a ratio proves: it passes, it fails, or the machine was not quiet enough to say."""

from __future__ import annotations

import math
from enum import StrEnum

CONTROL_SPREAD = 0.02
"""A control may be so far from 1: two measurements of the same thing, in the same rounds."""


class Verdict(StrEnum):
    PASS = "pass"  # noqa: S105 - not a password
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"


def verdict(ratio: float, control: float, target: float) -> Verdict:
    """Of `ratio` against `target`, where the arm it is divided by measured `control` times itself.

    A control outside 1 ± 2 % is inconclusive, whatever the ratio: neither a pass nor a fail can be told from noise.
    """
    if not (math.isfinite(ratio) and math.isfinite(control)) or abs(control - 1) > CONTROL_SPREAD:
        return Verdict.INCONCLUSIVE
    return Verdict.PASS if ratio <= target else Verdict.FAIL
