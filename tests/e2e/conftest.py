"""Whole systems of real processes, and the plain models they are held against.

`answers` is for tests that only ask; it serves every model under both presets. `refusing` is for tests that remove
users, tamper, kill and drain; those run in the order of their files, and `test_shutdown.py`, the last of them, stops
it. `failover` serves three presets on two replicas each, which come and go. `recording` has a recorder before every
server. `revoking` has something between enclave and key service that can be cut. `rotating` gets another epoch. Each
has a folder (of `recording` it is `audit`), which stays on one worker (tests/conftest.py).
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from stip_keyservice.protect.instance import protect
from stip_stack.reference import PlainModel
from stip_stack.stack import Stack
from stip_stack.trials import Served

DEMO_MODEL = Path(__file__).parents[2] / "stack" / "demo_model"
START_SECONDS = 400
FAILOVER_SECONDS = 2.0
"""How long a session of `refusing` looks for another replica."""

torch.set_num_threads(1)


def _randomised(model: Any, seed: int) -> Any:
    """Every parameter random, norms and biases too, at scales that leave the logits far from flat."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim == 2:
            scale = 0.4 if "wte" in name or "embed_tokens" in name else 1.6 / tensor.shape[-1] ** 0.5
            tensor.data = noise * scale
        else:
            tensor.data = noise * 0.3 + (0.0 if name.endswith("bias") else 1.0)
    return model


def _gpt2() -> Any:
    config = GPT2Config(vocab_size=331, n_embd=48, n_layer=2, n_head=4, n_positions=512, bos_token_id=0, eos_token_id=0)
    return _randomised(GPT2LMHeadModel(config), 11)


def _llama(vocabulary: int, width: int, positions: int = 512) -> Any:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=12,
        num_key_value_heads=3,
        head_dim=8,
        max_position_embeddings=positions,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _randomised(LlamaForCausalLM(config), 12)


MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": _gpt2,
    "llama": lambda: _llama(211, 60),
    # Its embedding fills three chunks of a sealed file.
    "wide-llama": lambda: _llama(5003, 132),
    # A turn outlasts whatever is done meanwhile.
    "long-llama": lambda: _llama(211, 60, positions=8192),
}


class System:
    """A running stack and the instances it serves."""

    def __init__(self, stack: Stack, served: dict[str, Served]) -> None:
        self.stack, self.served = stack, served

    def __getitem__(self, name: str) -> Served:
        return self.served[name]

    def server(self, name: str) -> str:
        """The process that holds an instance."""
        return self.servers(name)[0]

    def servers(self, name: str) -> list[str]:
        """The processes that hold an instance."""
        prefix = f"server-{list(self.served).index(name)}-"
        return [process for process in self.stack.processes if process.startswith(prefix)]

    def log(self, name: str) -> str:
        return (self.stack.workspace.logs / f"{name}.jsonl").read_text()


