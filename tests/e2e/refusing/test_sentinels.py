"""A planted prompt, planted keys and planted rows, every error path forced: nothing of them is found anywhere.

The sweep sees what the tests of `test_refusals.py` left behind as well, where they ran before in this stack. It is
shown to find what the last tests plant.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import struct
import subprocess
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from prometheus_client import generate_latest

import stip
from stip import keys
from stip.profile import Profile
from stip_enclave.tables import open_part
from stip_keyservice.home import Home
from stip_protocol import rpc
from stip_protocol.errors import BY_CODE, FrameInvalid, StipError
from stip_protocol.secrets_file import grant_of, open_secrets
from stip_protocol.telemetry import Telemetry
from stip_protocol.wire import enclave_pb2, keyservice_pb2, model_pb2
from stip_stack.adversary import RawClient, RawEnclave, channel_to, route
from stip_stack.latency import scrape
from stip_stack.stack import BIN
from stip_stack.sweep import Finding, Material, Sentinel, files, sweep
from stip_stack.trials import Served

if TYPE_CHECKING:
    from tests.e2e.conftest import System


PROMPT = "a violet zebra whispers Quxtallion to 7 marble lighthouses"
HOLDERS = (
    "work/home/*.key",  # the key service's own
    "work/tee/*",  # the simulated platform's
    "work/operator/*.key",
    "work/user/*.pem",  # users' own
    # What protect made, and its sources: tests/protect looks into those.
    "work/instances/*/server/*",
    "work/instances/*/enclave/*",
    "work/instances/*/client/*",
    "wide-llama/*",
)
"""The only files that may hold a planted value, or are looked at elsewhere."""


@dataclass
class Record:
    """What was planted, and every error that a client, an enclave or an operator's peer was told."""

    sentinels: list[Sentinel] = field(default_factory=list)
    errors: list[Material] = field(default_factory=list)
    codes: set[str] = field(default_factory=set)

    def error(self, where: str, error: BaseException) -> None:
        text = [str(error), repr(error), *traceback.format_exception(error)]
        if isinstance(error, grpc.aio.AioRpcError):
            text += [str(error.details()), str(error.trailing_metadata()), str(error.debug_error_string())]
            error = rpc.from_rpc(error)
        if isinstance(error, StipError):
            self.codes.add(error.code)
        self.errors.append((f"error of {where}", "\n".join(text).encode()))


@pytest.fixture(scope="module")
def record(refusing: System) -> Record:
    """Everything secret that a test can reach, planted by being used."""
    home, found = refusing.stack.workspace.home, Record()
    add = found.sentinels.append
    add(Sentinel.of_text("prompt", PROMPT))
    for name in ("victim", "steady"):
        served = refusing[name]
        for seed in range(20):
            add(Sentinel.of_ids(f"ids of a prompt to {name}", served.prompt(seed, 24)))
        sealed = (served.published.folder / "secrets.sealed").read_bytes()
        opened = open_secrets(sealed, home.sealing)
        grant = grant_of(opened)
        add(Sentinel.of_bytes(f"root secret of {name}", opened.root))
        add(Sentinel.of_bytes(f"part key of {name}", grant.part_key))
        if grant.vocabulary_seed is not None:
            add(Sentinel.of_bytes(f"vocabulary seed of {name}", grant.vocabulary_seed))
        part = open_part(served.published.folder / "enclave", served.published.manifest, served.published.digest, grant)
        for id_ in planted_ids(served)[:4]:
            add(Sentinel.of_row(f"keyed row of {name}", part.embedding.array[id_]))
    for name, key in key_bytes(home):
        add(Sentinel.of_bytes(name, key))
    for path in sorted((refusing.stack.workspace.path / "user").glob("*.pem")):
        add(Sentinel.of_bytes(f"key of {path.stem}", keys.load(path).private.private_bytes_raw()))
    return found


