"""`docs/refusals.md`, from the table: `python -m tests.refusals.document` writes it."""

from __future__ import annotations

from pathlib import Path

from stip_protocol.errors import BY_CODE
from tests.refusals.sections import SECTIONS
from tests.refusals.table import Case, Section

PAGE = Path(__file__).parents[2] / "docs" / "refusals.md"
OPENING = """\
# What is refused

<!-- Generated from the tests (tests/refusals): `python -m tests.refusals.document`. Do not edit. -->

Every row is a test: one thing is wrong and everything else is in order. {count} rows.

- **At the key service** (over a real TLS socket) each row also shows that nothing was debited from anybody, that the
  audit log has the refusal under that code and its chain verifies, that `stip_refusals_total` counted it, and that a
  genuine enclave of somebody else is served right afterwards. Rows marked ¹ leave no entry in the audit log: what
  cannot be read asks for nothing that could be decided, a limit refuses before anything is looked at, and a watch is
  told nothing that its heartbeats would not say.
- **At the client** nothing of the user's, not even a delegation, reaches whoever is refused, and a genuine enclave is
  verified right afterwards.

A code is stable: programs match on it. The action is what its reader should do next (`stip_protocol.errors`).
Rows marked ² are refused by the transport before the service is asked, and carry no code; a client reads such an end
as `unavailable`.
"""
WHERE = {
    "service": "At the key service.",
    "client": "At the client.",
    "host": "By the host policy, wherever a TDX host is verified.",
    "process": "At the command line and at start.",
}


def render() -> str:
    """The whole page."""
    count = sum(len(section.cases) for section in SECTIONS)
    return "\n".join((OPENING.format(count=count), *(_section(section) for section in SECTIONS)))


def _section(section: Section) -> str:
    rows = "".join(_row(section, case) for case in section.cases)
    return (
        f"## {section.title}\n\n{WHERE[section.stage]} {section.told}\n\n"
        f"| what comes | what is altered | code | action |\n|---|---|---|---|\n{rows}"
    )


def _row(section: Section, case: Case) -> str:
    mark = "" if section.stage != "service" or case.event is not None else " ¹" if case.counted else " ²"
    cells = (case.name + mark, case.altered, f"`{case.code}`", BY_CODE[case.code].action)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    PAGE.write_text(render())
