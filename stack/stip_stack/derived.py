"""A model that was derived from a public one: a checkpoint, tuned for a moment on text of another kind.

What an audit needs to show the case "derived from a public base" with real weights: the base is public then, the tuned
model is what is protected. How far the weights moved is said beside it, because alignment lives off their likeness.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy

from stip_protocol.errors import ConfigurationError

DRIFT = "drift.json"
"""Beside the weights: the `Drift` that they have."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
THREADS = 1
"""Fixed: sums in another order give other weights."""


@dataclass(frozen=True)
class Recipe:
    """Some 20 seconds of one core for the bundled model."""

    steps: int = 60
    rows: int = 8
    window: int = 96
    """Ids of a row, the one that is only predicted included."""
    rate: float = 5e-4
    """Peak: risen to in a tenth of the steps, then linear to nothing. AdamW, no decay, gradients clipped at 1."""
    seed: int = 0


@dataclass(frozen=True)
class Drift:
    """How far a model went from its base: |W' - W| over |W|, Frobenius."""

    whole: float
    """Over all weights together."""
    largest: float
    """Of the matrix that moved farthest."""
    loss_before: float
    loss_after: float
    """Nats a token, on the text that it was tuned on."""


def derive(
    base: Path,
    texts: Sequence[Path],
    out: Path,
    recipe: Recipe | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Drift:
    """Tune the checkpoint folder `base` on UTF-8 files; write the whole folder `out`, tokenizer included, or nothing.

    The same base, texts, recipe and library versions give the same weights. Raises `ConfigurationError` where there
    is not one window of text.
    """
    recipe = recipe or Recipe()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    windows = _windows(base, texts, recipe.window)
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        loss_before = _loss(model, windows)
        _tune(model, windows, recipe, progress)
        drift = _drift(before, model, loss_before, _loss(model, windows))
    finally:
        torch.set_num_threads(threads)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    for name in TOKENIZER_FILES:
        shutil.copyfile(base / name, partial / name)
    (partial / DRIFT).write_text(json.dumps(asdict(drift), indent=1) + "\n")
    partial.replace(out)
    return drift


def _windows(base: Path, texts: Sequence[Path], length: int) -> torch.Tensor:
    """[n, length] ids, one text after the other, cut without overlap."""
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    ids = [id_ for path in texts for id_ in tokenizer.encode(path.read_text(encoding="utf-8")).ids]
    count = len(ids) // length
    if not count:
        raise ConfigurationError.because("text to tune on", f"{len(ids)} ids", f"at least {length}")
    return torch.tensor(ids[: count * length]).reshape(count, length)


def _tune(model: Any, windows: torch.Tensor, recipe: Recipe, progress: Callable[[int, int], None]) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.0)
    rise = max(1, recipe.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / rise, (recipe.steps - step) / max(1, recipe.steps - rise))
    )
    model.train()
    for step, rows in enumerate(itertools.islice(_batches(windows, recipe), recipe.steps)):
        optimiser.zero_grad()
        loss: Any = _mean_loss(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        progress(step + 1, recipe.steps)
    model.train(False)


def _batches(windows: torch.Tensor, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Endless; every window once before any comes again."""
    generator = torch.Generator().manual_seed(recipe.seed)
    while True:
        yield from torch.split(windows[torch.randperm(len(windows), generator=generator)], recipe.rows)


def _mean_loss(model: Any, rows: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.inference_mode()
def _loss(model: Any, windows: torch.Tensor) -> float:
    """On sixteen windows, spread over the text."""
    return float(_mean_loss(model, windows[:: math.ceil(len(windows) / 16)]))


@torch.inference_mode()
def _drift(before: dict[str, torch.Tensor], model: Any, loss_before: float, loss_after: float) -> Drift:
    moved = {name: float((tensor - before[name]).norm()) for name, tensor in model.named_parameters()}
    sizes = {name: float(tensor.norm()) for name, tensor in before.items()}
    whole = math.hypot(*moved.values()) / math.hypot(*sizes.values())
    largest = max(moved[name] / sizes[name] for name, tensor in before.items() if tensor.ndim == 2)
    return Drift(whole, largest, loss_before, loss_after)
