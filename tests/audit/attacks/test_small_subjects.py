"""Every attack, with all knowledge, over the smallest models and the least traffic: a figure or a reason, each time the
same, and never a fault."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from stip_keyservice.audit import matrix
from stip_keyservice.audit.attacks import MODULES, attack
from stip_keyservice.audit.knowledge import KNOWLEDGE
from stip_keyservice.audit.material import Material, Twin
from stip_keyservice.audit.scoring import Judge
from stip_keyservice.audit.traffic import observe
from stip_keyservice.audit.truth import Truth
from stip_keyservice.audit.view import Ids, Labelled
from stip_keyservice.audit.words import numbered
from tests.audit.attacks import relatives

SUBJECTS: dict[str, tuple[str, torch.dtype, bool, str, int]] = {
    "gpt2, tied, hardened": ("gpt2", torch.float32, True, "hardened", 40),
    "gpt2, tied, paper": ("gpt2", torch.float32, True, "paper", 9),
    "llama, bfloat16, hardened": ("llama", torch.bfloat16, False, "hardened", 9),
    "llama, bfloat16, paper": ("llama", torch.bfloat16, False, "paper", 40),
    "llama, throughput": ("llama", torch.float32, False, "throughput", 5),
}
"""Family, type, whether tied, preset, vocabulary."""
TRAFFIC = {
    "one position": ([2], [2]),
    "one victim, longer than what is labelled": ([9], [5, 4]),
    "several": ([8, 6], [6, 7, 8]),
    "nobody helps": ([4], []),
}
"""Ids of each victim's text and of each helping user's: one more than positions."""


def texts(lengths: list[int], vocabulary: int, begin: bool = True) -> list[Ids]:
    """Random ids behind one that begins them all."""
    generator = np.random.default_rng(relatives.SEED)
    made = [generator.integers(vocabulary, size=length) for length in lengths]
    return [np.concatenate([[1], text[1:]]) for text in made]


def said(known: Truth, lengths: list[int]) -> list[Labelled]:
    """The first half of a text is the prompt."""
    return [observe(known, text, len(text) // 2) for text in texts(lengths, known.manifest.vocabulary)]


@pytest.fixture(scope="module")
def subject(ground: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Truth, Truth, Any]]:
    """Two instances of a model, and an unrelated model of an attacker's own."""

    @cache
    def of(name: str) -> tuple[Truth, Truth, Any]:
        family, dtype, tied, preset, vocabulary = SUBJECTS[name]
        folder = tmp_path_factory.mktemp("subject")
        plain = relatives.tiny(family, folder / "plain", tied=tied, dtype=dtype, vocabulary=vocabulary)
        one, two = (relatives.protected(ground, plain, folder / copy, preset) for copy in ("one", "two"))
        return one, two, relatives.tiny("llama", folder / "own", tied=True, vocabulary=vocabulary)

    return of


@pytest.mark.long
@pytest.mark.parametrize("traffic", TRAFFIC)
@pytest.mark.parametrize("name", SUBJECTS)
def test_every_attack_measures_or_says_why_not(
    subject: Callable[[str], tuple[Truth, Truth, Any]], name: str, traffic: str
) -> None:
    (one, two, own), (victims, helped) = subject(name), TRAFFIC[traffic]
    public = texts([8, 8], one.manifest.vocabulary)
    material = Material(
        truth=one,
        victims=said(one, victims),
        public_text=public,
        held_out=public[:1],
        surrogate=own,
        seed=relatives.SEED,
        words=numbered,
        accomplice=said(one, helped),
        base=one.plain,
        twin=Twin(two, said(two, helped)),
    )
    attacks = [attack(letter) for letter in MODULES]
    once, again = (list(matrix.cells(matrix.views(material), attacks, Judge(material))) for _ in range(2))
    assert len(once) == len(KNOWLEDGE) * len(MODULES)
    assert once == again
    assert all(metric.counted > 0 for cell in once for metric in cell.metrics)
