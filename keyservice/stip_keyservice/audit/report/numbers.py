"""How figures are printed: never rounded up to all, never down to nothing."""

from __future__ import annotations

from stip_keyservice.audit.document import Bounds
from stip_protocol.leakage import Interval

SPACE = "\N{NO-BREAK SPACE}"
TO = f"{SPACE}to{SPACE}"
"""Between the ends of an interval: no line breaks there."""


def percent(share: float) -> str:
    """A share of 1 in percent: "99.8 %". Only 1 is "100 %", only 0 is "0 %"."""
    return f"{_percent(share)}{SPACE}%"


def between(measured: Interval | Bounds) -> str:
    """The ends of a confidence interval: "99.1 to 100 %", "28 to 34"."""
    if isinstance(measured, Interval):
        return f"{_percent(measured.low)}{TO}{_percent(measured.high)}{SPACE}%"
    return f"{amount(measured.low)}{TO}{amount(measured.high)}"


def figure(measured: Interval | Bounds) -> str:
    """The figure itself."""
    return percent(measured.value) if isinstance(measured, Interval) else amount(measured.value)


def amount(value: float) -> str:
    """A number of any size to about three digits: "0.062", "31.4", "12,345"."""
    size = abs(value)
    if value == int(value) or size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 1 else f"{value:.3f}".replace("-0.000", "0.000")


def _percent(share: float) -> str:
    if share in (0, 1):
        return f"{share * 100:.0f}"
    value = share * 100
    if value > 99.9 or round(value, 1) == 100:
        return ">99.9"
    if value < 0.1:
        return "<0.1"
    return f"{value:.1f}"
