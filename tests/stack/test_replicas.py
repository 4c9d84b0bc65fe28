"""A stack with several replicas of one instance behind a link with a delay."""

from __future__ import annotations

import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import stip
from stip_protocol.errors import ConfigurationError
from stip_stack.stack import Launch, Stack
from stip_stack.workspace import Published

DEMO_MODEL = Path(__file__).parents[2] / "stack" / "demo_model"
DELAY_MS = 15.0
PROMPT = [7, 8, 9, 10]

pytestmark = pytest.mark.timeout(300)


@dataclass
class Running:
    stack: Stack
    published: Published
    profile: Path


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Stack(tmp_path_factory.mktemp("replicas") / "work", environment={"OMP_NUM_THREADS": "1"}) as stack:
        published = stack.protect(DEMO_MODEL, "paper", "--samples", "1")
        stack.start(
            [published],
            engine={"threads": 1, "slots": 4},
            replicas=2,
            launches={"server-0-1": Launch(engine={"slots": 2})},
            link_delay_ms=0.0,
        )
        yield Running(stack, published, stack.enrol("user", published))


def test_every_replica_runs_with_its_own_engine_table_and_is_known_to_the_gateway(running: Running) -> None:
    stack = running.stack
    servers = [name for name in stack.processes if name.startswith("server-")]
    assert servers == ["server-0-0", "server-0-1"]
    assert all(stack.processes[name].running for name in servers)
    tables = [tomllib.loads((stack.workspace.path / f"{name}.toml").read_text())["engine"] for name in servers]
    assert tables == [{"threads": 1, "slots": 4}, {"threads": 1, "slots": 2}]
    routes = tomllib.loads((stack.workspace.path / "gateway.toml").read_text())["replicas"]
    assert {route["address"] for route in routes} == {stack.processes[name].address for name in servers}


def test_a_token_takes_at_least_one_round_trip_over_the_link(running: Running) -> None:
    stack = running.stack
    with stip.connect(running.profile) as connection:
        try:
            stack.delay_link(DELAY_MS)
            with connection.session() as session:
                times = [time.monotonic() for _ in session.generate(PROMPT, max_tokens=4, stop_ids=())]
        finally:
            stack.delay_link(0.0)
    assert len(times) == 4
    assert times[-1] - times[0] >= 3 * 2 * DELAY_MS / 1e3


def test_a_replica_that_was_killed_comes_back_where_it_listened(running: Running) -> None:
    stack = running.stack
    before = stack.processes["server-0-1"]
    before.kill()
    assert not before.running
    stack.restart("server-0-1")
    after = stack.processes["server-0-1"]
    assert after.running
    assert (after.address, after.metrics) == (before.address, before.metrics)
    assert after.pid != before.pid


def test_a_stack_that_runs_cannot_be_started_again(running: Running) -> None:
    with pytest.raises(ConfigurationError, match="server-0-0, server-0-1, gateway, delay, enclave still run"):
        running.stack.start([running.published])
    assert running.stack.processes["gateway"].running


def test_a_server_that_does_not_exist_cannot_be_launched_otherwise(tmp_path: Path, running: Running) -> None:
    with Stack(tmp_path / "other") as stack:
        with pytest.raises(ConfigurationError, match="launches: got server-1-0, allowed: server-0-0"):
            stack.start([running.published], launches={"server-1-0": Launch()})
        assert stack.processes == {}


def test_a_stack_without_a_delayed_link_says_so(tmp_path: Path) -> None:
    with Stack(tmp_path / "other") as stack, pytest.raises(ConfigurationError, match="without link_delay_ms"):
        stack.delay_link(1.0)