def _system(path: Path, chosen: dict[str, tuple[str, str]], **starting: Any) -> Iterator[System]:
    """Protect and serve instances given as name: (model, preset)."""
    temporary = path / "temporary"
    temporary.mkdir(parents=True)
    with Stack(path / "work", environment={"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}) as stack:
        home, sources, plain = stack.workspace.home, {"demo": DEMO_MODEL}, {}
        for model in {model for model, _ in chosen.values()}:
            if model != "demo":
                sources[model] = path / model
                MODELS[model]().save_pretrained(sources[model])
            plain[model] = PlainModel(sources[model])
        published = {}
        for name, (model, preset) in chosen.items():
            folder = path / "work" / "instances" / name
            folder.parent.mkdir(exist_ok=True)
            protect(
                sources[model],
                folder,
                preset=preset,  # type: ignore[arg-type]
                developer=home.developer,
                seal_to=home.sealing.public_key(),
                accept_tied_head=model == "gpt2",
                accept_token_cipher=preset == "throughput",
            )
            published[name] = stack.workspace.published(folder)
        stack.start(list(published.values()), engine={"slots": 32, "threads": 1}, **starting)
        stack.enrol("user", *published.values(), budget=2**40)
        yield System(stack, {
            name: Served(
                name,
                each,
                plain[chosen[name][0]],
                stack.profile("user", each, name=f"profile-{name}"),
            )
            for name, each in published.items()
        })  # fmt: skip


ANSWERING = {
    f"{model}-{preset}": (model, preset) for model in ("demo", "gpt2", "llama") for preset in ("hardened", "paper")
}


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Every model under both presets, and nothing that breaks."""
    yield from _system(tmp_path_factory.mktemp("answers"), ANSWERING, policy={"lease": {"tokens": 8192}})


@pytest.fixture(params=ANSWERING)
def served(request: pytest.FixtureRequest, answers: System) -> Served:
    return answers[request.param]


@pytest.fixture(scope="session")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Two instances in one enclave: `victim` is what tests break, `steady` is what must go on. Each is on one replica:
    who loses it looks for another for a moment only."""
    yield from _system(
        tmp_path_factory.mktemp("refusing"),
        {"victim": ("wide-llama", "hardened"), "steady": ("demo", "paper")},
        policy={"lease": {"heartbeat_tokens": 16, "tokens": 64}},
        limits={"failover_seconds": FAILOVER_SECONDS},
    )


REPLICATED = {
    "demo-hardened": ("demo", "hardened"),
    "llama-paper": ("llama", "paper"),
    "llama-throughput": ("llama", "throughput"),
}


@pytest.fixture(scope="session")
def failover(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Every preset, two replicas each: what tests kill and drain."""
    yield from _system(tmp_path_factory.mktemp("failover"), REPLICATED, replicas=2)


@pytest.fixture(params=REPLICATED)
def replicated(request: pytest.FixtureRequest, failover: System) -> Served:
    return failover[request.param]


class Cut:
    """A forwarder between enclave and key service that a hostile host can cut and mend."""

    def __init__(self) -> None:
        self.mended = threading.Event()
        self.mended.set()
        self._target = ("", 0)
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "127.0.0.1:{1}".format(*self._listener.getsockname())

    def before(self, address: str) -> str:
        """Stand before the part that listens at an address; where to find it now."""
        host, _, port = address.rpartition(":")
        self._target = (host, int(port))
        threading.Thread(target=self._accept, daemon=True).start()
        return self.address

    def cut(self) -> None:
        """Break every connection, and let none through."""
        self.mended.clear()
        pairs, self._pairs = self._pairs, []
        for one in (each for pair in pairs for each in pair):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self.mended.set()

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if not self.mended.is_set():
                    near.close()
                    continue
                far = socket.create_connection(self._target)
                self._pairs.append((near, far))
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=ends, daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


@dataclass
class Revoking:
    """A system whose enclave reaches the key service through what a hostile host can cut."""

    system: System
    between: Cut


HEARTBEAT_TOKENS = 48
"""Of `revoking`'s policy."""


@pytest.fixture(scope="session")
def revoking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Revoking]:
    """Two instances in one enclave: what is revoked, and `steady`, which must notice nothing."""
    between = Cut()
    try:
        for system in _system(
            tmp_path_factory.mktemp("revoking"),
            {"victim": ("long-llama", "hardened"), "steady": ("demo", "paper")},
            policy={"lease": {"heartbeat_tokens": HEARTBEAT_TOKENS, "tokens": 4096}},
            keyservice_at=between.before,
        ):
            yield Revoking(system, between)
    finally:
        between.close()


@pytest.fixture(scope="session")
def rotating(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """One instance, whose keys are rotated."""
    yield from _system(tmp_path_factory.mktemp("rotating"), {"demo": ("demo", "hardened")})


RECORDED = {f"demo-{preset}": ("demo", preset) for preset in ("hardened", "paper", "throughput")} | {
    "gpt2-hardened": ("gpt2", "hardened")  # with learned positions
}


@pytest.fixture(scope="session")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Every preset, and what its server sees is kept."""
    servers = [f"server-{number}-0" for number in range(len(RECORDED))]
    yield from _system(tmp_path_factory.mktemp("recording"), RECORDED, recorded=servers)


@pytest.fixture(params=RECORDED)
def taped(request: pytest.FixtureRequest, recording: System) -> Served:
    return recording[request.param]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test of a system also waits for it to be protected and started."""
    for item in items:
        if {"answers", "refusing", "failover", "recording", "revoking", "rotating"} & set(
            getattr(item, "fixturenames", ())
        ):
            item.add_marker(pytest.mark.timeout(START_SECONDS))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """The ends of the parts' logs beside a failure."""
    report = yield
    if report.failed:
        for value in getattr(item, "funcargs", {}).values():
            value = value.system if isinstance(value, Revoking) else value
            if isinstance(value, System):
                for process in value.stack.processes.values():
                    report.sections.append((f"log of {process.name}", process.end_of_log(lines=15)))
    return report
