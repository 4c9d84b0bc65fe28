"""`stip generate`: one prompt, one streamed answer."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

import stip
from stip.commands import options
from stip_protocol.errors import RequestInvalid, Unavailable


@click.command("generate")
@options.profile
@click.argument("prompt", required=False)
@click.option("--ids", help="The prompt as token ids, separated by commas, instead of text.")
@options.sampling
@options.connect_timeout
@click.option("--json", "as_json", is_flag=True, help="Text, ids, finish reason, timings and verification as JSON.")
def generate(
    profile: Path,
    prompt: str | None,
    ids: str | None,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    drafts: int,
    seed: int | None,
    timeout: float,
    connect_timeout: float,
    as_json: bool,
) -> None:
    """Continue PROMPT and stream the answer to standard output.

    "-" reads the prompt from standard input, where other users of this machine cannot see it in the list of
    processes. The enclave is verified first; a refusal sends nothing and exits with 3.
    """
    asked = _prompt(prompt, ids)
    started = time.monotonic()
    with stip.connect(profile, timeout=connect_timeout) as connection:
        connected = time.monotonic() - started
        with connection.session() as session:
            opened = time.monotonic() - started
            chunks: list[stip.Chunk] = []
            for chunk in session.generate(
                asked,
                max_tokens=max_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                drafts=drafts,
                timeout=timeout,
            ):
                chunks.append(chunk)
                if not as_json:
                    click.echo(chunk.text, nl=False)
            if session.last is None:
                raise Unavailable("session: ended without a word")
            if not as_json:
                click.echo()
                return
            found = _document(chunks, session.last)
            found["request_id"] = session.request_id
            found["timings"] |= {"connect_seconds": connected, "open_seconds": opened - connected}
            found["verification"] = connection.verification.summary()
            found["audit_log"] = {"status": connection.audit_log.status.value, "got": connection.audit_log.got}
    click.echo(json.dumps(found, indent=2, ensure_ascii=False))


def _prompt(prompt: str | None, ids: str | None) -> str | list[int]:
    if (prompt is None) == (ids is None):
        raise click.UsageError('give either PROMPT ("-" reads standard input) or --ids')
    if ids is not None:
        try:
            return [int(one) for one in ids.split(",")]
        except ValueError:
            raise RequestInvalid.because("--ids", "something else", "numbers separated by commas") from None
    return sys.stdin.read() if prompt == "-" else prompt or ""


def _document(chunks: list[stip.Chunk], last: stip.Completion) -> dict[str, Any]:
    rate = None
    if last.first_token_seconds is not None and last.completion_tokens > 1:
        rate = (last.completion_tokens - 1) / max(last.seconds - last.first_token_seconds, 1e-9)
    return {
        "text": "".join(chunk.text for chunk in chunks),
        "ids": [chunk.id for chunk in chunks if chunk.id is not None],
        "finish_reason": last.finish_reason.value,
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": last.completion_tokens,
        "seed": last.seed,
        "timings": {
            "first_token_seconds": last.first_token_seconds,
            "turn_seconds": last.seconds,
            "tokens_per_second": rate,
        },
    }
