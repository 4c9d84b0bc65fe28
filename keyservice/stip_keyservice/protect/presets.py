"""Presets: what to ask of the groups that an architecture allows, and what the server holds.

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
    exact: bool
    """Whether stored values are moved and negated only: no norm folds, no scale, nothing is rounded."""
    head_on_server: bool
    table_on_server: bool
    """Whether the server holds the keyed embedding too, and decodes alone over permuted ids."""

    @property
    def output(self) -> Literal["hidden", "top", "ids"]:
        """What the server answers with: a hidden state, its largest permuted logits, or permuted ids."""
        if self.table_on_server:
            return "ids"
        return "top" if self.head_on_server else "hidden"

    def choose(self, cap: Group) -> Group:
        """The group drawn from where the architecture allows `cap`."""
        return next((group for group in self.asks if group in subgroups(cap)), Group.IDENTITY)


_LARGEST = (
    Group.ORTHOGONAL,
    Group.ORTHOGONAL_CENTRED,
    Group.MONOMIAL,
    Group.POSITIVE_MONOMIAL,
    Group.PAIR_SCALARS,
    Group.SIGNED_PERMUTATION,
    Group.PAIR_SCALES,
    Group.PERMUTATION,
    Group.PAIR_SIGNS,
)
"""The largest lossless group of each space, kept well conditioned: where anything invertible is allowed
(values of a head, queries against keys without rotary) orthogonal maps are drawn."""

PAPER = Preset(
    "paper",
    (Group.PERMUTATION, Group.PAIR_SIGNS),
    exact=True,
    head_on_server=True,
    table_on_server=False,
)
"""Permutations, as published (arXiv 2312.00025, §5.1), with its formulas for heads and SwiGLU mended; bit-exact."""
HARDENED = Preset("hardened", _LARGEST, exact=False, head_on_server=False, table_on_server=False)
"""The largest keys, head and sampling in the enclave."""
THROUGHPUT = Preset("throughput", _LARGEST, exact=False, head_on_server=True, table_on_server=True)
"""The largest keys and everything on the server: one round trip an answer, for a substitution cipher over ids."""
PRESETS = {preset.name: preset for preset in (PAPER, HARDENED, THROUGHPUT)}


def preset(name: str) -> Preset:
    """The preset called `name`. Raises `PresetRefused` for an unknown one."""
    try:
        return PRESETS[name]
    except KeyError:
        raise PresetRefused.because("preset", name, ", ".join(PRESETS)) from None
