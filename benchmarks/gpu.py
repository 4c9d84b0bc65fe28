"""Milliseconds a token on one GPU: `python -m benchmarks.gpu`.

A model of LLaMA2-7B's shape with random weights, made on the card, stepped by transformers' own loop (ids in, the
largest logit out, a growing cache) and by the engine (rows from the host in, the largest 64 logits out), eager and with
recorded steps, batch by batch. The engine does not know whether weights are protected: their shapes are the same. The
floor is the time to read the weights once at the bandwidth that a copy on this card reaches.
"""

from __future__ import annotations

import dataclasses
import random
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import click
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import checkpoints, gpu_report, machine
from benchmarks.gpu_report import Batch, Results, Timing
from benchmarks.ratios import median, ratio
from benchmarks.verdict import verdict
from stip_server.config import TransformersSettings
from stip_server.engine import Form, Top
from stip_server.engines.transformers import card_for, split
from stip_server.engines.transformers.runner import Runner

SHAPES = {"llama2-7b": checkpoints.LLAMA2_7B, "tiny": checkpoints.TINY}
DOCS = machine.ROOT / "docs" / "benchmarks"
PLAIN, AGAIN, EAGER, GRAPHS = "transformers", "transformers again", "engine, eager", "engine, graphs"
COPY_BYTES = 1 << 30
COPIES = 8
TARGET = {("llama2-7b", 1): 0.008}
"""Seconds a token with recorded steps, by shape and batch."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One session's part of a step (`stip_server.engines.outputs.Piece`)."""

    slot: int
    position: int
    count: int
    rows: Sequence[memoryview]
    form: Form = Form.TOP
    outputs: int = 1


class Arm(Protocol):
    """Decodes a batch of prompts [batch, tokens]; every step has ended on the card when it returns."""

    def begin(self, prompts: torch.Tensor) -> None: ...
    def step(self) -> list[int]:
        """The tokens it chose."""
        ...


class Loop:
    """What `generate` does, without its bookkeeping."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache: Any = None
        self._next = torch.empty(0)

    def begin(self, prompts: torch.Tensor) -> None:
        self._cache = None
        self._forward(prompts)

    def step(self) -> list[int]:
        return self._forward(self._next)

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor) -> list[int]:
        out = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache, self._next = out.past_key_values, out.logits[:, -1:].argmax(-1)
        return [int(each) for each in self._next[:, 0].tolist()]


class Engine:
    """The engine's step, called as its loop calls it."""

    def __init__(self, model: Any, settings: TransformersSettings) -> None:
        base, head = split(model)
        self._runner = Runner(base, head, card_for(base, head, settings), settings)
        self._table = model.get_input_embeddings().weight.detach().cpu().view(torch.uint8).numpy()
        self._chosen: list[int] = []
        self._length = 0

    def begin(self, prompts: torch.Tensor) -> None:
        self._length = prompts.shape[1]
        self._chosen = [self._run([self._row(slot, 0, ids)])[0] for slot, ids in enumerate(prompts.tolist())]

    def step(self) -> list[int]:
        work = [self._row(slot, self._length, [chosen]) for slot, chosen in enumerate(self._chosen)]
        self._chosen = self._run(work)
        self._length += 1
        return self._chosen

    def _run(self, work: Sequence[Row]) -> list[int]:
        results, _ = self._runner.step([], work)
        tops = [result.out for result in results if isinstance(result.out, Top)]
        return [int.from_bytes(top.indices[:4], "little") for top in tops]

    def _row(self, slot: int, position: int, ids: list[int]) -> Row:
        return Row(slot, position, len(ids), [memoryview(self._table[ids].tobytes())])


def build(shape: str, device: torch.device, *, seed: int) -> Any:
    """Random weights, in bfloat16, made where they are used."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model: Any = LlamaForCausalLM(LlamaConfig(**SHAPES[shape]))  # type: ignore[no-untyped-call]
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def bandwidth(device: torch.device, nbytes: int) -> float:
    """Bytes a second of a copy on the device, read and written counted."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [_timed(device, lambda: target.copy_(source)) for _ in range(COPIES)]
    return 2 * nbytes / min(times)


def weights(model: Any) -> int:
    """Bytes that a token reads: every parameter but the input table, of which it reads a row."""
    table = model.get_input_embeddings().weight
    return sum(each.nbytes for each in model.parameters() if each is not table)