def key_bytes(home: Home) -> Iterator[tuple[str, bytes]]:
    """The private keys of a key service's home."""
    yield "root key", home.root.material()
    for name in ("developer", "service", "sealing"):
        yield f"{name} key", getattr(home, name).private_bytes_raw()
    for name, ec_key in (("link CA key", home.link_ca.key), ("TLS CA key", home.tls_ca.key)):
        yield name, ec_key.private_numbers().private_value.to_bytes(32, "big")
        der = ec_key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        yield f"{name}, whole", der[-100:-60]


def planted_ids(served: Served) -> list[int]:
    """The prompt's ids for an instance: by its tokenizer, or random ones."""
    return served.prompt(0, 24)


def materials(system: System, record: Record) -> Iterator[Material]:
    """Files, logs among them, metrics of every part, and errors."""
    yield from files(system.stack.workspace.path.parent, excluded=HOLDERS)
    for name, process in system.stack.processes.items():
        yield f"metrics of {name}", scrape(process.metrics).encode()
    yield from record.errors


# -- error paths ----------------------------------------------------------------------------------------------------


async def heard(record: Record, where: str, stream: AsyncIterator[stip.Chunk]) -> None:
    """The answer is as secret as the prompt; so is what ended it."""
    ids: list[int] = []
    text = ""
    try:
        async for chunk in stream:
            ids += [] if chunk.id is None else [chunk.id]
            text += chunk.text
    except StipError as error:
        record.error(where, error)
    if len(set(ids)) > 6:
        record.sentinels.append(Sentinel.of_ids(f"ids of the answer to {where}", ids[:40]))
    if len(text) > 40:
        record.sentinels.append(Sentinel.of_text(f"answer to {where}", text[:60]))


