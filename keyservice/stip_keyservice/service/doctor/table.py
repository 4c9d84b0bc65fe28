"""The checks, in the order they are shown."""

from __future__ import annotations

from stip_keyservice.service.doctor import keeping, machine, rules, state
from stip_keyservice.service.doctor.checking import Check

CHECKS: tuple[Check, ...] = (
    Check("configuration", rules.configuration, "Correct keyservice.toml."),
    Check("clock", machine.clock, "Check the machine's clock."),
    Check("clock synchronization", machine.synchronization, "Check NTP on this machine."),
    Check("home", keeping.permissions, "Check that the home exists and is the service's user's."),
    Check("root key", keeping.root_key, keeping.RESTORE),
    Check("database", state.database, "Check that the database runs, answers here, and is the right one."),
    Check("durability", state.durability, "Check the database first."),
    Check("audit log", state.audit_log, 'Stop the service; docs/keyservice.md, "The audit log does not hold".'),
    Check("policy", rules.policy, "`stip-keyservice policy lint` says more; correct it, sign it, send SIGHUP."),
    Check("collateral", rules.collateral, "Check the folder and the sources in [collateral]."),
    Check("TLS certificate", keeping.tls, "Check tls.key and tls.pem in the home."),
    Check("link authority", keeping.link_authority, keeping.RESTORE),
    Check("ports", machine.ports, "Check [serving] in keyservice.toml."),
    Check("disk space", machine.disk, "Check the file system of the home."),
    Check("core dumps", machine.core_dumps, "Set LimitCORE=0 in the service's unit."),
    Check("swap", machine.swap, "Look at /proc/swaps."),
)
