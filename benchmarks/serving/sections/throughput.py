"""The preset throughput, where the server decodes alone: against the plain model decoding alone in the same engine,
first ours on transformers, then vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.samples import Runner, Samples
from benchmarks.serving.bench import Bed, Bench, Draft, Scale
from benchmarks.serving.comparison import AGAIN, PLAIN, Against, cell
from benchmarks.serving.interleaving import Load, interleave, warm
from benchmarks.vllm_direct import PYTHON, VllmProcess, absent
from stip_server.engine import Form
from stip_stack.stack import Launch

PRESET = "throughput"
TARGET = 1.02
"""Time per token and time to first token over plain."""
VLLM_MEMORY_GB, VLLM_BLOCK = 1.0, 32
"""Of the KV cache of each of the two vLLM processes: GiB, and positions in a block."""
VLLM_START_SECONDS = 600.0
VLLM_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "stip",  # its processes end with it
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
"""Of plain vLLM: as `stip_server.engines.vllm.surroundings` sets it for the protected one."""


@dataclass(frozen=True)
class Plan:
    subject: str
    loads: tuple[Load, ...]


PLANS = {
    Scale.QUICK: Plan("demo", (Load(1, 16, 8, 1), Load(2, 16, 8, 1))),
    Scale.DEFAULT: Plan("llama", (Load(1, 128, 32, 6), Load(16, 64, 32, 3))),
    Scale.FULL: Plan("llama", (Load(1, 128, 64, 12), Load(4, 128, 64, 8), Load(16, 64, 64, 6), Load(64, 32, 96, 4))),
}


async def run(bench: Bench, draft: Draft) -> None:
    """Both engines; what is missing for vLLM is said in the report and on stderr."""
    plan = PLANS[bench.scale]
    bed = bench.named(plan.subject)
    await _transformers(bench, draft, bed, plan.loads)
    if bench.budget.spent:
        draft.missing("vLLM: no time was left")
    elif reason := absent():
        draft.missing(reason)
    else:
        await _vllm(bench, draft, bed, plan.loads)


async def _transformers(bench: Bench, draft: Draft, bed: Bed, loads: tuple[Load, ...]) -> None:
    system = await bed.system((PRESET,), loads)
    alone = system.direct.arm(Form.IDS)
    arms: dict[str, Runner] = {PLAIN: alone, AGAIN: alone, PRESET: system.protected(PRESET)}
    await _compare(bench, draft, bed, loads, arms, system.vocabulary, "transformers")


async def _vllm(bench: Bench, draft: Draft, bed: Bed, loads: tuple[Load, ...]) -> None:
    room = bench.engine(loads)
    # What `stip_server.engines.vllm.starting` asks of vLLM, for the plain checkpoint.
    plain = {
        "dtype": bed.subject.dtype,
        "max_model_len": room["max_positions"],
        "max_num_seqs": room["slots"],
        "block_size": VLLM_BLOCK,
        "kv_cache_memory_bytes": int(VLLM_MEMORY_GB * 2**30),
        "generation_config": "vllm",
        "load_format": "safetensors",
        "enable_prefix_caching": True,
        "prefix_caching_hash_algo": "sha256",
        "disable_log_stats": True,
    }
    engine = {"kind": "vllm", "memory_gb": VLLM_MEMORY_GB, "block": VLLM_BLOCK}
    launches = {"server-0-0": Launch(engine=engine, python=PYTHON, seconds=VLLM_START_SECONDS)}
    environment = VLLM_ENVIRONMENT | {"OMP_NUM_THREADS": str(bench.threads)}
    log = Path(bench.work) / "vllm-plain.log"
    system = await bed.system((PRESET,), loads, launches=launches)
    bench.say(f"{bed.subject.name}: plain vLLM")
    with VllmProcess(bed.checkpoint, plain, log, environment=environment) as direct:
        arms: dict[str, Runner] = {PLAIN: direct, AGAIN: direct, PRESET: system.protected(PRESET)}
        await _compare(bench, draft, bed, loads, arms, system.vocabulary, "vllm")


async def _compare(
    bench: Bench,
    draft: Draft,
    bed: Bed,
    loads: tuple[Load, ...],
    arms: dict[str, Runner],
    vocabulary: int,
    engine: str,
) -> None:
    await warm(arms, Load(1, 16, 4, 1).orders(vocabulary, bench.seed)[0])
    against = Against(PRESET, token_target=TARGET, first_target=TARGET, more={"engine": engine})
    for load in loads:
        orders = load.orders(vocabulary, bench.seed)
        runs = await interleave(arms, orders, bench.budget, seed=bench.seed, say=bench.say)
        draft.cells([cell(runs, against, bed.subject, load, seed=bench.seed, token=spent)])


def spent(samples: Samples) -> list[float]:
    """Seconds a token of each stream, from the turn's beginning to its last. Nobody waits for a token here before the
    next is made: several may arrive at once, and the gaps between them would say little and flatter."""
    return [times[-1] / len(times) for times in samples.times]
