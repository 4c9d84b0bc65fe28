"""Real protected instances, each served by a vLLM of its own, and the plain model that they are held to.

These tests need the environment of `make setup-vllm` and run with `make test-vllm`. A vLLM takes long to start: one a
preset serves all tests of that preset, on one event loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from stip_keyservice.protect.equivalence.protected_model import InstanceFiles
from stip_keyservice.protect.instance import protect
from stip_keyservice.protect.plan import EMBEDDING, HEAD
from stip_protocol.keys import vocabulary_key
from stip_protocol.manifest import Preset
from stip_protocol.secrets_file import grant_of, open_secrets
from stip_server.checkpoint import Checkpoint
from stip_server.config import VllmSettings
from stip_server.engine import Engine, Form, Hidden, Logits, Top
from stip_server.engines.vllm.surroundings import surround
from tests.server.conformance import Model, Wanted

PRESETS: dict[Form, Preset] = {Form.HIDDEN: "hardened", Form.TOP: "paper", Form.IDS: "throughput"}
VOCABULARY, POSITIONS = 211, 192
DEVELOPER = Ed25519PrivateKey.generate()
SETTINGS = VllmSettings(kind="vllm", slots=16, memory_gb=0.05, compiled=False, threads=1, log_level="error")

surround(SETTINGS)
from stip_server.engines.vllm.engine import VllmEngine  # noqa: E402 - what imports vLLM comes after
from stip_server.engines.vllm.head import Answers  # noqa: E402
from stip_server.engines.vllm.starting import Loaded, load  # noqa: E402

torch.set_num_threads(1)


def plain_llama() -> Any:
    """Random, far from flat, with heads as wide as vLLM's attention on a CPU wants them."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    generator = torch.Generator().manual_seed(12)
    model = LlamaForCausalLM(config)
    for tensor in model.parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.data = noise * 1.6 / tensor.shape[-1] ** 0.5 if tensor.ndim == 2 else 1.0 + 0.3 * noise
    model.get_input_embeddings().weight.data *= 2.0
    return model.eval()


@dataclass
class Instance:
    """A protected instance and its plain model: ids in and out are those that its engine sees. Of `throughput` they
    are permuted, otherwise true."""

    directory: Path
    form: Form
    plain: Any = field(repr=False)
    files: InstanceFiles = field(repr=False)

    def __post_init__(self) -> None:
        seed = self.files.vocabulary_seed
        self.true = np.arange(VOCABULARY) if seed is None else vocabulary_key(seed, VOCABULARY).index
        """Of a permuted id."""
        self.permuted = np.argsort(self.true)
        alone = self.form is Form.IDS
        blocks = (rows.clone() for _, rows in self.files.blocks(EMBEDDING)) if not alone else self._embedding()
        self.table = torch.cat(list(blocks))
        if self.form is Form.HIDDEN:
            self.head = torch.cat([rows.clone() for _, rows in self.files.blocks(HEAD)])

    def _embedding(self) -> list[torch.Tensor]:
        """The server's own."""
        with safe_open(next((self.directory / "server").glob("*.safetensors")), framework="pt") as file:
            return [file.get_tensor("model.embed_tokens.weight")]

    def rows(self, ids: Sequence[int]) -> bytes:
        return self.table[list(ids)].view(torch.uint8).numpy().tobytes()

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        alone = self.form is Form.IDS
        said = self.said([int(self.true[i]) for i in prompt] if alone else prompt, count)
        return [int(self.permuted[i]) for i in said] if alone else said

    @torch.inference_mode()
    def said(self, prompt: list[int], count: int) -> list[int]:
        """What the plain model says, in true ids."""
        out = self.plain.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        return out[0, len(prompt) :].tolist()

    def picks(self, out: Hidden | Top | Logits) -> list[int]:
        if isinstance(out, Top):
            first = np.frombuffer(out.indices, "<u4").reshape(-1, out.count)[:, 0]
            return [int(self.true[i]) for i in first]
        if isinstance(out, Logits):
            rows = np.frombuffer(out.rows, np.float32).reshape(-1, VOCABULARY)
            return [int(self.true[i]) for i in rows.argmax(1)]
        states = torch.frombuffer(bytearray(out.rows), dtype=torch.float32).view(-1, self.head.shape[1])
        return (states @ self.head.T).argmax(1).tolist()


@dataclass
class Served:
    """A running vLLM over an instance. Engines over it come and go."""

    instance: Instance
    loaded: Loaded

    @contextlib.asynccontextmanager
    async def make(self, wanted: Wanted) -> AsyncIterator[tuple[Engine, Model]]:
        """An engine of these bounds."""
        card = dataclasses.replace(self.loaded.card, max_sessions=wanted.slots, max_positions=wanted.positions)
        answers = Answers(card, self.loaded.head, self.loaded.logit_cap, 1)
        engine = VllmEngine(
            self.loaded.llm,
            answers,
            card,
            positions=self.loaded.positions,
            idle_seconds=wanted.idle_seconds,
            leave=lambda: None,
        )
        yield engine, self.instance


@pytest.fixture(scope="session")
def make_instance(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`make_instance(form)`: a fresh protection of the same plain model."""
    plain = plain_llama()
    source = tmp_path_factory.mktemp("plain")
    plain.save_pretrained(source)
    seal = X25519PrivateKey.generate()

    def make(form: Form) -> Instance:
        out = tmp_path_factory.mktemp(form.value) / "instance"
        preset = PRESETS[form]
        protect(
            source,
            out,
            preset=preset,
            developer=DEVELOPER,
            seal_to=seal.public_key(),
            accept_token_cipher=preset == "throughput",
            samples=1,
            workers=1,
        )
        secrets = open_secrets((out / "secrets.sealed").read_bytes(), seal)
        grant = grant_of(secrets)
        manifest = Checkpoint.open(out, DEVELOPER.public_key(), tuple(Form)).manifest
        files = InstanceFiles(
            out,
            secrets.instance,
            secrets.epoch,
            preset,
            manifest.output,
            manifest.vocabulary,
            grant.part_key,
            grant.vocabulary_seed,
        )
        return Instance(out, form, plain, files)

    return make


def serving(form: Form) -> Any:
    """A fixture: one vLLM for all tests of a module, on the event loop of the session."""

    @pytest_asyncio.fixture(scope="module", loop_scope="session")
    async def served(make_instance: Any) -> AsyncIterator[Served]:
        instance = make_instance(form)
        loaded = await load(instance.directory, DEVELOPER.public_key(), SETTINGS)
        yield Served(instance, loaded)
        loaded.llm.shutdown()

    return served


hardened, paper, throughput = serving(Form.HIDDEN), serving(Form.TOP), serving(Form.IDS)
