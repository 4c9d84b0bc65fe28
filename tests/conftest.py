"""Rules for the whole suite: in CI a skipped test is a failure, unless it is on this short list."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest

collect_ignore = [] if find_spec("vllm") else ["vllm"]
"""tests/vllm needs an environment of its own, and has a command of its own: `make test-vllm`."""
ACCEPTED_SKIPS = (
    "STIP_DCAP_VECTORS", "gramine-direct", "SGX", "GPU", "headless browser",
    "network namespaces", "SoftHSM", "systemd", "PR_SET_MDWE",
)  # fmt: skip
"""Words that the reason of an accepted skip names: hardware, rights and material that CI may lack."""

_refused: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect skips that CI does not accept (with xdist this runs where all reports arrive)."""
    if report.skipped and not hasattr(report, "wasxfail") and isinstance(report.longrepr, tuple):
        reason = str(report.longrepr[2])
        if not any(word in reason for word in ACCEPTED_SKIPS):
            _refused.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if os.environ.get("CI") == "true" and _refused and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in _refused:
        terminalreporter.write_line(f"skipped, and CI does not accept it: {line}", red=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep each folder below tests/e2e on one worker, whose tests share one running system, and each file of
    tests/audit, whose tests share what an attack found, and of tests/rollout, whose hosts run once.

    What `xdist_group` marks are for; but pytest-xdist 3.8 does not see them under pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class BySystem(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith("tests/e2e/"):
                return nodeid.rsplit("/", 1)[0]
            return nodeid.split("::", 1)[0] if nodeid.startswith(("tests/audit/", "tests/rollout/")) else nodeid

    return BySystem(config, log) if config.getoption("dist") == "loadgroup" else None
