"""Train the bundled demo model from a public-domain text.

The whole recipe in one file: read the verses, set them as prose, train a byte-level BPE tokenizer, train a small
Llama-architecture model with an untied head, measure it on chapters it never saw, write a Hugging Face folder.
Everything is seeded; with the same text, library versions, processor and number of threads a run repeats.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1  # the trainer numbers special tokens first, in their order
VERSE = re.compile(r"^(?P<book>[1-3]?[A-Za-z]+)(?P<chapter>\d+):(?P<verse>\d+) (?P<text>.+)$")
SENTENCE_END = re.compile(r"[.?!][)']*$")
PROMPTS = ("And the king said", "In the beginning", "Blessed is the man", "The disciples came unto Jesus")
SAMPLERS: dict[str, dict[str, float]] = {
    "greedy": {"do_sample": False},
    "t=0.7": {"do_sample": True, "temperature": 0.7},
}

# A user's message opens a paragraph; the model's answer continues it. The rendering of a conversation is a prefix of
# the rendering of the same conversation with one more turn, so a session can keep its cache between turns.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if not loop.first and message['role'] != 'assistant' %}{{ '\\n' }}{% endif %}"
    "{{ message['content'] }}{% endfor %}"
)

Chapters = list[list[str]]  # paragraphs of each chapter


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the defaults give 2.75 M parameters, 11 MB in float32."""

    vocabulary: int = 2048
    width: int = 192
    layers: int = 5
    heads: int = 6
    kv_heads: int = 2
    mlp_width: int = 512
    positions: int = 512


@dataclass(frozen=True)
class Recipe:
    """Optimisation settings. `tokens_a_step` is kept when the window doubles for the last `long_share` of the steps,
    so that every position the configuration promises has been trained."""

    passes: float
    peak_rate: float
    seed: int
    tokens_a_step: int = 2048
    window: int = 256
    long_share: float = 0.15
    warmup: int = 100
    final_rate: float = 0.05
    weight_decay: float = 0.1
    clip: float = 1.0


def read_chapters(paths: list[Path]) -> Chapters:
    """Read text files into chapters of paragraphs.

    A line `Ge1:1 In the beginning ...` (the output of Debian's `bible -f`) is a verse: its reference is removed and
    verses are joined into paragraphs that end where a sentence ends, three verses long or more. In any other file a
    blank line ends a paragraph and twenty paragraphs are a chapter.
    """
    chapters: Chapters = []
    for path in paths:
        lines = path.read_text(encoding="utf-8").splitlines()
        chapters += _verse_chapters(lines) if lines and VERSE.match(lines[0]) else _plain_chapters(lines)
    return chapters


def _verse_chapters(lines: list[str]) -> Chapters:
    chapters: Chapters = []
    current, open_verses = "", list[str]()

    def close() -> None:
        if open_verses:
            chapters[-1].append(" ".join(open_verses))
            open_verses.clear()

    for number, line in enumerate(lines, start=1):
        match = VERSE.match(line)
        if match is None:
            raise SystemExit(f"line {number} is not a verse: {line[:60]!r}; expected e.g. 'Ge1:1 In the beginning'")
        if (label := f"{match['book']} {match['chapter']}") != current:
            close()
            current = label
            chapters.append([])
        open_verses.append(" ".join(match["text"].split()))
        if len(open_verses) >= 3 and SENTENCE_END.search(open_verses[-1]):
            close()
    close()
    return chapters


def _plain_chapters(lines: list[str]) -> Chapters:
    paragraphs = [" ".join(block.split()) for block in "\n".join(lines).split("\n\n") if block.strip()]
    return [paragraphs[i : i + 20] for i in range(0, len(paragraphs), 20)]


def split(chapters: Chapters, every: int = 20) -> tuple[Chapters, Chapters]:
    """Hold out every `every`-th chapter: (training, held-out)."""
    return [c for i, c in enumerate(chapters) if i % every != every - 1], chapters[every - 1 :: every]


