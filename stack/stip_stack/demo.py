"""`make demo`: the whole system in one sitting, told step by step.

Protects a model, starts every part, verifies, streams an answer, then holds it against the plain model, shows
what the server part is worth without keys, and where the time went.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoConfig

import stip
from stip.tokenizer import Tokenizer
from stip_enclave.sampling import Sampler, Sampling
from stip_keyservice.protect.equivalence.certificate import TIE_WIDTH, Certificate
from stip_protocol.errors import ConfigurationError
from stip_stack import latency
from stip_stack.reference import PlainModel, without_keys
from stip_stack.stack import Stack
from stip_stack.workspace import Published

DEFAULT_PROMPT = "And the king said unto his servants,"
PROMPT_IDS = 12
"""Length of the made-up prompt for a model without a tokenizer."""
NONSENSE_TOKENS = 24
GOT_WIDTH = 56


@dataclass(frozen=True)
class Request:
    """What the demo is asked for."""

    model: Path
    preset: str
    prompt: str | None
    max_tokens: int
    runs: Path
    """Where the demo's working folder is made; it is removed at the end."""


def run(request: Request, console: Console) -> int:
    """Exit status: 0 where the protected answer is the plain one (or differs within fp rounding), 1 otherwise."""
    request.runs.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="demo-", dir=request.runs) as folder,
        Stack(Path(folder) / "stack") as stack,
    ):
        published = _protect(stack, request, console)
        started = time.monotonic()
        stack.start([published])
        profile = stack.enrol("demo", published)
        _heading(console, f"Every part is running ({time.monotonic() - started:.0f} s)")
        for process in stack.processes.values():
            console.print(f"  {process.name:<12} pid {process.pid:<8} gRPC {process.address}")
        with stip.connect(profile) as connection:
            _show_verification(connection.verification, console)
            developer = stack.workspace.home.developer.public_key()
            same = _compare(connection, request, published, developer, console)
            _show_latency(stack, console)
            if sys.stdin.isatty() and console.is_terminal:
                _chat(connection, console)
    return 0 if same else 1


