"""Tensor parallelism: two processes that hold half of every matrix give what one gives, and leave together."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from stip_protocol.errors import ConfigurationError
from stip_protocol.manifest import Manifest, file_digest
from stip_protocol.rpc import channel
from stip_protocol.wire import model_pb2 as wire
from stip_protocol.wire import model_pb2_grpc
from stip_server.config import TransformersSettings
from stip_server.engine import Form
from stip_server.engines.transformers.parallel import Part, Ranks, Step
from stip_server.engines.transformers.sharding import require_plan
from stip_server.engines.transformers.slots import Vacate
from tests.server.models import MODELS, tiny

KEY = Ed25519PrivateKey.generate()
INSTANCE = "cd" * 16
VOCABULARY = 212
"""Even, so that two processes can share the logits."""
CUT = {
    "llama": (Form.TOP, 1),
    "gemma2": (Form.IDS, 1),
    "phi3, sliding": (Form.TOP, 2),
    "gpt_neox": (Form.IDS, 2),
    "mixtral": (Form.TOP, 1),
    "qwen3_moe, sliding": (Form.IDS, 1),
}
"""Families with a plan, what their sessions ask for, and the key-value heads that each of two processes keeps."""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
_accelerator = torch.accelerator.current_accelerator()
cuts_models = pytest.mark.skipif(
    _accelerator is not None and torch.accelerator.current_accelerator(check_available=True) is None,
    reason=f"no GPU: transformers cuts models on the {_accelerator} that this build of torch is for, and there is none",
)


def cut_model(name: str) -> Any:
    model = tiny(name)
    model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    return model


async def torchrun(*arguments: str, processes: int = 2) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=ENVIRONMENT,
    )


@contextlib.asynccontextmanager
async def serving(config: Path, processes: int = 2) -> AsyncIterator[asyncio.subprocess.Process]:
    arguments = ("-m", "stip_server.cli", "serve", "--config", str(config))
    started = await torchrun(*arguments, processes=processes)
    try:
        yield started
    finally:
        if started.returncode is None:
            for one in [*psutil.Process(started.pid).children(recursive=True), psutil.Process(started.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            await started.wait()


@pytest.fixture
def config(tmp_path: Path, pki: Any) -> Path:
    server = tmp_path / "instance" / "server"
    cut_model("llama").base_model.save_pretrained(server)
    Manifest(
        instance=INSTANCE,
        epoch=1,
        preset="hardened",
        dtype="float32",
        width=48,
        vocabulary=VOCABULARY,
        max_positions=64,
        output="hidden",
        server={path.name: file_digest(path) for path in server.iterdir()},
        enclave={},
        certificate={},
    ).write(tmp_path / "instance" / "manifest.json", KEY)
    files = {"ca.pem": pki.ca, "server.pem": pki.server[0], "server.key": pki.server[1]}
    files["developer.pub"] = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    path = tmp_path / "server.toml"
    path.write_text("""
