"""What docs/rollout.md shows: configuration files, commands, addresses and flows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from stip_stack.namespaces import Flow

PROBE = "/readyz"
"""What a supervisor asks of every part."""
ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "rollout.md").read_text()


def blocks(kind: str, text: str = TEXT) -> list[str]:
    """The contents of the fenced blocks of one kind."""
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


def files() -> dict[str, str]:
    """The TOML files by the name in their first line."""
    return {re.match(r"# ([\w-]+\.toml)\n", block).group(1): block for block in blocks("toml")}  # type: ignore[union-attr]


def commands(text: str = TEXT) -> list[list[str]]:
    """Every line of the shell blocks, as words."""
    text = re.sub(r"<[^<>\n]+>", "PLACEHOLDER", text)
    return [shlex.split(line, comments=True) for block in blocks("sh", text) for line in block.splitlines() if line]


def addresses() -> dict[str, str]:
    """Host: address."""
    line = re.search(r"^10\.20\..* client\.", TEXT, re.MULTILINE)
    assert line is not None
    return {host: address for address, host in re.findall(r"([\d.]+\d) ([\w-]+)", line.group())}


def flows() -> list[Flow]:
    """The table of flows."""
    table = TEXT.partition("### Flows")[2].partition("\n### ")[0]
    rows = re.findall(r"^\| ([\w-]+) \| ([\w-]+) \| (\d+) \|", table, re.MULTILINE)
    return [Flow(source, target, int(port)) for source, target, port in rows]