def _protect(stack: Stack, request: Request, console: Console) -> Published:
    _heading(console, f"Protecting {request.model} with preset {request.preset}")
    accepted = []
    if (
        request.preset == "paper"
        and AutoConfig.from_pretrained(request.model, local_files_only=True).tie_word_embeddings
    ):
        accepted = ["--accept-tied-head"]
        console.print(
            "  [bold red]This model's head is its embedding: under paper the operator holds the embedding's values"
        )
        console.print("  [bold red]and can recover every token. Accepted for this demo; protect refuses it by default.")
    command, folder = stack.protection(request.model, request.preset, *accepted)
    quiet = [] if console.is_terminal else ["--quiet"]
    done = subprocess.run([*command, *quiet], stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        raise ConfigurationError(f"protect failed with exit status {done.returncode}; its message is above")
    published = stack.workspace.published(folder)
    certificate = published.manifest.certificate
    console.print(
        f"  instance {published.manifest.instance}, {published.manifest.dtype}, "
        f"certificate: top-1 agreement {certificate['top1']:.2%} over {certificate['positions']} positions, "
        f"largest relative difference {certificate['relative_largest']:.1e}"
    )
    return published


def _show_verification(verification: stip.Verification, console: Console) -> None:
    _heading(console, "Verified before anything was sent")
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    table.add_column("step", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("got", no_wrap=True, overflow="ellipsis", max_width=GOT_WIDTH)
    for step in verification.steps:
        table.add_row(step.name, step.status.value, step.got or "")
    console.print(table)
    if verification.simulated:
        console.print("  [bold red]SIMULATED TEE: this demo's evidence is made by software and protects nothing.[/]")


def _compare(
    connection: stip.Connection, request: Request, published: Published, developer: Ed25519PublicKey, console: Console
) -> bool:
    """Stream the protected answer, then the plain one and the one without keys. True where the first two agree."""
    instance, vocabulary = published.manifest.instance, published.manifest.vocabulary
    tokenizer = Tokenizer.open(published.folder / "client", developer, instance=instance)
    worded = "tokenizer.json" in tokenizer.manifest.files
    prompt = request.prompt or DEFAULT_PROMPT
    made_up = [7919 * (at + 1) % vocabulary for at in range(PROMPT_IDS)]
    ids = tokenizer.encode(prompt, special=True) if worded else made_up

    def worded_or_ids(tokens: list[int]) -> str:
        return tokenizer.decode(tokens) if worded else " ".join(map(str, tokens))

    _heading(console, "The answer, through enclave, gateway and model server")
    console.print(f"  [dim]{escape(prompt if worded else worded_or_ids(ids))}[/]")
    answer: list[int] = []
    console.print("  ", end="")
    with connection.session() as session:
        for chunk in session.generate(ids, max_tokens=request.max_tokens):
            if chunk.id is not None:
                answer.append(chunk.id)
            shown = chunk.text if worded else f"{chunk.id} "
            console.print(shown, end="", highlight=False, markup=False, soft_wrap=True)
        console.print()
        last = session.last
        if last is not None:
            console.print(
                f"  [dim]{last.completion_tokens} tokens in {last.seconds:.2f} s, request {session.request_id}[/]"
            )

    plain = PlainModel(request.model)
    greedy = Sampler(Sampling())
    stop_ids = frozenset(tokenizer.manifest.stop_ids)
    expected = plain.generate(ids, greedy, max_tokens=request.max_tokens, stop_ids=stop_ids)
    _heading(console, f"The plain model's answer ({str(plain.dtype).removeprefix('torch.')}, transformers alone)")
    console.print("  " + worded_or_ids(expected), highlight=False, markup=False, soft_wrap=True)
    difference = plain.divergence(ids, expected, answer)
    if difference is None:
        console.print(f"  [bold green]identical: {len(answer)} of {len(expected)} tokens[/]")
        same = True
    else:
        certificate = Certificate.model_validate_json((published.folder / "certificate.json").read_bytes())
        rounding = TIE_WIDTH * certificate.rms_difference
        same = difference.plain_gap <= rounding
        console.print(
            f"  first difference at token {difference.position}: plain's own best two logits are "
            f"{difference.plain_gap:.2e} apart there, and rounding moves them by up to {rounding:.2e}: "
            + ("[green]a tie within rounding[/]" if same else "[bold red]NOT the same answer[/]")
        )

    _heading(console, "The server part without keys (the paper's Table 4)")
    stolen = without_keys(published.folder / "server", plain, ids, max_tokens=NONSENSE_TOKENS)
    nonsense = worded_or_ids(stolen)
    console.print("  " + (repr(nonsense) if worded else nonsense), markup=False, soft_wrap=True)
    console.print("  [dim]Handed even the plain embedding table. This shows that the part is useless as it stands,[/]")
    console.print("  [dim]not that it is secure: docs/security.md says what a determined attacker recovers.[/]")
    return same


def _show_latency(stack: Stack, console: Console) -> None:
    processes = {name.split("-")[0]: process for name, process in stack.processes.items()}
    _heading(console, "Where the time went")
    table = Table("part", "stage", box=None, pad_edge=False, padding=(0, 2))
    for name in ("count", "mean ms", "p95 ≤ ms"):
        table.add_column(name, justify="right")
    for row in latency.table({part: process.metrics for part, process in processes.items()}):
        table.add_row(row.part, row.name, str(row.count), f"{row.mean * 1e3:.3f}", f"{row.p95 * 1e3:g}")
    console.print(table)
    console.print(
        "  [dim]added latency: the gap between tokens that the enclave sees, minus the compute the server reports[/]"
    )
    for part, process in processes.items():
        console.print(f"  metrics of the {part}: http://{process.metrics}/metrics")


def _chat(connection: stip.Connection, console: Console) -> None:
    _heading(console, "Your turn (an empty line or Ctrl-D ends the demo)")
    with connection.session() as session:
        while True:
            try:
                prompt = console.input("[bold]> [/]")
            except EOFError:
                return
            if not prompt.strip():
                return
            try:
                for chunk in session.generate(prompt, max_tokens=96, temperature=0.7, top_k=50):
                    console.print(chunk.text, end="", highlight=False, markup=False, soft_wrap=True)
            except KeyboardInterrupt:
                session.cancel()
            console.print()


def _heading(console: Console, text: str) -> None:
    console.print(f"\n[bold]{text}[/]")