def measure(
    arms: Mapping[str, Arm], shape: str, batch: int, *, context: int, steps: int, rounds: int, vocabulary: int,
    device: torch.device, seed: int,
) -> Batch:  # fmt: skip
    """Every arm once a round, in random order, on the same prompts; one round before them warms up."""
    shuffle = random.Random(seed)  # noqa: S311 - the order of arms is no secret
    generator = torch.Generator().manual_seed(seed + batch)
    times: dict[str, list[list[float]]] = {name: [] for name in arms}
    tokens: dict[str, list[list[int]]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        prompts = torch.randint(vocabulary, (batch, context), generator=generator).to(device)
        for name in shuffle.sample(list(arms), len(arms)):
            arms[name].begin(prompts)
            found = [_stepped(arms[name], device) for _ in range(steps)]
            if number:
                times[name].append([seconds for seconds, _ in found])
                tokens[name] += [chosen for _, chosen in found]
    control = ratio(times[AGAIN], times[PLAIN], seed=seed).value
    target = TARGET.get((shape, batch))
    timings = [
        Timing(
            arm=name,
            seconds=median(found),
            over_plain=ratio(found, times[PLAIN], seed=seed).value,
            same=_same(tokens[PLAIN], tokens[name]),
        )
        for name, found in times.items()
    ]
    graphs = next(each.seconds for each in timings if each.arm == GRAPHS)
    judged = None if target is None else verdict(graphs / target, control, 1.0)
    return Batch(size=batch, control=control, timings=timings, target=target, verdict=judged)


def _stepped(arm: Arm, device: torch.device) -> tuple[float, list[int]]:
    chosen: list[int] = []
    seconds = _timed(device, lambda: chosen.extend(arm.step()))
    return seconds, chosen


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds until it has ended on the device, too."""
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _same(plain: list[list[int]], own: list[list[int]]) -> float:
    pairs = [(a, b) for left, right in zip(plain, own, strict=True) for a, b in zip(left, right, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


@click.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), default="llama2-7b", show_default=True)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True,
              help="cpu: the shape tiny only, to see that it runs.")  # fmt: skip
@click.option("--batches", default="1,2,4,8,16,32,64", show_default=True)
@click.option("--context", type=click.IntRange(1), default=128, show_default=True, help="Tokens of prompt a session.")
@click.option("--steps", type=click.IntRange(2), default=64, show_default=True, help="Tokens a session and round.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=DOCS, help="Where results go.")
def main(shape: str, device: str, batches: str, context: int, steps: int, rounds: int, seed: int, out: Path) -> None:
    """Measure, print a table, and write gpu.md and gpu.json."""
    if device == "cpu" and shape != "tiny":
        raise click.BadParameter(f"cpu; with {shape}: cuda, with tiny: cpu or cuda", param_hint="--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("no CUDA device here; --device cpu --shape tiny shows that the benchmark runs")
    sizes = [int(part) if part.strip().isdecimal() else 0 for part in batches.split(",")]
    if min(sizes) < 1:
        raise click.BadParameter(f"{batches}; numbers of 1 or more", param_hint="--batches")
    place = torch.device(device)
    model = build(shape, place, seed=seed)
    settings = {"slots": max(sizes), "max_positions": context + steps + 1}
    arms: dict[str, Arm] = {PLAIN: Loop(model), AGAIN: Loop(model)}
    for name, graphs in ((EAGER, False), (GRAPHS, True)):
        click.echo(f"{name}: getting ready", err=True)
        arms[name] = Engine(model, TransformersSettings(**settings, device=device, graphs=graphs))
    vocabulary = SHAPES[shape]["vocab_size"]
    measured = []
    for size in sizes:
        click.echo(f"batch {size}", err=True)
        measured.append(
            measure(arms, shape, size, context=context, steps=steps, rounds=rounds, vocabulary=vocabulary,
                    device=place, seed=seed)
        )  # fmt: skip
    nbytes = weights(model)
    rate = bandwidth(place, COPY_BYTES if device == "cuda" else COPY_BYTES >> 4)
    results = Results(
        command=shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
        machine=dataclasses.asdict(machine.here()),
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        shape=shape,
        context=context,
        steps=steps,
        rounds=rounds,
        weights=nbytes,
        bandwidth=rate,
        floor=nbytes / rate,
        batches=measured,
    )
    gpu_report.write(results, out)
    click.echo(gpu_report.table(results))
    click.echo(f"written to {out / gpu_report.PAGE} and {gpu_report.DATA}", err=True)


if __name__ == "__main__":
    main()
