"""The few plots of the report, as SVG that depends on the numbers alone: no date, no random ids.

matplotlib is the extra `bench`; without it there are no plots, and the page says the same in its tables.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.serving.records import Cell, Part
from benchmarks.verdict import CONTROL_SPREAD

STYLE = {
    "svg.hashsalt": "stip",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.marker": "o",
    "lines.markersize": 3.5,
}


def write(parts: Mapping[str, Part], folder: Path) -> dict[str, list[str]]:
    """Draw what the parts have; the plots' paths by section, relative to the folder above."""
    if importlib.util.find_spec("matplotlib") is None:
        return {}
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    drawn: dict[str, list[str]] = {}
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        for section, (name, draw) in PLOTS.items():
            if section in parts and parts[section].cells:
                figure = draw(pyplot, parts[section])
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
                pyplot.close(figure)
                drawn[section] = [f"{folder.name}/{name}.svg"]
    return drawn


def _by_streams(pyplot: Any, part: Part) -> Any:
    """Time per token over plain, by number of streams."""
    figure, axes = pyplot.subplots(figsize=(6, 3.2))
    for line, cells in _lines(part.cells, lambda cell: f"{cell.model}, {cell.arm}"):
        found = sorted(cells, key=lambda cell: cell.streams)
        axes.plot(
            [cell.streams for cell in found],
            [cell.token.ratio.value for cell in found],
            label=line,
            linestyle="--" if found[0].arm == "hardened" else "-",
        )
    axes.axhspan(1 - CONTROL_SPREAD, 1 + CONTROL_SPREAD, color="0.9", zorder=0, label="A/A allowed")
    _values(axes, sorted({cell.streams for cell in part.cells}))
    axes.set(xlabel="streams", ylabel="time per token, protected / plain")
    axes.legend(fontsize=7, frameon=False)
    return figure


def _by_delay(pyplot: Any, part: Part) -> Any:
    """Milliseconds added to a token, by delay of the link, beside one round trip a token."""
    figure, axes = pyplot.subplots(figsize=(6, 3.2))
    for line, cells in _lines(part.cells, lambda cell: f"{cell.model}, {cell.arm}, {cell.streams} streams"):
        found = sorted(cells, key=lambda cell: cell.delay)
        axes.plot([cell.delay * 1e3 for cell in found], [cell.token.added * 1e3 for cell in found], label=line)
    longest = max(cell.delay for cell in part.cells) * 1e3
    axes.plot([0, longest], [0, 2 * longest], color="0.6", linestyle=":", marker="", label="one round trip a token")
    axes.set(xlabel="delay of the link, one way, ms", ylabel="added to a token, ms")
    axes.legend(fontsize=7, frameon=False)
    return figure


def _curves(pyplot: Any, part: Part) -> Any:
    """Ratio (above) and added milliseconds (below) by what grows, a column each."""
    names = list(dict.fromkeys(cell.axis for cell in part.cells if cell.axis))
    figure, axes = pyplot.subplots(
        2, len(names), figsize=(2.3 * len(names), 4.2), sharey="row", sharex="col", squeeze=False
    )
    for column, name in enumerate(names):
        for line, cells in _lines([cell for cell in part.cells if cell.axis == name], lambda cell: cell.arm):
            found = sorted(cells, key=lambda cell: cell.at or 0)
            places = [cell.at for cell in found]
            axes[0][column].plot(places, [cell.token.ratio.value for cell in found], label=line)
            axes[1][column].plot(places, [cell.token.added * 1e3 for cell in found], label=line)
        _values(axes[1][column], sorted({cell.at or 0 for cell in part.cells if cell.axis == name}))
        axes[1][column].set_xlabel("context (prompt)" if name == "prompt" else name)
    axes[0][0].set_ylabel("protected / plain")
    axes[1][0].set_ylabel("added to a token, ms")
    axes[0][0].legend(fontsize=7, frameon=False)
    return figure


def _values(axes: Any, places: Iterable[float]) -> None:
    """A logarithmic axis that is labelled where something was measured."""
    found = list(places)
    axes.set_xscale("log", base=2)
    axes.set_xticks(found, [f"{place:g}" if place < 10_000 else f"{place / 1024:g}k" for place in found], rotation=45)
    axes.minorticks_off()


def _lines(cells: Iterable[Cell], key: Callable[[Cell], str]) -> list[tuple[str, list[Cell]]]:
    return [(line, list(found)) for line, found in groupby(sorted(cells, key=key), key=key)]


PLOTS: Mapping[str, tuple[str, Callable[[Any, Part], Any]]] = {
    "tokens": ("ratio-by-streams", _by_streams),
    "delay": ("added-by-delay", _by_delay),
    "curves": ("cost-curves", _curves),
}
"""File name and drawing of each section that has a plot."""
