"""`stip-keyservice keys`."""

from __future__ import annotations

from pathlib import Path

import click

from stip_keyservice.home import Home
from stip_keyservice.service.commands.room import home_option, json_option, show, table
from stip_protocol.release import service_id

PUBLIC = {
    "developer": ("developer.pub", "signs manifests; servers, enclaves and clients pin it"),
    "service": ("service.pub", "signs releases and leases; enclaves and gateways pin it"),
    "sealing": ("sealing.pub", "instance secrets are sealed to it"),
    "link_ca": ("link-ca.pem", "issues link certificates; gateways trust it"),
    "tls_ca": ("tls-ca.pem", "issues the server certificate; enclaves trust it"),
}
"""What others need of a home: the file, and what it is for."""


@click.group("keys")
def group() -> None:
    """The key service's own keys."""


@group.command("show")
@home_option
@json_option
def show_keys(home: Path | None) -> None:
    """Where the public keys and certificates lie. Makes the home where there is none."""
    opened = Home.open(home)
    paths = {name: str(opened.path / file) for name, (file, _) in PUBLIC.items()}
    identity = service_id(opened.service.public_key()).hex()
    rows = [(name, paths[name], purpose) for name, (_, purpose) in PUBLIC.items()]
    show(
        {"home": str(opened.path), "service_id": identity, **paths},
        lambda: table(("key", "file", "what for"), [*rows, ("service id", identity, "names this service")], empty=""),
    )
