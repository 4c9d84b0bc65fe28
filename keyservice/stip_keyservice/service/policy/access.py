"""The tables `[[instances]]`: which signed manifests are served, and who at most may use them.

    [[instances]]
    manifest = "<SHA-256 of manifest.json, 64 hex digits>"
    kind = "dedicated"              # default: as it was registered
    domains = ["acme"]              # default, without users: everyone whom the registry lets use it
    users = ["alice"]

Registering an instance or a member is an administrator's command; the policy bounds what such a command can do. Each
epoch of an instance has a manifest of its own, so a rotation is a change of the policy, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from stip_keyservice.service.instances import Epoch, Instance
from stip_keyservice.service.policy.tables import Digest, Rules
from stip_keyservice.service.users import User
from stip_protocol.errors import InstanceRefused, UserRefused

INSTANCES_LIMIT = 1024
PEOPLE_LIMIT = 4096
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[!-~]+$")]


class InstanceRule(Rules):
    """One manifest that is served."""

    manifest: Digest
    """SHA-256 of `manifest.json`, as `instances show` prints it."""
    kind: Literal["dedicated", "shared"] | None = None
    """None: either."""
    users: Annotated[tuple[Name, ...], Field(strict=False, min_length=1, max_length=PEOPLE_LIMIT)] | None = None
    """Names of users."""
    domains: Annotated[tuple[Name, ...], Field(strict=False, min_length=1, max_length=PEOPLE_LIMIT)] | None = None
    """Trust domains. Where both are given, either will do; where neither is, the registry alone decides."""

    def admits(self, user: User) -> bool:
        """Whether the rule lets this user use the instance, as far as it is for them."""
        if self.users is None and self.domains is None:
            return True
        return user.name in (self.users or ()) or user.domain in (self.domains or ())


def require_listed(rules: Sequence[InstanceRule], manifest: bytes, kind: str) -> InstanceRule | None:
    """The rule that serves a manifest; None where there are no rules, and every registered one is served.

    Raises `InstanceRefused` where no rule names it, or only for instances of another kind.
    """
    if not rules:
        return None
    found = next((rule for rule in rules if rule.manifest == manifest), None)
    if found is None:
        allowed = f"one of the {len(rules)} that the policy lists"
        raise InstanceRefused.because("policy instances, manifest", manifest.hex(), allowed)
    if found.kind not in (None, kind):
        raise InstanceRefused.because("policy instances, kind", kind, found.kind)
    return found


def require_served(rules: Sequence[InstanceRule], instance: Instance, epoch: Epoch, user: User) -> None:
    """Raises `InstanceRefused` as `require_listed` does, `UserRefused` where the rule is for others."""
    found = require_listed(rules, epoch.manifest_digest, instance.kind)
    if found is not None and not found.admits(user):
        raise UserRefused.because("policy instances, user", "one that the rule does not name", "its users and domains")
