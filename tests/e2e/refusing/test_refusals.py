"""What is refused end to end, under which code, and that the other instance goes on meanwhile.

`test_sentinels.py` looks for the prompts of these refusals in whatever they left behind.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import stip
from stip import keys
from stip.profile import Profile
from stip_protocol import telemetry
from stip_protocol.errors import (
    AttestationError,
    BudgetSpent,
    ChannelChanged,
    DelegationRefused,
    Draining,
    LeaseRevoked,
    ReplicaLost,
    SealedPartInvalid,
    StipError,
    Unavailable,
    UserRefused,
)
from stip_protocol.sealed import CHUNK_BYTES, HEADER_BYTES, TAG_BYTES
from stip_stack.adversary import RawClient, RawEnclave
from stip_stack.latency import scrape
from stip_stack.stack import BIN
from stip_stack.trials import Answer, Job, Served
from stip_stack.workspace import MEASUREMENT

if TYPE_CHECKING:
    from tests.e2e.conftest import System


HEARTBEAT = 16
"""`lease.heartbeat_tokens` of this stack's policy."""


async def heard(stream: AsyncIterator[stip.Chunk]) -> tuple[list[int], StipError]:
    """The ids that came before a turn failed, and what it failed with."""
    ids: list[int] = []
    try:
        async for chunk in stream:
            assert chunk.id is not None
            ids.append(chunk.id)
    except StipError as failure:
        return ids, failure
    raise AssertionError(f"the turn ended after {len(ids)} tokens and was not refused")


async def require_going_on(served: Served, seed: int = 1) -> None:
    """An instance answers, and as the plain model does."""
    job = Job(served.prompt(seed, 11), max_tokens=8)
    async with await stip.aconnect(served.profile) as connection, await connection.session() as session:
        served.require_plain(job, await job.run(session))


@asynccontextmanager
async def session_of(profile: Path) -> AsyncIterator[tuple[stip.AsyncConnection, stip.AsyncSession]]:
    async with await stip.aconnect(profile) as connection, await connection.session() as session:
        yield connection, session


# -- the enclave part on disk: first, while no grant has opened the victim yet ----------------------------------------


def flipped(data: bytes) -> bytes:
    return data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]


def truncated(data: bytes) -> bytes:
    return data[: HEADER_BYTES + 2 * (CHUNK_BYTES + TAG_BYTES)]


def swapped(data: bytes) -> bytes:
    size = CHUNK_BYTES + TAG_BYTES
    first, second = (data[HEADER_BYTES + at * size : HEADER_BYTES + (at + 1) * size] for at in (0, 1))
    assert len(second) == size
    return data[:HEADER_BYTES] + second + first + data[HEADER_BYTES + 2 * size :]


@pytest.mark.parametrize("tamper", [flipped, truncated, swapped], ids=lambda tamper: tamper.__name__)
async def test_a_changed_enclave_part_closes_its_instance_and_no_other(
    refusing: System, tamper: object, request: pytest.FixtureRequest
) -> None:
    victim, steady = refusing["victim"], refusing["steady"]
    async with session_of(steady.profile) as (_, session):
        with (
            altered(victim.published.folder / "enclave" / "embedding.sealed", tamper),
            pytest.raises(SealedPartInvalid),
        ):
            async with session_of(victim.profile):
                pass
        job = Job(steady.prompt(2, 9), max_tokens=8)
        steady.require_plain(job, await job.run(session))
    await require_going_on(steady)


async def test_an_instance_opens_once_its_enclave_part_is_whole_again(refusing: System) -> None:
    await require_going_on(refusing["victim"])


@contextmanager
def altered(path: Path, change: object) -> Iterator[None]:
    whole = path.read_bytes()
    assert callable(change)
    path.write_bytes(change(whole))
    try:
        yield
    finally:
        path.write_bytes(whole)


# -- users, budgets, delegations --------------------------------------------------------------------------------------