async def test_planted_prompts_meet_every_failure_of_a_session(refusing: System, record: Record) -> None:
    stack, steady, victim = refusing.stack, refusing["steady"], refusing["victim"]
    async with await stip.aconnect(steady.profile) as connection:
        record.sentinels.append(Sentinel.of_ids("ids of the prompt", connection.tokenizer.encode(PROMPT, special=True)))
        async with await connection.session() as session:
            await heard(record, "a prompt", session.generate(PROMPT, max_tokens=40, temperature=1.0, seed=1))
            assert session.last is not None
            for wrong in ({"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 7.0}, {"stop_ids": [10**9]}):
                with pytest.raises(StipError) as refused:
                    session.generate(PROMPT, **wrong)
                record.error(f"sampling {wrong}", refused.value)
            with pytest.raises(StipError) as refused:
                session.generate([*planted_ids(steady), 10**6])
            record.error("an id outside of the vocabulary", refused.value)
            with pytest.raises(StipError) as refused:
                session.generate(PROMPT * 99)
            record.error("a prompt that is too long", refused.value)
            await heard(record, "a turn that runs out of time", session.generate(PROMPT, max_tokens=400, timeout=0.01))
    poor = stack.enrol("planted-poor", victim.published, budget=40)
    with suppress(StipError):
        async with await stip.aconnect(poor) as connection, await connection.session() as session:
            await heard(record, "no budget", session.generate(planted_ids(victim), max_tokens=200))
    server = refusing.server("victim")
    async with await stip.aconnect(victim.profile) as connection, await connection.session() as session:
        stream = session.generate(planted_ids(victim), max_tokens=400, stop_ids=())
        await anext(stream)
        stack.processes[server].kill()
        await heard(record, "a killed replica", stream)
    stack.restart(server)
    stack.processes["keyservice"].stop()
    with pytest.raises(StipError) as refused:
        async with await stip.aconnect(steady.profile) as connection, await connection.session():
            pass
    record.error("no key service", refused.value)
    stack.restart("keyservice")
    argv = [str(BIN / "stip"), "generate", "--profile", str(steady.profile), "--max-tokens", "0", PROMPT]
    done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, check=False)
    assert done.returncode != 0
    record.errors.append(("stderr of stip generate", done.stderr))
    assert {"request_invalid", "position_refused", "deadline_exceeded", "replica_lost", "unavailable"} <= record.codes


async def test_planted_ids_are_in_turns_that_break_the_rules(refusing: System, record: Record) -> None:
    for name in ("steady", "victim"):
        served = refusing[name]
        ids = planted_ids(served)
        packed = struct.pack(f"<{len(ids)}I", *ids)
        text = PROMPT.encode()
        async with RawClient.connect(Profile.load(served.profile)) as raw:
            turns: dict[str, dict[str, Any]] = {
                "a NaN": {"ids": packed, "sampling": {"temperature": float("nan"), "max_tokens": 4}},
                "no tokens": {"ids": packed, "sampling": {}},
                "half an id": {"ids": packed + b"\1", "sampling": {"max_tokens": 4}},
                "ids that are text": {"ids": (text * 4)[: len(text) // 4 * 4], "sampling": {"max_tokens": 4}},
                "too many ids": {"ids": packed * 40, "sampling": {"max_tokens": 4}},
                "stop ids that are text": {"ids": packed, "sampling": {"max_tokens": 4, "stop_ids": text + b"!"}},
            }
            for case, turn in turns.items():
                sampling = enclave_pb2.Sampling(**turn["sampling"])
                frame = enclave_pb2.ClientFrame(turn=enclave_pb2.Turn(ids=turn["ids"], sampling=sampling))
                record.error(f"{name}: {case}", await raw.talk(raw.open(), frame))
            running = enclave_pb2.Turn(ids=packed, sampling=enclave_pb2.Sampling(max_tokens=400))
            frames = [enclave_pb2.ClientFrame(turn=running)] * 2
            record.error(f"{name}: two turns", await raw.talk(raw.open(), *frames))
            record.error(f"{name}: a delegation that is text", await raw.talk(raw.open(text)))
            record.error(f"{name}: a turn before the opening", await raw.talk(frames[0]))


async def test_planted_rows_are_in_frames_that_break_the_rules(refusing: System, record: Record) -> None:
    stack = refusing.stack
    for name in ("steady", "victim"):
        served = refusing[name]
        published, home = served.published, stack.workspace.home
        grant = grant_of(open_secrets((published.folder / "secrets.sealed").read_bytes(), home.sealing))
        part = open_part(published.folder / "enclave", published.manifest, published.digest, grant)
        rows = np.ascontiguousarray(part.embedding.array[planted_ids(served)])
        enclave, key = RawEnclave(stack, published), keys.load(Profile.load(served.profile).user_key)
        number = enclave.identity.link_key.private_numbers().private_value
        record.sentinels.append(Sentinel.of_bytes("link key of an enclave", number.to_bytes(32, "big")))
        for case, (slice_of, data) in broken_frames(rows).items():
            async with enclave.link(key) as link:
                for what in ("user_key", "cache_salt"):
                    record.sentinels.append(Sentinel.of_bytes(f"{what} of a bundle", getattr(link.bundle, what)))
                try:
                    await link.feed(slice_of(await link.open()), rows=data)
                    down = await link.read()
                    assert down.HasField("closed"), case
                    record.codes.add(down.closed.code)
                    record.errors.append((f"{name}: {case}", str(down.closed).encode()))
                except StipError as error:
                    record.error(f"{name}: {case}", error)
    assert {"tensor_invalid", "position_refused", "session_unknown", "frame_invalid", "lease_spent"} <= record.codes


def broken_frames(rows: np.ndarray) -> dict[str, tuple[Callable[[bytes], tuple[bytes, int, int]], bytes]]:
    """By case: the slice for a session (itself, position, count), and the rows."""
    count, whole, broken = len(rows), rows.tobytes(), rows.copy()
    broken[-1, -1] = np.nan
    return {
        "a NaN": (lambda session: (session, 0, count), broken.tobytes()),
        "a wrong position": (lambda session: (session, 5, count), whole),
        "an unknown session": (lambda session: (secrets.token_bytes(16), 0, count), whole),
        "half a row": (lambda session: (session, 0, 1), whole[: len(whole) // count // 2]),
        "rows too many": (lambda session: (session, 0, 1), whole),
        "an absurd count": (lambda session: (session, 0, 2**31), whole),
        "more than the lease": (lambda session: (session, 0, 20 * count), whole * 20),
        "more than a message": (lambda session: (session, 0, 1), whole * (1 + 2**22 // len(whole))),
    }


METHODS: dict[str, tuple[str, bool, Any]] = {
    "/stip.enclave.v1.Enclave/Attest": ("enclave", False, enclave_pb2.AttestRequest),
    "/stip.enclave.v1.Enclave/Session": ("enclave", True, enclave_pb2.ClientFrame),
    "/stip.keyservice.v1.KeyService/Challenge": ("keyservice", False, keyservice_pb2.ChallengeRequest),
    "/stip.keyservice.v1.KeyService/Release": ("keyservice", False, keyservice_pb2.ReleaseRequest),
    "/stip.keyservice.v1.KeyService/Renew": ("keyservice", False, keyservice_pb2.RenewRequest),
    "/stip.model.v1.Model/Describe": ("gateway", False, model_pb2.InstanceRef),
    "/stip.model.v1.Model/Link": ("gateway", True, model_pb2.Up),
    "/stip.model.v1.Model/Describe ": ("server", False, model_pb2.InstanceRef),
    "/stip.model.v1.Model/Link ": ("server", True, model_pb2.Up),
    "/grpc.health.v1.Health/Check": ("enclave", False, None),
    "/a.service/that-is-not-there": ("gateway", False, None),
}
"""Every endpoint: the process that offers it, whether it is a stream, and its message. A space tells two apart."""


def malformed(message: Any) -> Iterator[tuple[str, bytes]]:
    """Messages with the prompt inside that no endpoint can take."""
    text = PROMPT.encode()
    unknown = b"\xc2\x3e" + bytes([len(text)]) + text  # field 1000, length-delimited
    yield "unknown fields", unknown
    yield "nothing", b""
    yield "text", text
    yield "random bytes", np.random.default_rng(7).bytes(200) + text
    yield "a field cut short", b"\x0a\x7f" + text
    yield "a huge message", text * (rpc.MESSAGE_BYTES * 2 // len(text))
    if message is None:
        return
    for descriptor in message.DESCRIPTOR.fields:
        if descriptor.type == descriptor.TYPE_BYTES:
            yield f"text as {descriptor.name}", message(**{descriptor.name: text}).SerializeToString() + unknown
        elif descriptor.type == descriptor.TYPE_MESSAGE:
            inner = descriptor.message_type
            values = {each.name: text for each in inner.fields if each.type == each.TYPE_BYTES and not each.is_repeated}
            filled = message(**{descriptor.name: values}).SerializeToString()
            yield f"text in {descriptor.name}", filled + unknown


async def test_the_planted_prompt_is_in_malformed_messages_to_every_endpoint(refusing: System, record: Record) -> None:
    metadata = route(refusing["victim"].published)
    refused = 0
    for method, (part, streams, message) in METHODS.items():
        process = refusing.server("victim") if part == "server" else part
        async with await channel_to(refusing.stack, process) as channel:
            for case, data in malformed(message):
                where = f"{method.strip()} of the {part}: {case}"
                try:
                    if streams:
                        call: Any = channel.stream_stream(method.strip())(metadata=metadata)
                        with suppress(asyncio.InvalidStateError):
                            await call.write(data)
                            await call.done_writing()
                        async with asyncio.timeout(10):
                            async for reply in call:
                                record.errors.append((where, bytes(reply)))
                    else:
                        reply = await channel.unary_unary(method.strip())(data, timeout=10)
                        record.errors.append((where, bytes(reply)))
                except grpc.aio.AioRpcError as error:
                    refused += 1
                    record.error(where, error)
    assert refused > 30


def test_nothing_planted_is_found_in_logs_metrics_errors_or_files(refusing: System, record: Record) -> None:
    looked = list(materials(refusing, record))
    names = {name for name, _ in looked}
    assert {f"work/logs/{name}.jsonl" for name in refusing.stack.processes} <= names
    assert {"work/home/state.db", "work/home/state.db-wal"} <= names
    assert {f"metrics of {name}" for name in refusing.stack.processes} <= names
    assert sweep(record.sentinels, looked) == []


# -- the sweep itself -----------------------------------------------------------------------------------------------

IDS = [311, 7, 2045, 19, 1204, 530]
KEY = bytes(range(200, 232))
ROW = np.random.default_rng(5).normal(size=32).astype(np.float32)
PLANTED = [
    Sentinel.of_text("prompt", PROMPT),
    Sentinel.of_ids("ids", IDS),
    Sentinel.of_bytes("key", KEY),
    Sentinel.of_row("row", ROW),
]
PACKED = struct.pack(f"<{len(IDS)}I", *IDS)
LEAKS: dict[str, tuple[str, str]] = {
    "the prompt": ("prompt", PROMPT),
    "a part of the prompt": ("prompt", "bad token after: " + PROMPT[10:30]),
    "the prompt as base64": ("prompt", base64.b64encode(b"x" + PROMPT.encode()).decode()),
    "ids as a list": ("ids", repr(IDS)),
    "ids as an array": ("ids", repr(np.array(IDS))),
    "ids as JSON": ("ids", json.dumps(IDS, separators=(",", ":"))),
    "a part of the ids": ("ids", f"ids {IDS[1]} {IDS[2]} {IDS[3]} {IDS[4]}"),
    "ids as bytes, in hex": ("ids", PACKED.hex()),
    "ids as bytes, escaped": ("ids", repr(PACKED)),
    "ids as int64, in base64": ("ids", base64.b64encode(np.array(IDS).tobytes()).decode()),
    "a key in hex": ("key", KEY.hex()),
    "a key in capital hex": ("key", KEY.hex().upper()),
    "a key's beginning in hex": ("key", KEY.hex()[:30]),
    "a key's end in base64": ("key", base64.b64encode(b"ab" + KEY[-20:]).decode()),
    "a key, escaped": ("key", repr(KEY)),
    "a key as numbers": ("key", str(list(KEY))),
    "a key as characters": ("key", KEY.decode("latin-1")),
    "a row as printed": ("row", str(ROW)),
    "a row as a list": ("row", str(ROW.tolist())),
    "a part of a row, rounded": ("row", np.array2string(ROW[6:15], precision=5)),
    "a row's bytes in hex": ("row", ROW[3:9].tobytes().hex()),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_the_sweep_finds_a_leak_in_a_log_a_metric_and_an_error(refusing: System, leak: str) -> None:
    sentinel, text = LEAKS[leak]
    log = refusing.stack.workspace.logs / "planted.jsonl"
    log.write_text(json.dumps({"event": "refused", "part": "enclave", "detail": text}) + "\n")
    try:
        found = sweep(PLANTED, files(refusing.stack.workspace.path.parent, excluded=HOLDERS))
    finally:
        log.unlink()
    assert found == [Finding(sentinel, "work/logs/planted.jsonl")]
    telemetry = Telemetry("enclave", simulated=True)
    telemetry.refused(text)
    assert sweep(PLANTED, [("metrics", generate_latest(telemetry.registry))]) == [Finding(sentinel, "metrics")]
    record = Record()
    record.error("a session", FrameInvalid.because("turn ids", text, "ids of the vocabulary"))
    assert sweep(PLANTED, record.errors) == [Finding(sentinel, "error of a session")]


def test_the_sweep_finds_raw_bytes_in_files_and_nothing_in_their_neighbours() -> None:
    looked = [
        (name, b"\0" * 5 + data + b"\0" * 5) for name, data in (("key", KEY), ("ids", PACKED), ("row", ROW.tobytes()))
    ]
    assert sweep(PLANTED, looked) == [Finding(name, name) for name, _ in looked]
    others = {"another key": KEY[:11] + KEY[12:20] + KEY[21:27], "other ids": repr(IDS[::-1]).encode(), "nothing": b""}
    assert sweep(PLANTED, others.items()) == []


def test_every_code_of_the_refusals_is_a_stable_one(record: Record) -> None:
    assert record.codes <= BY_CODE.keys()
