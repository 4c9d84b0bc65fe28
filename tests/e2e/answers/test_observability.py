"""What operators see: metrics by stage, health, refusals by code, and one request id through all parts."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

import stip
from stip.profile import Profile
from stip_protocol import telemetry
from stip_protocol.telemetry import STAGES, Metric
from stip_stack.adversary import RawClient, channel_to
from stip_stack.latency import scrape
from stip_stack.trials import Job, Served

if TYPE_CHECKING:
    from tests.e2e.conftest import System


def value(system: System, process: str, metric: Metric, suffix: str = "", **labels: str) -> float:
    """The sum of a metric's samples with these labels."""
    name = metric.name + suffix
    return sum(
        sample.value
        for family in text_string_to_metric_families(scrape(system.stack.processes[process].metrics))
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def part_of(process: str) -> str:
    return process.split("-")[0]


def stages(system: System, server: str) -> dict[str, float]:
    """Observations of every stage, in the parts that one instance's sessions go through."""
    found = {}
    for stage, (part, _) in STAGES.items():
        process = server if part == "server" else part
        found[stage] = value(system, process, telemetry.STAGE_SECONDS, "_count", stage=stage)
    return found


async def generate(served: Served, max_tokens: int = 12) -> str:
    """One answer in a connection of its own; its request id."""
    async with await stip.aconnect(served.profile) as connection, await connection.session() as session:
        await Job(served.prompt(70, 9), max_tokens=max_tokens).run(session)
        return session.request_id


@pytest.mark.parametrize("preset", ["hardened", "paper"])
async def test_every_stage_of_an_answer_is_observed(answers: System, preset: str) -> None:
    served, server = answers[f"llama-{preset}"], answers.server(f"llama-{preset}")
    before = stages(answers, server)
    tokens = value(answers, "enclave", telemetry.TOKENS, direction="generated")
    first = value(answers, "enclave", telemetry.TIME_TO_FIRST_TOKEN, "_count")
    between = value(answers, "enclave", telemetry.TIME_BETWEEN_TOKENS, "_count")
    added = value(answers, "enclave", telemetry.ADDED_LATENCY, "_count")
    await generate(served, 12)
    after = stages(answers, server)
    unobserved = {stage for stage in STAGES if after[stage] <= before[stage]}
    assert unobserved == ({"head"} if preset == "paper" else set())
    assert after["sample"] - before["sample"] == 12
    assert value(answers, "enclave", telemetry.TOKENS, direction="generated") - tokens == 12
    assert value(answers, "enclave", telemetry.TIME_TO_FIRST_TOKEN, "_count") - first == 1
    assert value(answers, "enclave", telemetry.TIME_BETWEEN_TOKENS, "_count") - between == 11
    assert value(answers, "enclave", telemetry.ADDED_LATENCY, "_count") - added == 11
    rows = value(answers, server, telemetry.ROWS)
    assert rows >= 9 + 11


async def test_a_refusal_is_counted_under_its_code(answers: System) -> None:
    served = answers["gpt2-paper"]
    before = value(answers, "enclave", telemetry.REFUSALS, code="delegation_refused")
    async with RawClient.connect(Profile.load(served.profile)) as raw:
        assert (await raw.talk(raw.open(b"no delegation"))).code == "delegation_refused"
    assert value(answers, "enclave", telemetry.REFUSALS, code="delegation_refused") == before + 1


def test_every_part_shows_that_evidence_is_simulated(answers: System) -> None:
    for name in answers.stack.processes:
        assert value(answers, name, telemetry.SIMULATION) == 1, name
        lines = [json.loads(line) for line in answers.log(name).splitlines() if line.startswith("{")]
        assert lines
        assert all(line["simulated"] for line in lines), name


async def test_every_part_reports_itself_healthy(answers: System) -> None:
    for name in answers.stack.processes:
        async with await channel_to(answers.stack, name) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING, name


async def test_one_request_id_leads_through_the_logs_of_all_parts(answers: System) -> None:
    request_id = await generate(answers["llama-hardened"])
    server = answers.server("llama-hardened")
    for name in ("enclave", "gateway", server, "keyservice"):
        found = [json.loads(line) for line in answers.log(name).splitlines() if request_id in line]
        assert found, name
        assert all(line["request_id"] == request_id and line["part"] == part_of(name) for line in found), name
    assert all(
        request_id not in answers.log(name)
        for name in answers.stack.processes
        if name.startswith("server-") and name != server
    )


async def test_nothing_is_open_once_every_client_has_left(answers: System) -> None:
    await generate(answers["demo-paper"], 3)
    for name in answers.stack.processes:
        if name != "keyservice":
            assert await settled(answers, name) == 0, name


async def settled(system: System, name: str) -> float:
    """Sessions open at a part, once the last Close has arrived there."""
    for _ in range(100):
        if not (open_now := value(system, name, telemetry.SESSIONS)):
            break
        await asyncio.sleep(0.05)
    return open_now
