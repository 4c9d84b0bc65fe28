"""The group of a space, derived: the meet of what its norms, nonlinearities and ports allow.

`Group` is a small lattice of matrix groups. Each fact about a space caps its key; the cap is the meet of the
facts; a preset asks for something inside the cap. Groups of heads spaces are those of one head.
"""

from __future__ import annotations

from enum import StrEnum
from functools import reduce

from stip_keyservice.protect.architecture import After, Architecture, Layout, Linear, NormKind, Port, Role


class Group(StrEnum):
    """Matrix groups, from the identity to every matrix that loses nothing that is read."""

    IDENTITY = "identity"
    PERMUTATION = "permutation"
    PAIR_SIGNS = "a sign per rotary pair"
    SIGNED_PERMUTATION = "signed permutation"
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
    Group.SIGNED_PERMUTATION: (Group.PERMUTATION, Group.PAIR_SIGNS),
    Group.ORTHOGONAL_CENTRED: (Group.PERMUTATION,),
    Group.PAIR_SCALARS: (Group.PAIR_SIGNS,),
    Group.MONOMIAL: (Group.SIGNED_PERMUTATION,),
    Group.ORTHOGONAL: (Group.SIGNED_PERMUTATION,),
    Group.GENERAL: (Group.MONOMIAL, Group.ORTHOGONAL, Group.PAIR_SCALARS),
    Group.ANY: (Group.GENERAL, Group.ORTHOGONAL_CENTRED),
}
"""Direct subgroups. Signs of pairs are diagonal. What may drop the all-ones vector may keep it: a permutation."""

_NORM = {NormKind.RMS: Group.ORTHOGONAL, NormKind.LAYER: Group.ORTHOGONAL_CENTRED}
"""What a norm commutes with once γ and β are folded: RMSNorm (Zhang and Sennrich 2019) sees the length only,
LayerNorm (Ba et al. 2016) what is left without the mean."""
_AFTER = {
    After.NOTHING: Group.ANY,
    After.ELEMENTWISE: Group.PERMUTATION,
    After.ROTARY: Group.PAIR_SCALARS,
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


def meet(a: Group, b: Group) -> Group:
    """The largest known group inside both."""
    common = subgroups(a) & subgroups(b)
    return next(group for group in common if common <= subgroups(group))


def cap(architecture: Architecture, space: str, *, folds: bool) -> Group:
    """The largest group under which the model's output stays, with norms folded or (`folds` False) left alone."""
    norms = (norm for norm in architecture.norms if norm.space == space)
    readers = (linear for linear in architecture.linears if linear.reads.space == space)
    writers = (linear for linear in architecture.linears if linear.writes.space == space)
    return reduce(
        meet,
        [
            _LAYOUT[architecture.spaces[space].layout],
            *(_NORM[norm.kind] if folds and not norm.scales else Group.PERMUTATION for norm in norms),
            *(_read(architecture, linear) for linear in readers),
            *(_written(linear.writes, linear.after) for linear in writers),
        ],
    )


def _read(architecture: Architecture, linear: Linear) -> Group:
    """Only behind a LayerNorm is nothing of the all-ones direction left."""
    centred = linear.norm is not None and architecture.norm(linear.norm).kind is NormKind.LAYER
    return Group.ANY if centred else Group.GENERAL


def _written(port: Port, after: After) -> Group:
    """A gate takes the permutation part alone, so the activation after it leaves the other ports their diagonal."""
    return Group.MONOMIAL if port.role is Role.PERMUTATION else _AFTER[after]
