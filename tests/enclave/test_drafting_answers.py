"""Drafts with the real key service, gateway and model server: the plain model's answers, in fewer round trips."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stip_keyservice.protect.instance import protect

PROMPT = [7, 8, 9, 10, 11, 12]
COUNT = 60
WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.05, "top_k": 4, "seed": 5},
    {"temperature": 0.05, "seed": 6},
    {"temperature": 1.0, "top_p": 0.02, "seed": 7},
]
"""Cool, so that the text goes on repeating itself."""
RECALLED = {"hardened": (), "paper": (2,)}
"""Ways in which the 64 largest logits never decide: each whole row is recalled by itself, and drafts save nothing."""


def repeating(developer: Any, folder: Path, preset: str) -> Any:
    """A protected Llama that looks little further back than to its last token, and so comes round again: its layers
    add little to the embedding that they get."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=211, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
            num_key_value_heads=3, head_dim=16, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
            tie_word_embeddings=False,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.001 if "o_proj" in name or "down" in name else 0.2)
    model.save_pretrained(folder / "plain")
    made = protect(
        folder / "plain",
        folder / "protected",
        preset=preset,  # type: ignore[arg-type]
        developer=developer.home.developer,
        seal_to=developer.home.sealing.public_key(),
        samples=1,
    )
    other = developer.protected("llama", preset)
    return replace(other, folder=made.directory, manifest=made.manifest, digest=made.manifest_digest, plain=model)


def round_trips(world: Any) -> float:
    """Frames of outputs that the enclave has read so far."""
    samples = [sample for metric in world.telemetry.registry.collect() for sample in metric.samples]
    return sum(
        sample.value for sample in samples if sample.name.endswith("_count") and sample.labels.get("stage") == "link"
    )


def drawn_with(sampling: dict[str, Any]) -> dict[str, Any]:
    """The wire's float32 is what both sample with."""
    return {key: float(np.float32(value)) if isinstance(value, float) else value for key, value in sampling.items()}


@pytest.mark.parametrize("preset", ["hardened", "paper"])
async def test_drafted_answers_are_the_plain_models_in_fewer_round_trips(
    world: Any, developer: Any, tmp_path: Path, preset: str
) -> None:
    protected = repeating(developer, tmp_path / "model", preset)
    await world.start(protected)
    delegation = world.delegate(world.person("ada"))
    trips: dict[int, list[float]] = {}
    for drafts in (0, 7):
        trips[drafts] = []
        for sampling in WAYS:
            client = await world.opened(delegation)
            before = round_trips(world)
            tokens, kind = await client.turn(PROMPT, max_tokens=COUNT, drafts=drafts, **sampling)
            trips[drafts].append(round_trips(world) - before)
            assert (tokens, kind) == (protected.generate(PROMPT, COUNT, **drawn_with(sampling)), 2)
            # A second turn goes on from what was accepted, not from what was guessed.
            again, _ = await client.turn([20, 21], max_tokens=8, drafts=drafts)
            assert again == protected.generate([*PROMPT, *tokens, 20, 21], 8)
            await client.close()
    for way, (drafted, plain) in enumerate(zip(trips[7], trips[0], strict=True)):
        assert drafted == plain if way in RECALLED[preset] else drafted < 0.7 * plain