name = "replica-1"
instance = "instance"
developer_key = "developer.pub"
certificate = "server.pem"
private_key = "server.key"
client_ca = "ca.pem"
simulated = true
[serving]
metrics_snapshot_seconds = 0
drain_seconds = 20
[engine]
slots = 2
threads = 1
tensor_parallel = 2
""")
    return path


async def announced(server: asyncio.subprocess.Process) -> dict[str, Any]:
    assert server.stdout is not None
    line: dict[str, Any] = json.loads(await server.stdout.readline())
    assert (line["event"], line["part"]) == ("listening", "server")
    return line


def ranks_of(server: asyncio.subprocess.Process) -> list[psutil.Process]:
    """The processes of a replica, by rank."""
    found = [child for child in psutil.Process(server.pid).children() if "RANK" in child.environ()]
    return sorted(found, key=lambda child: int(child.environ()["RANK"]))


@cuts_models
async def test_two_processes_give_the_tokens_of_one_whatever_the_family(tmp_path: Path) -> None:
    request, expected = {}, {}
    torch.manual_seed(3)
    for name, (form, kept) in CUT.items():
        model = cut_model(name)
        model.save_pretrained(tmp_path / name)
        prompts = [torch.randint(1, VOCABULARY, (length,)).tolist() for length in (21, 5, 14)]
        request[name] = {"folder": str(tmp_path / name), "form": form, "prompts": prompts, "count": 12, "chunk": 8}
        ids = []
        for prompt in prompts:
            sequence = list(prompt)
            with torch.inference_mode():
                for _ in range(12):
                    sequence.append(int(model(torch.tensor([sequence])).logits[0, -1].argmax()))
            ids.append(sequence[len(prompt) :])
        expected[name] = {"ids": ids, "kv_heads": kept}
    (tmp_path / "request").write_text(json.dumps(request))
    ran = await torchrun("-m", "tests.server.ranks", str(tmp_path / "request"), str(tmp_path / "answer"))
    _, logs = await ran.communicate()
    assert ran.returncode == 0, logs.decode()[-3000:]
    assert json.loads((tmp_path / "answer").read_text()) == expected


@cuts_models
async def test_a_replica_of_two_processes_answers_drains_on_sigterm_and_leaves_no_process(
    config: Path, pki: Any
) -> None:
    model = cut_model("llama")
    ids = [3, 1, 4, 1, 5]
    rows = model.get_input_embeddings().weight.detach()[ids]
    with torch.inference_mode():
        expected = model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
    async with serving(config) as server:
        line = await announced(server)
        ranks = ranks_of(server)
        assert len(ranks) == 2
        async with channel(line["address"], roots=pki.ca, identity=pki.client, server_name="localhost") as made:
            stub = model_pb2_grpc.ModelStub(made)  # type: ignore[no-untyped-call]
            link = stub.Link(metadata=(("stip-instance", INSTANCE), ("stip-epoch", "1")))
            await link.write(wire.Up(open=wire.Open(session=b"h" * 16, output=wire.OUTPUT_HIDDEN, max_positions=64)))
            assert (await link.read()).WhichOneof("body") == "opened"
            for process in ranks:
                process.send_signal(signal.SIGTERM)
            assert (await link.read()).drain.seconds == 20
            # It drains: the session that is open still gets its answer, from both ranks.
            piece = wire.Slice(session=b"h" * 16, position=0, count=5, outputs=1)
            await link.write(wire.Up(feed=wire.Feed(slices=[piece], rows=rows.numpy().tobytes())))
            got = torch.frombuffer(bytearray((await link.read()).fed.hidden), dtype=torch.float32)
            torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
            await link.write(wire.Up(close=wire.Close(session=b"h" * 16)))
            _, logs = await server.communicate()
        assert server.returncode == 0, logs.decode()[-3000:]
        assert not any(process.is_running() for process in ranks)
    events = [json.loads(entry) for entry in logs.decode().splitlines() if entry.startswith("{")]
    assert {"following", "listening", "draining", "stopped"} <= {entry["event"] for entry in events}


@cuts_models
@pytest.mark.parametrize("rank", [0, 1])
async def test_a_rank_that_is_killed_takes_the_others_with_it(config: Path, rank: int) -> None:
    async with serving(config) as server:
        await announced(server)
        ranks = ranks_of(server)
        ranks[rank].kill()
        await server.communicate()
        assert server.returncode != 0
        assert not any(process.is_running() for process in ranks)


@cuts_models
async def test_a_family_without_a_plan_is_refused_by_every_rank(config: Path, tmp_path: Path) -> None:
    server = tmp_path / "instance" / "server"
    for path in server.iterdir():
        path.unlink()
    tiny("gpt2").base_model.save_pretrained(server)
    manifest = tmp_path / "instance" / "manifest.json"
    fields = Manifest.load(manifest, KEY.public_key())[0].model_dump()
    fields["server"] = {path.name: file_digest(path) for path in server.iterdir()}
    Manifest(**fields).write(manifest, KEY)
    async with serving(config) as run:
        out, logs = await run.communicate()
        assert run.returncode != 0
        assert b"listening" not in out
        assert "engine.tensor_parallel: got 2, allowed: 1 (transformers has no tp_plan for gpt2)" in logs.decode()


async def test_another_number_of_processes_than_configured_is_refused(config: Path) -> None:
    async with serving(config, processes=1) as run:
        _, logs = await run.communicate()
        assert run.returncode != 0
        assert "engine.tensor_parallel: got 2, allowed: 1, as many as were started" in logs.decode()


REFUSED = {
    "no plan: opt": ("opt", 2, "tp_plan for opt"),
    "heads that do not divide": ("llama", 3, "2 key-value heads"),
    "logits that do not divide": ("llama", 2, "211 logits"),
    "logits that do not divide, keys gathered": ("phi3, sliding", 4, "211 logits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_cannot_be_cut_is_refused_by_field(case: str) -> None:
    name, ranks, allowed = REFUSED[case]
    with pytest.raises(ConfigurationError, match=allowed) as refused:
        require_plan(MODELS[name](), ranks, head=True)
    assert refused.value.field == "engine.tensor_parallel"


def test_a_model_can_be_cut_as_often_as_its_heads_divide() -> None:
    require_plan(MODELS["llama"](), 2, head=False)
    require_plan(MODELS["gpt_neox"](), 4, head=False)


def test_one_process_needs_no_others() -> None:
    assert Ranks.join(TransformersSettings()) is None


numbers = st.integers(0, 2**31)
parts = st.builds(
    Part, numbers, numbers, numbers, st.lists(st.binary(max_size=9).map(memoryview)), st.sampled_from(Form), numbers
)


@given(st.lists(st.builds(Vacate, numbers, numbers, numbers, numbers)), st.lists(parts))
def test_a_step_is_heard_as_it_was_announced(moves: list[Vacate], work: list[Part]) -> None:
    heard = Step.decode(Step(moves, work).encode())
    assert heard.moves == moves

    def facts(step: Any) -> list[Any]:
        return [(w.slot, w.position, w.count, b"".join(w.rows), w.form, w.outputs) for w in step]

    assert facts(heard.work) == facts(work)
