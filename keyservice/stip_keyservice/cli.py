"""`stip-keyservice`: one command, whose subcommands are imported on use.

`protect` needs torch and the service must not load it, so a subcommand's module is imported when it is called;
help lists them from the table here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import click

from stip_protocol.errors import ConfigurationError, StipError

_PROTECT = "stip_keyservice.protect.commands"
_AUDIT = "stip_keyservice.audit"
_COMMANDS = "stip_keyservice.service.commands"


@dataclass(frozen=True)
class Lazy:
    """A subcommand by the place it lives."""

    module: str
    attribute: str
    help: str

    def load(self) -> click.Command:
        command = getattr(import_module(self.module), self.attribute)
        assert isinstance(command, click.Command)
        return command


COMMANDS = {
    "protect": Lazy(
        "stip_keyservice.protect.commands.protect", "protect", "Protect a model: make an instance directory."
    ),
    "verify-equivalence": Lazy(
        "stip_keyservice.protect.commands.verify",
        "verify_equivalence",
        "Compare an instance with the model it was made from.",
    ),
    "audit": Lazy(
        f"{_AUDIT}.command", "audit", "Run the published attacks against an instance, and sign what they get."
    ),
    "leakage-report": Lazy(f"{_AUDIT}.command", "leakage_report", "One page over the reports of several audits."),
    "serve": Lazy(f"{_COMMANDS}.serve", "serve", "Release keys to attested enclaves."),
    "users": Lazy(f"{_COMMANDS}.users", "group", "Who may use the instances, and how much."),
    "instances": Lazy(f"{_COMMANDS}.instances", "group", "The protected models this service holds the keys of."),
    "epochs": Lazy(f"{_COMMANDS}.epochs", "group", "Rotate an instance's keys: activate, drain, retire."),
    "canaries": Lazy(f"{_COMMANDS}.canaries", "group", "Sessions with a known answer, to try a server with."),
    "leases": Lazy(f"{_COMMANDS}.leases", "group", "What enclaves run under, and what ended it."),
    "revoke": Lazy(f"{_COMMANDS}.revocations", "revoke", "Refuse a user, device, enclave, instance or epoch at once."),
    "revocations": Lazy(f"{_COMMANDS}.revocations", "group", "What was revoked; lift it again."),
    "policy": Lazy(f"{_COMMANDS}.policy", "group", "Which enclaves get keys, of which instances: lint, diff, sign."),
    "evidence": Lazy(f"{_COMMANDS}.evidence", "group", "Hold a quote against a policy, step by step."),
    "collateral": Lazy(f"{_COMMANDS}.collateral", "group", "What Intel says of platforms: fetch, carry, show it."),
    "doctor": Lazy(f"{_COMMANDS}.doctor", "doctor", "Check the service and its machine, and say what to do."),
    "audit-log": Lazy(f"{_COMMANDS}.auditlog", "group", "Every decision, hash-chained."),
    "home": Lazy(f"{_COMMANDS}.home", "group", "Where the root key and the database are."),
    "root-key": Lazy(f"{_COMMANDS}.rootkey", "group", "What every secret is encrypted under: move it, share it."),
    "state": Lazy(f"{_COMMANDS}.state", "group", "Upgrade the database, and check that everything opens."),
    "recover": Lazy(f"{_COMMANDS}.recover", "recover", "Open the root key with shares, or rehearse it."),
    "keys": Lazy(f"{_COMMANDS}.keys", "group", "The key service's own public keys."),
}


class LazyGroup(click.Group):
    """A group over `COMMANDS` that turns refusals into messages and exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return COMMANDS[cmd_name].load() if cmd_name in COMMANDS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, lazy.help) for name, lazy in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except StipError as error:
            if ctx.find_root().meta.get("stip_keyservice.json"):
                refusal = {"code": error.code, "message": error.message, "action": error.action}
                click.echo(json.dumps({"error": refusal}, indent=2))
            click.echo(f"stip-keyservice: {error} ({error.action})", err=True)
            ctx.exit(2 if isinstance(error, ConfigurationError) else 1)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """The model developer's room: protect models, and release their keys to attested enclaves alone.

    \b
    First steps:
      stip-keyservice protect MODEL --preset hardened --out INSTANCE
      stip-keyservice audit INSTANCE --model MODEL --out REPORT
      stip-keyservice users add alice --public-key alice.pub --budget 100000
      stip-keyservice instances add INSTANCE --dedicated-to alice
      stip-keyservice policy init policy.toml --measurement MRENCLAVE --manifest SHA256
      stip-keyservice policy sign policy.toml
      stip-keyservice serve --config keyservice.toml

    Exit codes: 0 done, 1 refused, 2 wrong usage or configuration. With --json a refusal is printed as
    {"error": {"code", "message", "action"}}.
    """
