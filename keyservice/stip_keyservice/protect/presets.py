"""Presets: what to ask of the groups that an architecture allows, and where the head lives.

A preset asks, the table caps: for each space it gets the first group of its list that the cap contains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stip_keyservice.protect.groups import Group, subgroups
from stip_protocol.errors import PresetRefused


@dataclass(frozen=True)
class Preset:
    """One row of the table of presets."""

    name: str
    asks: tuple[Group, ...]
    folds: bool
    """Whether γ and β are folded into the next matrices."""
    head_on_server: bool

    @property
    def output(self) -> Literal["hidden", "top"]:
        """What the server answers with: a hidden state, or its largest permuted logits."""
        return "top" if self.head_on_server else "hidden"

    def choose(self, cap: Group) -> Group:
        """The group drawn from where the architecture allows `cap`."""
        return next((group for group in self.asks if group in subgroups(cap)), Group.IDENTITY)


PAPER = Preset(
    "paper",
    (Group.PERMUTATION, Group.PAIR_SIGNS),
    folds=False,
    head_on_server=True,
)
"""Permutations, as published (arXiv 2312.00025, §5.1), with its formulas for heads and SwiGLU mended; bit-exact."""
HARDENED = Preset(
    "hardened",
    (
        Group.ORTHOGONAL,
        Group.ORTHOGONAL_CENTRED,
        Group.MONOMIAL,
        Group.PAIR_SCALARS,
        Group.PERMUTATION,
        Group.PAIR_SIGNS,
    ),
    folds=True,
    head_on_server=False,
)
"""The largest lossless group of each space, kept well conditioned: where anything invertible is allowed
(values of a head, queries against keys without rotary) orthogonal maps are drawn."""
PRESETS = {preset.name: preset for preset in (PAPER, HARDENED)}
_RESERVED = frozenset({"throughput"})


def preset(name: str) -> Preset:
    """The preset called `name`. Raises `PresetRefused` for an unknown or reserved one."""
    if name in _RESERVED:
        raise PresetRefused(f"preset: {name} is reserved and not available yet, allowed: {', '.join(PRESETS)}")
    try:
        return PRESETS[name]
    except KeyError:
        raise PresetRefused.because("preset", name, ", ".join(PRESETS)) from None