async def test_a_removed_user_stops_within_the_heartbeat_and_comes_back_no_more(refusing: System) -> None:
    victim, steady, stack = refusing["victim"], refusing["steady"], refusing.stack
    profile = stack.enrol("removed", victim.published)
    async with session_of(profile) as (connection, session):
        first = Job(victim.prompt(3, 5), max_tokens=10)
        said = await first.run(session)
        victim.require_plain(first, said)
        await asyncio.to_thread(stack.keyservice, "users", "remove", "removed")
        job = Job(victim.prompt(4, 3), max_tokens=300, before=first.ids + said.ids)
        ids, failure = await heard(session.generate(job.ids, max_tokens=job.max_tokens, stop_ids=()))
        # Over the control stream, or with the heartbeat where that comes first.
        assert isinstance(failure, UserRefused | LeaseRevoked)
        assert len(ids) <= HEARTBEAT
        victim.require_plain(job, Answer(ids, None))
        with pytest.raises(UserRefused):
            await connection.session()
    with pytest.raises(UserRefused):
        async with session_of(profile):
            pass
    await require_going_on(steady)
    await require_going_on(victim)


async def test_a_spent_budget_ends_the_session_that_spends_it_and_opens_no_other(refusing: System) -> None:
    victim, stack = refusing["victim"], refusing.stack
    profile = stack.enrol("poor", victim.published, budget=100)
    async with session_of(profile) as (_, session):
        job = Job(victim.prompt(5, 20), max_tokens=300)
        ids, failure = await heard(session.generate(job.ids, max_tokens=job.max_tokens, stop_ids=()))
        assert isinstance(failure, BudgetSpent)
        assert 100 - 20 <= len(ids) <= 100 - 20 + 1  # the last id needs no row
        victim.require_plain(job, Answer(ids, None))
    with pytest.raises(BudgetSpent):
        async with session_of(profile):
            pass
    await require_going_on(victim)


async def test_nobody_gets_in_with_another_users_delegation(refusing: System) -> None:
    victim, steady, stack = refusing["victim"], refusing["steady"], refusing.stack
    stack.enrol("owner", victim.published)
    owner = keys.load(stack.workspace.path / "user" / "owner.pem")
    stranger = keys.create(stack.workspace.path / "user" / "stranger.pem")
    async with RawClient.connect(Profile.load(victim.profile)) as raw:
        refused = {
            "signed by another key than the one it names": raw.delegation(user=owner.public),
            "made out to another enclave": RawEnclave(stack, victim.published).delegation(owner),
            "made out to another instance": raw.delegation(instance=steady.published.manifest.instance),
            "run out": raw.delegation(expires=int(time.time()) - 1),
            "for another measurement": raw.delegation(measurement=bytes(32)),
        }
        for case, delegation in refused.items():
            assert isinstance(await raw.talk(raw.open(delegation)), DelegationRefused), case
        unknown = Profile.load(victim.profile).model_copy(update={"user_key": stranger.path})
        async with RawClient.connect(unknown) as nobody:
            assert isinstance(await nobody.talk(nobody.open()), UserRefused)
        # The owner may use the victim only.
        foreign = Profile.load(steady.profile).model_copy(update={"user_key": owner.path})
        async with RawClient.connect(foreign) as outsider:
            assert isinstance(await outsider.talk(outsider.open()), UserRefused)
    # A genuine enclave in wrong hands: the owner's word was given to another one.
    thief = RawEnclave(stack, victim.published)
    with pytest.raises(DelegationRefused):
        await thief.bundle(RawEnclave(stack, victim.published).delegation(owner))
    await require_going_on(victim)


async def test_a_client_in_production_sends_a_simulated_enclave_nothing_but_a_challenge(refusing: System) -> None:
    steady, workspace = refusing["steady"], refusing.stack.workspace
    policy = workspace.write(
        "production-policy.toml", {"mode": "production", "audience": "client", "measurements": [MEASUREMENT.hex()]}
    )
    development = Profile.load(steady.profile)
    production = development.model_copy(update={"mode": "production", "simulated_root": None, "policy": policy})
    before = refusing.log("enclave").count("session opened")
    tokens = scrape_prompt_tokens(refusing)
    with pytest.raises(AttestationError) as refused:
        async with await stip.aconnect(production) as connection:
            await connection.session()
    assert refused.value.code == "simulated_evidence_refused"
    assert refusing.log("enclave").count("session opened") == before
    assert scrape_prompt_tokens(refusing) == tokens
    assert not (await stip.averify(production)).verified


async def test_a_restarted_enclave_is_another_one_until_it_is_verified_again(refusing: System) -> None:
    steady, stack = refusing["steady"], refusing.stack
    async with session_of(steady.profile) as (connection, session):
        first = Job(steady.prompt(11, 6), max_tokens=4)
        steady.require_plain(first, await first.run(session))
        stack.restart("enclave")
        tokens = scrape_prompt_tokens(refusing)
        _, failure = await heard(session.generate(steady.prompt(12, 6), max_tokens=4))
        assert isinstance(failure, Draining)
        with pytest.raises(ChannelChanged):
            await connection.session()
        assert scrape_prompt_tokens(refusing) == tokens
    for name in ("steady", "victim"):
        await require_going_on(refusing[name])


