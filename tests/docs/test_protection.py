"""The table of groups that docs/protection.md shows is the one that the code derives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from stip_keyservice.protect.architecture import Architecture
from stip_keyservice.protect.families import FAMILIES, expand
from stip_keyservice.protect.groups import Group
from stip_keyservice.protect.keyring import groups_of
from stip_keyservice.protect.presets import PRESETS, Preset
from stip_keyservice.protect.refusals import require_safe
from stip_protocol.errors import PresetRefused

PAGE = Path(__file__).parents[2] / "docs" / "protection.md"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "opt, norms after blocks": ("opt", {"do_layer_norm_before": False}),
}
SYMBOLS = {
    Group.IDENTITY: "1",
    Group.PERMUTATION: "P",
    Group.PAIR_SIGNS: "±pair",
    Group.PAIR_SCALES: "s·pair",
    Group.SIGNED_PERMUTATION: "±P",
    Group.POSITIVE_MONOMIAL: "P·D₊",
    Group.ORTHOGONAL_CENTRED: "O⊥1",
    Group.PAIR_SCALARS: "z·pair",
    Group.MONOMIAL: "P·D",
    Group.ORTHOGONAL: "O",
}
COLUMNS = {
    "residual": "residual",
    "queries, keys": "layers.0.query_key",
    "without rotary": "layers.0.query_key_rest",
    "QK-norm": "layers.0.query_key_gain",
    "values": "layers.0.value_output",
    "feed-forward": "layers.0.feed_forward",
    "each expert": "layers.0.experts.0.feed_forward",
    "shared expert": "layers.0.shared_expert.feed_forward",
    "experts": "layers.0.experts",
    "vocabulary": "vocabulary",
}
PUBLIC = {"positions", "layers.0.shared_expert.gate"}
"""Spaces without a key in any preset."""


def architecture_of(variant: str) -> Architecture:
    family, changes = VARIANTS[variant]
    layers = {"gpt2": "n_layer"}.get(family, "num_hidden_layers")
    return expand(AutoConfig.for_model(family, **{layers: 1}, **changes).to_dict())


def cells(architecture: Architecture, preset: Preset) -> list[str]:
    """Symbols of one row, or why there is none."""
    try:
        require_safe(preset, architecture, accept_tied_head=True, accept_token_cipher=True)
    except PresetRefused as refused:
        return [f"refused: {'learned positions' if 'positions' in refused.message else 'tied head'}"]
    groups = groups_of(architecture, preset)
    return [SYMBOLS[groups[space]] if space in groups else "" for space in COLUMNS.values()]


def table() -> str:
    """The rows, families with the same ones together."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for variant in VARIANTS:
        architecture = architecture_of(variant)
        found = tuple("|".join(cells(architecture, preset)) for preset in PRESETS.values())
        rows.setdefault(found, []).append(variant)
    lines = [
        f"| family | preset | {' | '.join(COLUMNS)} |",
        f"|---|---|{'---|' * len(COLUMNS)}",
    ]
    for found, families in rows.items():
        for number, (preset, row) in enumerate(zip(PRESETS, found, strict=True)):
            named = "; ".join(f"`{family}`" for family in families) if number == 0 else ""
            values = row.split("|") + [""] * (len(COLUMNS) - len(row.split("|")))
            lines.append(f"| {named} | `{preset}` | {' | '.join(values)} |".replace("  |", " |"))
    return "\n".join(lines)


def test_the_page_shows_the_groups_that_are_drawn() -> None:
    shown = re.search(r"<!-- groups -->\n(.*?)\n<!-- /groups -->", PAGE.read_text(), re.DOTALL)
    assert shown is not None
    assert shown.group(1) == table()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_table_has_a_column_for_every_space(variant: str) -> None:
    shown = {*COLUMNS.values(), *PUBLIC}
    others = {f"layers.0.experts.{expert}.feed_forward" for expert in range(1, 1 << 10)}
    architecture = architecture_of(variant)
    assert architecture.spaces.keys() <= shown | others
    for preset in PRESETS.values():
        groups = groups_of(architecture, preset)
        assert all(groups[space] is Group.IDENTITY for space in PUBLIC & groups.keys())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_names_every_family(family: str) -> None:
    assert f"`{family}`" in PAGE.read_text()
