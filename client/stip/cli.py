"""The `stip` command.

Exit codes: 0 done (and, for `verify`, verified), 1 the enclave is unavailable, busy or broke off (the error's line
says "try again in N s" where the enclave names a time), 2 configuration or usage, 3 refused (attestation, integrity,
release), 130 interrupted.
"""

from __future__ import annotations

import math
import os
import sys

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's own lines about handshakes; errors are told below

import click

from stip.commands import audit_heads, chat, generate, keys, verify
from stip_protocol.errors import (
    Action,
    AttestationError,
    ConfigurationError,
    IntegrityError,
    LeaseError,
    ReleaseError,
    RequestInvalid,
    StipError,
)

EXITS: tuple[tuple[type[StipError], int], ...] = (
    (ConfigurationError, 2),
    (RequestInvalid, 2),
    (AttestationError, 3),
    (IntegrityError, 3),
    (ReleaseError, 3),
    (LeaseError, 3),
    (StipError, 1),
)
ADVICE: dict[Action, str] = {
    Action.FIX_CONFIGURATION: "fix the configuration",
    Action.FIX_REQUEST: "fix the request",
    Action.RETRY: "try again",
    Action.REATTEST: "connect again; see `stip verify`",
    Action.STOP: "do not go on; see `stip verify`",
}
INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="stip")
def group() -> None:
    """Talk to a language model whose operator sees neither prompt nor answer.

    Your prompt goes to an attested enclave and nowhere else, and only after this program has verified it
    against your policy.

    \b
      stip keys create               a key of your own; give the printed line to the key service's operator
      stip verify --profile P.toml   is this the enclave I trust? every check, expected against found
      stip generate --profile P.toml "Once upon a time"
      stip chat --profile P.toml     a conversation
      stip audit-heads list          what you were shown of the key service's audit log

    A profile names enclave, instance, keys and policy. Exit codes: 0 done, 1 unavailable or busy (the error says
    when to try again, where the enclave does), 2 configuration or usage, 3 refused, 130 interrupted. NO_COLOR is
    respected.
    """


group.add_command(keys.group)
group.add_command(verify.verify)
group.add_command(generate.generate)
group.add_command(chat.chat)
group.add_command(audit_heads.group)


def _advice(error: StipError) -> str:
    """What to do now, and when, where whoever refused has said so."""
    when = "" if error.retry_after is None else f" in {math.ceil(error.retry_after)} s"
    return ADVICE[error.action] + (when if error.action is Action.RETRY else "")


def main() -> None:
    """Entry point: every error is one line with its code and what to do."""
    try:
        code = group(prog_name="stip", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except StipError as error:
        click.echo(f"stip: {error}: {_advice(error)}", err=True)
        sys.exit(next(code for kind, code in EXITS if isinstance(error, kind)))
    except (click.Abort, KeyboardInterrupt):
        click.echo("stip: interrupted", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has gone; Python must not complain about flushing to it either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)