def scrape_prompt_tokens(system: System) -> list[str]:
    text = scrape(system.stack.processes["enclave"].metrics)
    return [line for line in text.splitlines() if line.startswith(telemetry.TOKENS.name)]


# -- replicas and gateway ---------------------------------------------------------------------------------------------


def test_a_server_refuses_a_checkpoint_that_differs_from_its_manifest(refusing: System, tmp_path: Path) -> None:
    stack, victim = refusing.stack, refusing["victim"]
    copy = tmp_path / "instance"
    shutil.copytree(victim.published.folder, copy, ignore=shutil.ignore_patterns("enclave", "secrets.sealed"))
    (shard,) = (copy / "server").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    changed = type(victim.published)(copy, victim.published.manifest, victim.published.digest)
    config = stack.workspace.server("server-changed", changed)
    argv = [str(BIN / "stip-server"), "serve", "--config", str(config)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "[manifest_mismatch]" in done.stderr.splitlines()[-1]
    assert shard.name in done.stderr


async def test_with_its_only_replica_killed_a_turn_ends_in_time_and_a_resting_session_goes_on_later(
    refusing: System,
) -> None:
    victim, steady, stack = refusing["victim"], refusing["steady"], refusing.stack
    server = refusing.server("victim")
    async with (
        session_of(victim.profile) as (connection, lost),
        session_of(victim.profile) as (_, resting),
        session_of(steady.profile) as (_, going),
    ):
        before = Job(victim.prompt(14, 8), max_tokens=6)
        said = await before.run(resting)
        victim.require_plain(before, said)
        job = Job(victim.prompt(6, 8), max_tokens=400)
        stream = lost.generate(job.ids, max_tokens=job.max_tokens, stop_ids=())
        first = await anext(stream)
        stack.processes[server].kill()
        ids, failure = await heard(stream)
        assert isinstance(failure, ReplicaLost)
        assert failure.retry_after
        assert len(ids) + 1 < job.max_tokens
        victim.require_plain(job, Answer([first.id or 0, *ids], None))
        other = Job(steady.prompt(7, 8), max_tokens=30)
        steady.require_plain(other, await other.run(going))
        with pytest.raises(ReplicaLost):
            await connection.session()
        stack.restart(server)  # by this thread: a process ends with the thread that started it
        again = Job(victim.prompt(8, 8), max_tokens=12)
        async with await until_available(connection) as session:
            victim.require_plain(again, await again.run(session))
        # It has fed its first turn again, to a server that knows nothing of it.
        after = Job(victim.prompt(15, 3), max_tokens=6, before=before.ids + said.ids)
        victim.require_plain(after, await after.run(resting))


async def test_a_gateway_that_is_told_to_leave_lets_running_answers_finish(refusing: System) -> None:
    victim, steady, stack = refusing["victim"], refusing["steady"], refusing.stack
    gateway = stack.processes["gateway"]
    async with session_of(victim.profile) as (_, running), await stip.aconnect(steady.profile) as other:
        job = Job(victim.prompt(9, 8), max_tokens=60)
        stream = running.generate(job.ids, max_tokens=job.max_tokens, stop_ids=())
        ids = [(await anext(stream)).id or 0]
        gateway.terminate()
        ids += [chunk.id or 0 async for chunk in stream]
        victim.require_plain(job, Answer(ids, stip.FinishReason.LENGTH))
        with pytest.raises(Unavailable):
            await other.session()
    assert await asyncio.to_thread(gateway.stop) == 0
    assert "drain ran out of time" not in refusing.log("gateway")
    stack.restart("gateway")
    for served in (victim, steady):
        async with await stip.aconnect(served.profile) as connection, await until_available(connection) as session:
            job = Job(served.prompt(10, 8), max_tokens=8)
            served.require_plain(job, await job.run(session))


async def until_available(connection: stip.AsyncConnection) -> stip.AsyncSession:
    """A session as soon as somebody serves it: what restarted may still be out of reach."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await connection.session()
            except Unavailable:
                await asyncio.sleep(0.2)
