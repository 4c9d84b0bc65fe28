"""Protected instances of the bundled model, and what attackers with different knowledge hold of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stip_keyservice.audit import corpus, truth
from stip_keyservice.audit.network import Network
from stip_keyservice.audit.traffic import observe
from stip_keyservice.audit.truth import Truth
from stip_keyservice.audit.view import Accomplice, Entry, Ids, Labelled, Seen, Sibling, View
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
    surrogate: Network
    _truths: dict[tuple[str, int], Truth] = field(default_factory=dict)

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
        return [observe(self.truth(preset, copy), text, PROMPT) for text in texts]

    def drifted(self, drift: float) -> Entry:
        """A relative of the plain table."""
        rows = self.truth("paper").entry.rows
        noise = np.random.default_rng(SEED).normal(0, drift * rows.std(), rows.shape)
        return Entry((rows + noise).astype(np.float32), None, drift)

    def view(self, preset: str, knowledge: str = "server") -> View:
        """What an attacker of that row of the matrix holds."""
        known = self.truth(preset)
        view = View(
            preset=preset,
            server=known.server,
            victims=[each.seen for each in self.labelled(preset, self.victims)],
            public_text=self.public,
            vocabulary=known.manifest.vocabulary,
            seed=SEED,
            entry=Entry(self.surrogate.embedding, None, float("inf")),
            surrogate=self.surrogate,
        )
        grants: dict[str, Callable[[], View]] = {
            "server": lambda: view,
            "drifted": lambda: replace(view, entry=self.drifted(0.1)),
            "table": lambda: replace(view, entry=known.entry),
            "base": lambda: replace(view, entry=known.entry, base=self.plain),
            "accomplice": lambda: replace(view, accomplice=self.accomplice(preset)),
            "sibling": lambda: replace(
                view, sibling=Sibling(self.truth(preset, 1).server, self.labelled(preset, self.helped, 1))
            ),
        }
        return grants[knowledge]()

    def accomplice(self, preset: str) -> Accomplice:
        """A user whose enclave decodes the server's answers honestly, greedily."""
        known = self.truth(preset)

        def decode(seen: Seen) -> Ids:
            if known.head is not None:
                assert seen.hidden is not None
                return np.asarray((seen.hidden @ known.head.T).argmax(axis=1), np.int64)
            assert known.vocabulary is not None
            if seen.top is not None:
                return known.vocabulary[seen.top.indices[:, 0]]
            assert seen.ids is not None
            return known.vocabulary[seen.ids[seen.asked[1:]]]

        return Accomplice(self.labelled(preset, self.helped), decode)


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
        surrogate=Network(folder / "surrogate"),
    )