def train_tokenizer(chapters: Chapters, vocabulary: int) -> Tokenizer:
    """Byte-level BPE (no unknown token: any UTF-8 text encodes), which puts `<s>` before what it encodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(("\n".join(c) for c in chapters), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


@dataclass(frozen=True)
class Stream:
    """Chapters as one row of ids, `chapter </s> chapter </s> ...`, and where its paragraphs start."""

    ids: torch.Tensor
    starts: list[int]

    @classmethod
    def encode(cls, tokenizer: Tokenizer, chapters: Chapters) -> Stream:
        """Paragraphs of a chapter are separated by one newline."""
        ids, starts = list[int](), list[int]()
        for chapter in chapters:
            for position, paragraph in enumerate(chapter):
                starts.append(len(ids))
                last = position == len(chapter) - 1
                ids += tokenizer.encode(paragraph + ("" if last else "\n"), add_special_tokens=False).ids
            ids.append(EOS_ID)
        return cls(torch.tensor(ids, dtype=torch.long), starts)

    def windows(self, starts: list[int], length: int) -> torch.Tensor:
        """Rows of `<s>` and the `length` ids from each start: shape [len(starts), length + 1], int64."""
        rows = torch.stack([self.ids[s : s + length] for s in starts])
        return functional.pad(rows, (1, 0), value=BOS_ID)

    def sample(self, source: random.Random, batch: Callable[[], tuple[int, int]]) -> Iterator[torch.Tensor]:
        """Endless batches of (rows, length) windows from paragraph starts, each start once before any returns."""
        pool: list[int] = []
        while True:
            rows, length = batch()
            picked: list[int] = []
            while len(picked) < rows:
                if not pool:
                    pool = list(self.starts)
                    source.shuffle(pool)
                if (start := pool.pop()) + length <= len(self.ids):
                    picked.append(start)
            yield self.windows(picked, length)


def build(shape: Shape, tokenizer: Tokenizer) -> LlamaForCausalLM:
    """A randomly initialised Llama with grouped-query attention and its own output head."""
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=False,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=None,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    ends = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": EOS_ID}
    model.generation_config = GenerationConfig(**ends)  # type: ignore[no-untyped-call]
    return model


def loss_of(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy over every position of `rows`, in nats."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, stream: Stream, length: int) -> float:
    """Loss in float32 over the held-out stream cut into consecutive windows, each predicted from `<s>` on."""
    model.eval()
    starts = list(range(0, len(stream.ids) - length + 1, length))
    batches = [stream.windows(starts[i : i + 16], length) for i in range(0, len(starts), 16)]
    total = sum(float(loss_of(model, rows)) * len(rows) for rows in batches)
    model.train()
    return total / len(starts)


@torch.no_grad()
def continuations(model: Any, tokenizer: Tokenizer, seed: int) -> list[dict[str, str]]:
    """Greedy and temperature-0.7 continuations of the fixed prompts.

    `model` is a LlamaForCausalLM; its `generate` has no annotation that a caller could satisfy.
    """
    model.eval()
    results: list[dict[str, str]] = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        shown = {"prompt": prompt}
        for name, settings in SAMPLERS.items():
            torch.manual_seed(seed)
            out = model.generate(ids, max_new_tokens=60, attention_mask=torch.ones_like(ids), **settings)
            shown[name] = tokenizer.decode(out[0, ids.shape[1] :].tolist())
        results.append(shown)
    return results


def write(out: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, positions: int) -> None:
    """Write the weights (float32), the configurations and the tokenizer as a Hugging Face folder."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": positions,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def train(model: nn.Module, stream: Stream, recipe: Recipe, *, bf16: bool, report: Callable[[int], None]) -> int:
    """AdamW with linear warm-up and cosine decay; prints progress, calls `report(step)` about every five minutes.

    Weight decay touches matrices only, not norms. Returns the number of steps.
    """
    steps = round(recipe.passes * len(stream.ids) / recipe.tokens_a_step)
    long_from = round(steps * (1 - recipe.long_share))
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=(0.9, 0.95), fused=True)

    def rate(step: int) -> float:
        if step < recipe.warmup:
            return (step + 1) / recipe.warmup
        cosine = 0.5 * (1 + math.cos(math.pi * (step - recipe.warmup) / max(1, steps - recipe.warmup)))
        return recipe.final_rate + (1 - recipe.final_rate) * cosine

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    def batch() -> tuple[int, int]:
        length = recipe.window * (2 if step >= long_from else 1)
        return recipe.tokens_a_step // length, length

    batches = stream.sample(random.Random(recipe.seed), batch)  # noqa: S311 - order, not secrets
    began = reported = time.monotonic()
    running = 0.0
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(model, next(batches))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        running += (0.02 if step else 1.0) * (float(loss.detach()) - running)
        now = time.monotonic()
        if step % 50 == 0 or step == steps - 1:
            left = (now - began) / (step + 1) * (steps - step - 1)
            speed = (step + 1) * recipe.tokens_a_step / (now - began)
            print(f"step {step + 1:6d}/{steps}  loss {running:.3f}  {speed:6.0f} tokens/s  {left / 60:5.1f} min left")
        if now - reported > 300:
            report(step + 1)
            reported = now
    return steps


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train STIP's demo model: tokenizer, a small Llama with an untied head, evaluation, folder.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=textwrap.dedent("""\
            The bundled model was trained on the King James text of two Debian packages, unpacked without installing:

              apt-get download bible-kjv bible-kjv-text
              for p in bible-kjv*.deb; do dpkg -x "$p" kjv; done
              (cd kjv/usr/lib && ../bin/bible -f 'Gen1:1-Rev22:21') > kjv.txt
              python train.py kjv.txt --out demo_model

            Any plain UTF-8 text works as well: a blank line ends a paragraph. Try `--passes 0.2` first: about a
            minute on two cores; fourteen passes take half an hour to an hour. The folder is rewritten every five
            minutes, so a usable model exists early; `--start` anneals a run that had to stop:
              python train.py kjv.txt --start demo_model --out annealed --passes 2.5 --rate 1.2e-3 --seed 1612

            On busy cores set OMP_WAIT_POLICY=passive: threads that wait then leave their core to others."""),
    )
    parser.add_argument("texts", nargs="+", type=Path, metavar="TEXT", help="plain text, see below")
    parser.add_argument("--out", required=True, type=Path, help="folder to write (created, files overwritten)")
    parser.add_argument("--start", type=Path, help="folder of an earlier run: go on from its weights and tokenizer")
    parser.add_argument("--passes", type=float, default=14.0, help="passes over the text (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1611, help="seed of weights and sampling (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--fp32", action="store_true", help="no bfloat16 autocast (weights are float32 either way)")
    arguments = parser.parse_args(argv)
    if missing := [str(path) for path in arguments.texts if not path.is_file()]:
        parser.error(f"not a file: {', '.join(missing)}")
    if arguments.start is not None and not (arguments.start / "tokenizer.json").is_file():
        parser.error(f"--start {arguments.start}: no tokenizer.json in it; expected a folder that --out wrote")
    return arguments


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    shape, recipe = Shape(), Recipe(passes=arguments.passes, peak_rate=arguments.rate, seed=arguments.seed)
    training, held_out = split(read_chapters(arguments.texts))
    start: Path | None = arguments.start
    stored = start and Tokenizer.from_file(str(start / "tokenizer.json"))
    tokenizer = stored or train_tokenizer(training, shape.vocabulary)
    stream, test = Stream.encode(tokenizer, training), Stream.encode(tokenizer, held_out)
    model = build(shape, tokenizer)
    if start:
        load_model(model, start / "model.safetensors", strict=True)
    parameters = sum(p.numel() for p in model.parameters())
    characters = sum(len(paragraph) + 1 for chapter in held_out for paragraph in chapter)
    print(f"training: {len(training)} chapters, {len(stream.ids)} tokens")
    print(f"held out: {len(held_out)} chapters, {len(test.ids)} tokens")
    print(f"{parameters} parameters, vocabulary {tokenizer.get_vocab_size()}")
    if len(test.ids) < shape.positions:
        raise SystemExit(f"the text is too small: {len(test.ids)} tokens held out, {shape.positions} are needed")

    def report(step: int) -> None:
        write(arguments.out, model, tokenizer, shape.positions)
        print(f"step {step}: held-out loss {held_out_loss(model, test, recipe.window):.4f}; folder written")

    steps = train(model, stream, recipe, bf16=not arguments.fp32, report=report)
    write(arguments.out, model, tokenizer, shape.positions)

    loss = held_out_loss(model, test, recipe.window)
    record = {
        "text_sha256": {path.name: _sha256(path) for path in arguments.texts},
        "shape": asdict(shape),
        "started_from_sha256": _sha256(start / "model.safetensors") if start else None,
        "recipe": asdict(recipe) | {"bf16_autocast": not arguments.fp32, "threads": arguments.threads},
        "parameters": parameters,
        "steps": steps,
        "training_tokens": len(stream.ids),
        "held_out_tokens": len(test.ids),
        "held_out_loss": round(loss, 4),
        "held_out_perplexity": round(math.exp(loss), 3),
        "held_out_loss_window_512": round(held_out_loss(model, test, shape.positions), 4),
        "held_out_bits_per_character": round(loss * len(test.ids) / characters / math.log(2), 4),
        "continuations": continuations(model, tokenizer, arguments.seed),
    }
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    (arguments.out / "evaluation.json").write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
