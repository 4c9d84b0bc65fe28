"""Whether a command line that a unit, a container or a page shows is one that our programs take."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import click

PROGRAMS = {
    "stip": "stip.cli:group",
    "stip-keyservice": "stip_keyservice.cli:main",
    "stip-gateway": "stip_gateway.cli:main",
    "stip-server": "stip_server.cli:main",
    "stip-enclave": "stip_enclave.cli:main",
    "stip-stack": "stip_stack.cli:main",
}


def require_command(words: Sequence[str]) -> None:
    """Fail where a program of ours, one of its subcommands or an option does not exist, or an argument is missing."""
    name = Path(words[0]).name
    module, attribute = PROGRAMS[name].split(":")
    command: click.Command = getattr(import_module(module), attribute)
    context, rest = click.Context(command, info_name=name), list(words[1:])
    while isinstance(command, click.Group):
        assert rest, f"{' '.join(words)}: which subcommand?"
        found = command.get_command(context, rest[0])
        assert found is not None, (
            f"{' '.join(words)}: no subcommand {rest[0]}; there are {command.list_commands(context)}"
        )
        command, rest = found, rest[1:]
        context = click.Context(command, info_name=command.name, parent=context)
    options = {
        option: parameter
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    arguments, given = [], set()
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            arguments.append(word)
            continue
        option, _, value = word.partition("=")
        assert option in options, f"{' '.join(words)}: no option {option}; there are {sorted(options)}"
        given.add(options[option].name)
        if not options[option].is_flag and not value:
            assert rest, f"{' '.join(words)}: {option} wants a value"
            del rest[: options[option].nargs]
    wanted = [parameter for parameter in command.params if isinstance(parameter, click.Argument)]
    least = sum(1 for one in wanted if one.required)
    most = len(wanted) if all(one.nargs == 1 for one in wanted) else len(arguments)
    assert least <= len(arguments) <= most, f"{' '.join(words)}: {len(arguments)} arguments, wanted {least} to {most}"
    missing = {
        one.name for one in command.params if isinstance(one, click.Option) and one.required and one.name not in given
    }
    assert not missing, f"{' '.join(words)}: without {missing}"
