"""Protected instances of the bundled model, and what attackers with different knowledge hold of them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stip_keyservice.audit import corpus, matrix, truth
from stip_keyservice.audit.knowledge import KNOWLEDGE, Grant
from stip_keyservice.audit.material import Material, Twin
from stip_keyservice.audit.network import Network
from stip_keyservice.audit.traffic import observe
from stip_keyservice.audit.truth import Truth
from stip_keyservice.audit.view import Accomplice, Entry, Ids, Labelled, NotApplicable, View
from stip_keyservice.audit.words import numbered
from stip_keyservice.home import Home
from stip_keyservice.protect.instance import protect

MODEL = Path(__file__).parents[2] / "stack" / "demo_model"
SEED = 5
LENGTH, PROMPT = 49, 24
"""Ids of a text, and how many of them are the prompt."""


@dataclass
class Ground:
    """Instances by preset, made when they are asked for; the same texts for all."""

    folder: Path
    home: Home
    plain: Network
    victims: list[Ids]
    helped: list[Ids]
    public: list[Ids]
    held_out: list[Ids]
    surrogate: Network
    _truths: dict[tuple[str, int], Truth] = field(default_factory=dict)
    _sessions: dict[tuple[str, int, bytes], Labelled] = field(default_factory=dict)

    def truth(self, preset: str, copy: int = 0) -> Truth:
        """`copy`: another instance of the same model, under keys of its own."""
        if (preset, copy) not in self._truths:
            made = protect(
                self.plain.folder,
                self.folder / f"{preset}-{copy}",
                preset=preset,  # type: ignore[arg-type]
                developer=self.home.developer,
                seal_to=self.home.sealing.public_key(),
                accept_token_cipher=True,
                samples=1,
            )
            self._truths[preset, copy] = truth.read(made.directory, self.plain.folder, self.home)
        return self._truths[preset, copy]

    def labelled(self, preset: str, texts: list[Ids], copy: int = 0) -> list[Labelled]:
        return [self._said(preset, text, copy) for text in texts]

    def _said(self, preset: str, text: Ids, copy: int) -> Labelled:
        session = preset, copy, text.tobytes()
        if session not in self._sessions:
            self._sessions[session] = observe(self.truth(preset, copy), text, PROMPT)
        return self._sessions[session]

    def drifted(self, drift: float) -> Entry:
        """A relative of the plain table."""
        rows = self.truth("paper").entry.rows
        noise = np.random.default_rng(SEED).normal(0, drift * rows.std(), rows.shape)
        return Entry((rows + noise).astype(np.float32), None, drift)

    def material(self, preset: str, knowledge: str = "server") -> Material:
        """What an audit of that row of the matrix works with; made only as far as the row needs it."""
        grants = KNOWLEDGE[knowledge].grants
        return Material(
            truth=self.truth(preset),
            victims=self.labelled(preset, self.victims),
            public_text=self.public,
            held_out=self.held_out,
            surrogate=self.surrogate,
            seed=SEED,
            words=numbered,
            accomplice=self.labelled(preset, self.helped) if Grant.ACCOMPLICE in grants else (),
            base=self.plain if Grant.BASE in grants else None,
            twin=self.twin(preset) if Grant.SIBLING in grants else None,
        )

    def twin(self, preset: str) -> Twin:
        return Twin(self.truth(preset, 1), self.labelled(preset, self.helped, 1))

    def view(self, preset: str, knowledge: str = "server") -> View:
        """What an attacker of that row of the matrix holds. Raises `NotApplicable` where there is none."""
        view = matrix.views(self.material(preset, knowledge), [knowledge])[knowledge]
        if isinstance(view, NotApplicable):
            raise view
        return view

    def accomplice(self, preset: str) -> Accomplice:
        """A user whose enclave decodes the server's answers honestly, greedily."""
        return Accomplice(self.labelled(preset, self.helped), matrix.decoder(self.truth(preset)))


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    """Texts of the bundled model, and a surrogate that has learned nothing."""
    folder = tmp_path_factory.mktemp("audit")
    plain = Network(MODEL)
    torch.manual_seed(SEED)
    vocabulary, causal = plain.config["vocab_size"], cast(Any, LlamaForCausalLM)
    surrogate = causal(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=192, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
        )
    )
    surrogate.save_pretrained(folder / "surrogate")
    texts = corpus.sample(plain, sessions=104, length=LENGTH, seed=SEED)
    return Ground(
        folder,
        Home.open(folder / "home"),
        plain,
        victims=texts[:8],
        helped=texts[8:40],
        public=texts[40:],
        held_out=corpus.sample(plain, sessions=4, length=LENGTH, seed=SEED + 1),
        surrogate=Network(folder / "surrogate"),
    )


@pytest.fixture
def home(ground: Any) -> Home:
    return ground.home  # type: ignore[no-any-return]


@pytest.fixture
def instance(ground: Any, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    ground.truth("hardened")
    return Path(shutil.copytree(ground.folder / "hardened-0", tmp_path / "instance"))
