"""Where a preset would hand the operator more than it says: each refusal says why, and what to choose."""

from __future__ import annotations

from stip_keyservice.protect.architecture import Architecture, Layout
from stip_keyservice.protect.groups import DENSE
from stip_keyservice.protect.keyring import groups_of
from stip_keyservice.protect.presets import Preset
from stip_protocol.errors import PresetRefused


def require_safe(
    preset: Preset, architecture: Architecture, *, accept_tied_head: bool, accept_token_cipher: bool
) -> None:
    """Raise `PresetRefused` where `preset` must not be used for `architecture`, or not without being accepted."""

    def refuse(why: str, allowed: str) -> None:
        raise PresetRefused(f"preset {preset.name}: {why}; allowed: {allowed}", field="preset")

    positions = [table for table in architecture.tables if architecture.spaces[table.index].layout is Layout.PUBLIC]
    if preset.table_on_server:
        if positions:
            refuse(
                "learned positions would be on the server, known rows under the key, which they give away",
                "the presets hardened and paper",
            )
        if architecture.tied and groups_of(architecture, preset)[architecture.entry] in DENSE:
            refuse(
                "a tied head gives a dense key away: least squares over the two tables, which differ by the final"
                " norm alone",
                "the preset hardened",
            )
        if not accept_token_cipher:
            refuse(
                "the server sees every id under one substitution cipher, and can generate text under it to break it",
                "the preset hardened, or accept_token_cipher",
            )
    if preset.head_on_server and architecture.tied and not accept_tied_head:
        refuse(
            "a tied head puts the embedding's values on the server, where they reveal every token",
            "the preset hardened, or accept_tied_head",
        )
