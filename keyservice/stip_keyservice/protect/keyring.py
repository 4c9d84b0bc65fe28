"""The keys of one instance: one per space, each from its own stream under the root secret.

Labels: `space/<name>` seeds a space's key, `structure/<name>` the order of heads that the spaces of one
attention share. The seed of `space/vocabulary` is what a grant hands to an enclave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from stip_keyservice.protect.architecture import Architecture, Layout, Port, Role, Space, Width
from stip_keyservice.protect.groups import DENSE, Group, caps
from stip_keyservice.protect.presets import Preset
from stip_protocol.keys import (
    HeadsKey,
    Identity,
    Key,
    KeyStream,
    derive,
    draw_centred_orthogonal,
    draw_monomial,
    draw_orthogonal,
    draw_pair_scalars,
    draw_pair_scales,
    draw_pair_signs,
    draw_permutation,
    draw_positive_monomial,
    draw_signed_permutation,
)
from stip_protocol.keys.draw import STREAM_LABEL

SpaceKey = Key | HeadsKey

_DRAW: dict[Group, Callable[[KeyStream, int], Key]] = {
    Group.IDENTITY: lambda _, size: Identity(size),
    Group.PERMUTATION: draw_permutation,
    Group.PAIR_SIGNS: draw_pair_signs,
    Group.PAIR_SCALES: draw_pair_scales,
    Group.PAIR_SCALARS: draw_pair_scalars,
    Group.SIGNED_PERMUTATION: draw_signed_permutation,
    Group.POSITIVE_MONOMIAL: draw_positive_monomial,
    Group.MONOMIAL: draw_monomial,
    Group.ORTHOGONAL_CENTRED: draw_centred_orthogonal,
    Group.ORTHOGONAL: draw_orthogonal,
}


def groups_of(architecture: Architecture, preset: Preset) -> dict[str, Group]:
    """The group that the key of each space is drawn from. A vocabulary that no server sees is public."""
    chosen = {name: preset.choose(cap) for name, cap in caps(architecture, exact=preset.exact).items()}
    if not preset.head_on_server:
        chosen[architecture.vocabulary_space] = Group.IDENTITY
    return chosen


def folding_norms(architecture: Architecture, preset: Preset) -> frozenset[str]:
    """The norms whose γ and β fold into the next matrices: those of a space with a dense key.

    Elsewhere γ moves along with the key, and no weight is rounded for its sake.
    """
    groups = groups_of(architecture, preset)
    return frozenset(norm.weight for norm in architecture.norms if not norm.scales and groups[norm.space] in DENSE)


def draw_keys(architecture: Architecture, preset: Preset, root: bytes) -> dict[str, SpaceKey]:
    """The key of every space, by its name."""
    groups = groups_of(architecture, preset)
    return {name: _draw(space, groups[name], root) for name, space in architecture.spaces.items()}


def key_at(keys: Mapping[str, SpaceKey], port: Port) -> Key:
    """K as `port` writes it. What it reads through is the dual of this."""
    key = keys[port.space]
    if isinstance(key, HeadsKey):
        key = key.wide if port.width is Width.WIDE else key.narrow
    if port.role is Role.DUAL:
        return key.dual
    return key.permutation_part if port.role is Role.PERMUTATION else key


def _draw(space: Space, group: Group, root: bytes) -> SpaceKey:
    stream = KeyStream(derive(root, f"space/{space.name}"), STREAM_LABEL)
    if space.layout is not Layout.HEADS:
        return _DRAW[group](stream, space.size)
    order = KeyStream(derive(root, f"structure/{space.structure}"), STREAM_LABEL)
    kv_order = draw_permutation(order, space.kv_heads)
    query_orders = [draw_permutation(order, space.group) for _ in range(space.kv_heads)]
    return HeadsKey(kv_order, query_orders, [_DRAW[group](stream, space.head_dim) for _ in range(space.kv_heads)])
