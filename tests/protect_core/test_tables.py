"""Tables tile every tensor, and the group of each space is derived from them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from stip_keyservice.protect.architecture import After, Architecture, NormKind, Port
from stip_keyservice.protect.families import expand
from stip_keyservice.protect.groups import Group, caps, meet, subgroups
from stip_keyservice.protect.keyring import groups_of
from stip_keyservice.protect.presets import HARDENED, PAPER


@pytest.fixture(params=["llama", "gpt2"])
def architecture(request: pytest.FixtureRequest, fixed: dict[str, dict[str, Any]]) -> Architecture:
    return expand(fixed[request.param])


def test_every_pair_of_groups_has_one_meet() -> None:
    for a, b in product(Group, Group):
        common = subgroups(a) & subgroups(b)
        assert [group for group in common if common <= subgroups(group)] == [meet(a, b)]
        assert meet(a, b) == meet(b, a)


@pytest.mark.parametrize(
    ("family", "space", "folded", "unfolded", "hardened", "paper"),
    [
        ("llama", "residual", Group.ORTHOGONAL, Group.SIGNED_PERMUTATION, Group.ORTHOGONAL, Group.PERMUTATION),
        ("llama", "layers.0.query_key", Group.PAIR_SCALARS, Group.PAIR_SCALARS, Group.PAIR_SCALARS, Group.PAIR_SIGNS),
        ("llama", "layers.0.value_output", Group.GENERAL, Group.GENERAL, Group.ORTHOGONAL, Group.PERMUTATION),
        ("llama", "layers.0.feed_forward", Group.MONOMIAL, Group.MONOMIAL, Group.MONOMIAL, Group.PERMUTATION),
        ("llama", "vocabulary", Group.PERMUTATION, Group.PERMUTATION, Group.IDENTITY, Group.PERMUTATION),
        ("gpt2", "residual", Group.ORTHOGONAL_CENTRED, Group.PERMUTATION, Group.ORTHOGONAL_CENTRED, Group.PERMUTATION),
        ("gpt2", "layers.0.query_key", Group.GENERAL, Group.GENERAL, Group.ORTHOGONAL, Group.PERMUTATION),
        ("gpt2", "layers.0.value_output", Group.GENERAL, Group.GENERAL, Group.ORTHOGONAL, Group.PERMUTATION),
        ("gpt2", "layers.0.feed_forward", Group.PERMUTATION, Group.PERMUTATION, Group.PERMUTATION, Group.PERMUTATION),
        ("gpt2", "positions", Group.IDENTITY, Group.IDENTITY, Group.IDENTITY, Group.IDENTITY),
    ],
)
def test_groups_are_derived(
    fixed: dict[str, dict[str, Any]],
    family: str,
    space: str,
    folded: Group,
    unfolded: Group,
    hardened: Group,
    paper: Group,
) -> None:
    architecture = expand(fixed[family])
    assert caps(architecture, exact=False)[space] == folded
    assert caps(architecture, exact=True)[space] == unfolded
    assert groups_of(architecture, HARDENED)[space] == hardened
    assert groups_of(architecture, PAPER)[space] == paper


def test_a_norm_that_scales_the_residual_leaves_permutations(architecture: Architecture) -> None:
    """Signed ones behind an RMSNorm: a sign passes through γ, but not through a LayerNorm's mean."""
    first = architecture.norms[0]
    norms = (replace(first, scales=True), *architecture.norms[1:])
    linears = tuple(
        replace(linear, norm=None) if linear.norm == first.weight else linear for linear in architecture.linears
    )
    left = {NormKind.RMS: Group.SIGNED_PERMUTATION, NormKind.LAYER: Group.PERMUTATION}[first.kind]
    assert groups_of(replace(architecture, norms=norms, linears=linears), HARDENED)["residual"] == left


def test_one_layer_norm_among_rms_norms_leaves_permutations(fixed: dict[str, dict[str, Any]]) -> None:
    """One would not miss the mean, the others would; permutations suit both."""
    architecture = expand(fixed["llama"])
    norms = (*architecture.norms[:-1], replace(architecture.norms[-1], kind=NormKind.LAYER))
    assert caps(replace(architecture, norms=norms), exact=False)["residual"] == Group.PERMUTATION


def test_a_reader_without_a_layer_norm_keeps_the_mean(fixed: dict[str, dict[str, Any]]) -> None:
    architecture = expand(fixed["gpt2"])
    linears = tuple(
        replace(linear, norm=None) if linear.name == "layers.0.q" else linear for linear in architecture.linears
    )
    assert caps(replace(architecture, linears=linears), exact=False)["residual"] == Group.PERMUTATION


def test_an_activation_on_a_writer_leaves_permutations(architecture: Architecture) -> None:
    linears = tuple(
        replace(linear, after=After.ELEMENTWISE) if linear.name == "layers.0.v" else linear
        for linear in architecture.linears
    )
    changed = replace(architecture, linears=linears)
    assert caps(changed, exact=False)["layers.0.value_output"] == Group.PERMUTATION


def test_a_forgotten_matrix_is_noticed(architecture: Architecture) -> None:
    for forgotten in architecture.linears:
        rest = tuple(linear for linear in architecture.linears if linear is not forgotten)
        with pytest.raises(ValueError, match=r"tile|without"):
            replace(architecture, linears=rest)


def test_a_matrix_that_is_claimed_twice_is_noticed(architecture: Architecture) -> None:
    with pytest.raises(ValueError, match="tile"):
        replace(architecture, linears=(*architecture.linears, architecture.linears[0]))


def test_a_forgotten_norm_or_table_is_noticed(architecture: Architecture) -> None:
    used = {linear.norm for linear in architecture.linears}
    with pytest.raises(ValueError, match="without"):
        replace(architecture, tables=())
    with pytest.raises(ValueError, match="without"):
        replace(
            architecture,
            norms=tuple(norm for norm in architecture.norms if norm.weight != min(filter(None, used))),
            linears=tuple(replace(linear, norm=None) for linear in architecture.linears),
        )


def test_a_matrix_between_spaces_of_other_sizes_is_noticed(architecture: Architecture) -> None:
    first = architecture.linears[0]
    swapped = replace(first, reads=Port("layers.0.feed_forward"), norm=None)
    with pytest.raises(ValueError, match=first.name):
        replace(architecture, linears=(swapped, *architecture.linears[1:]))
