"""The group of a space, derived: the meet of what its norms, nonlinearities and ports allow.

`Group` is a small lattice of matrix groups. Each fact about a space caps its key; the cap is the meet of the
facts; a preset asks for something inside the cap. Groups of heads spaces are those of one head.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from functools import cache

from stip_keyservice.protect.architecture import After, Architecture, Layout, Linear, Norm, NormKind, Port, Role


class Group(StrEnum):
    """Matrix groups, from the identity to every matrix that loses nothing that is read."""

    IDENTITY = "identity"
    PERMUTATION = "permutation"
    PAIR_SIGNS = "a sign per rotary pair"
    PAIR_SCALES = "a real factor per rotary pair"
    SIGNED_PERMUTATION = "signed permutation"
    POSITIVE_MONOMIAL = "permutation and positive diagonal"
    ORTHOGONAL_CENTRED = "orthogonal, without the all-ones vector"
    PAIR_SCALARS = "a complex scalar per rotary pair"
    MONOMIAL = "permutation and diagonal"
    ORTHOGONAL = "orthogonal"
    GENERAL = "invertible"
    ANY = "invertible on what is read"


_COVERS: dict[Group, tuple[Group, ...]] = {
    Group.IDENTITY: (),
    Group.PERMUTATION: (Group.IDENTITY,),
    Group.PAIR_SIGNS: (Group.IDENTITY,),
    Group.PAIR_SCALES: (Group.PAIR_SIGNS,),
    Group.SIGNED_PERMUTATION: (Group.PERMUTATION, Group.PAIR_SIGNS),
    Group.POSITIVE_MONOMIAL: (Group.PERMUTATION,),
    Group.ORTHOGONAL_CENTRED: (Group.PERMUTATION,),
    Group.PAIR_SCALARS: (Group.PAIR_SCALES,),
    Group.MONOMIAL: (Group.SIGNED_PERMUTATION, Group.POSITIVE_MONOMIAL, Group.PAIR_SCALES),
    Group.ORTHOGONAL: (Group.SIGNED_PERMUTATION,),
    Group.GENERAL: (Group.MONOMIAL, Group.ORTHOGONAL, Group.PAIR_SCALARS),
    Group.ANY: (Group.GENERAL, Group.ORTHOGONAL_CENTRED),
}
"""Direct subgroups. Signs of pairs are diagonal. What may drop the all-ones vector may keep it: a permutation."""

DENSE = frozenset({Group.ORTHOGONAL, Group.ORTHOGONAL_CENTRED})
"""Groups whose keys mix coordinates: γ cannot move along with one."""
_FOLDED = {NormKind.RMS: Group.ORTHOGONAL, NormKind.LAYER: Group.ORTHOGONAL_CENTRED}
"""What a norm commutes with once γ and β are folded: RMSNorm (Zhang and Sennrich 2019) sees the length only,
LayerNorm (Ba et al. 2016) what is left without the mean."""
_SCALING = {NormKind.RMS: Group.SIGNED_PERMUTATION, NormKind.LAYER: Group.PERMUTATION}
"""What it commutes with where γ and β stay: γ moves along; a sign passes through γ, but not through a mean."""
_AFTER = {
    After.NOTHING: Group.ANY,
    After.ELEMENTWISE: Group.PERMUTATION,
    After.HOMOGENEOUS: Group.POSITIVE_MONOMIAL,
    After.ROTARY: Group.PAIR_SCALARS,
    After.ROUTING: Group.PERMUTATION,
}
_LAYOUT = {
    Layout.FLAT: Group.ANY,
    Layout.HEADS: Group.GENERAL,  # attention reads queries and keys whole
    Layout.INDEX: Group.PERMUTATION,
    Layout.PUBLIC: Group.IDENTITY,
}


def subgroups(group: Group) -> frozenset[Group]:
    """`group` and every known group inside it."""
    return frozenset({group}.union(*(subgroups(inner) for inner in _COVERS[group])))


@cache
def meet(a: Group, b: Group) -> Group:
    """The largest known group inside both."""
    common = subgroups(a) & subgroups(b)
    return next(group for group in common if common <= subgroups(group))


def caps(architecture: Architecture, *, exact: bool) -> dict[str, Group]:
    """For each space the largest group here under which the model's output stays.

    `exact`: stored values may be moved and negated only, so no norm folds and no γ takes a factor.
    """
    found = {name: _LAYOUT[space.layout] for name, space in architecture.spaces.items()}
    centred = {norm.weight for norm in architecture.norms if norm.kind is NormKind.LAYER}
    for norm in architecture.norms:
        for space, group in _normalised(norm, exact):
            found[space] = meet(found[space], group)
    for linear in architecture.linears:
        for space, group in _joined(linear, centred):
            found[space] = meet(found[space], group)
    return found


def _normalised(norm: Norm, exact: bool) -> Iterator[tuple[str, Group]]:
    if norm.gain is None:
        yield norm.space, _SCALING[norm.kind] if exact or norm.scales else _FOLDED[norm.kind]
        return
    # All heads share one γ, which stays diagonal: heads may differ by signs, and γ may have factors of its own.
    yield norm.space, Group.PAIR_SIGNS
    yield norm.gain.space, _AFTER[norm.after]
    # What is stored is γ - 1 + unit: only for unit 1 is a sign exact there.
    yield norm.gain.space, Group.IDENTITY if exact and norm.unit != 1.0 else Group.MONOMIAL


def _joined(linear: Linear, centred: set[str]) -> Iterator[tuple[str, Group]]:
    """Only behind a LayerNorm is nothing of the all-ones direction left."""
    yield linear.reads.space, Group.ANY if linear.norm in centred else Group.GENERAL
    yield linear.writes.space, _written(linear.writes, linear.after)


def _written(port: Port, after: After) -> Group:
    """A gate takes the permutation part alone, so an activation after it leaves the other ports their diagonal."""
    gated = port.role is Role.PERMUTATION and Group.PERMUTATION in subgroups(_AFTER[after])
    return Group.MONOMIAL if gated else _AFTER[after]
