"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from stip.sampling import DRAFTS_LIMIT

F = TypeVar("F", bound=Callable[..., Any])
CONNECT_SECONDS = 30.0

profile = click.option(
    "--profile",
    "-p",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Profile (TOML): enclave, instance, keys, policy.",
)
connect_timeout = click.option(
    "--connect-timeout",
    default=CONNECT_SECONDS,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Seconds to connect and verify.",
)
_SAMPLING = (
    click.option("--max-tokens", default=256, show_default=True, type=click.IntRange(min=1), help="Length limit."),
    click.option(
        "--temperature", default=0.0, show_default=True, type=click.FloatRange(min=0), help="0 takes the likeliest."
    ),
    click.option("--top-k", default=0, show_default=True, type=click.IntRange(min=0), help="Keep the k likeliest."),
    click.option(
        "--top-p",
        default=1.0,
        show_default=True,
        type=click.FloatRange(min=0, max=1, min_open=True),
        help="Keep the likeliest that together have this mass.",
    ),
    click.option(
        "--drafts",
        default=0,
        show_default=True,
        type=click.IntRange(min=0, max=DRAFTS_LIMIT),
        help="Guess up to N tokens a round trip from repetition in the text: the same answer, sooner where the enclave "
        "is far from the model. The operator then sees how many guesses were right, and so how repetitive your text "
        "is and where; wrong guesses count against your budget.",
    ),
    click.option("--seed", type=click.IntRange(min=0, max=2**64 - 1), help="Makes a sampled answer repeatable."),
    click.option(
        "--timeout",
        default=600.0,
        show_default=True,
        type=click.FloatRange(min=0, min_open=True),
        help="Seconds for an answer.",
    ),
)


def sampling(command: F) -> F:
    """Add the options of sampling."""
    for option in reversed(_SAMPLING):
        command = option(command)
    return command
