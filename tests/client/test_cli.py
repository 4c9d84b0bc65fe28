"""The command: streams, documents, exit codes, and one line for every error."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import stip
from stip import cli, keys
from stip_protocol.errors import BudgetSpent, Overloaded

TEXT = " And the light was good, and the waters were calm."


@pytest.fixture
def stip_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `stip` in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("STIP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stip", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return run


@pytest.fixture
def path(enclave: Any, make_profile: Callable[..., Path]) -> str:
    return str(make_profile(enclave.port))


def test_help_teaches_each_command(stip_command: Any):
    for words in ([], ["keys"], ["keys", "create"], ["verify"], ["generate"], ["chat"]):
        code, out, _ = stip_command(*words, "--help")
        assert code == 0
        assert "Usage: stip" in out


def test_generate_streams_the_answer(stip_command: Any, path: str, enclave: Any):
    code, out, err = stip_command("generate", "--profile", path, "In the beginning")
    assert (code, out) == (0, TEXT + "\n")
    assert "SIMULATED" in err


def test_generate_reads_the_prompt_from_standard_input(stip_command: Any, path: str, enclave: Any, tokenizer: Any):
    code, out, _ = stip_command("generate", "--profile", path, "-", stdin="In the beginning")
    assert (code, out) == (0, TEXT + "\n")
    assert len(enclave.turns[0].ids) == 4 * len(tokenizer.encode("In the beginning", special=True))


def test_generate_json_gives_text_counts_timings_and_verification(stip_command: Any, path: str, enclave: Any):
    code, out, _ = stip_command(
        "generate",
        "--profile",
        path,
        "--json",
        "--ids",
        "5,6",
        "--max-tokens",
        "3",
        "--seed",
        "7",
        "--temperature",
        "1",
    )
    assert code == 0
    found = json.loads(out)
    assert found["ids"] == enclave.answers[0][:3]
    assert TEXT.startswith(found["text"])
    assert (found["finish_reason"], found["prompt_tokens"], found["completion_tokens"]) == ("length", 2, 3)
    assert found["seed"] == 7
    assert set(found["timings"]) >= {"connect_seconds", "open_seconds", "first_token_seconds", "turn_seconds"}
    assert found["verification"]["verified"] is True
    assert found["verification"]["simulated"] is True
    assert found["request_id"] == enclave.request_ids[0]


def test_verify_prints_every_step_and_exits_zero_only_if_verified(stip_command: Any, path: str):
    code, out, _ = stip_command("verify", "--profile", path)
    assert code == 0
    assert "VERIFIED" in out
    assert "fresh evidence: measurement" in out
    assert "\x1b[" not in out


def test_verify_refuses_with_three_and_names_expected_got_and_remedy(
    stip_command: Any, enclave: Any, make_profile: Callable[..., Path]
):
    path = str(make_profile(enclave.port, policy={"measurements": ["ab" * 32]}))
    code, out, _ = stip_command("verify", "--profile", path, "--json")
    assert code == 3
    found = json.loads(out)
    assert found["verified"] is False
    assert found["refusal"]["code"] == "measurement_refused"
    failed = next(step for step in found["steps"] if step["status"] == "failed")
    assert (failed["expected"], failed["got"]) == ("ab" * 32, bytes(range(32)).hex())
    assert failed["remedy"]
    assert found["steps"][-1]["status"] == "skipped"
    code, out, _ = stip_command("verify", "--profile", path)
    assert code == 3
    assert "REFUSED" in out


def test_a_refused_enclave_gets_no_prompt_and_exits_three(
    stip_command: Any, enclave: Any, make_profile: Callable[..., Path]
):
    path = str(make_profile(enclave.port, policy={"measurements": ["ab" * 32]}))
    for words in (["generate", "--profile", path, "hello"], ["chat", "--profile", path]):
        code, out, err = stip_command(*words, stdin="hello\n")
        assert (code, out) == (3, "")
        assert err.count("\n") == 1
        assert "[measurement_refused]" in err
    assert enclave.opens == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--profile", "missing.toml", "x"],
        ["generate", "x"],
        ["generate", "--profile", "missing.toml"],
        ["verify", "--profile", "missing.toml"],
        ["verify", "--profile", "missing.toml", "--unknown"],
        ["keys", "show", "missing"],
        ["keys", "create", "../escape"],
        ["unknown"],
    ],
    ids=" ".join,
)
def test_configuration_and_usage_errors_exit_two(stip_command: Any, arguments: list[str]):
    code, out, err = stip_command(*arguments)
    assert (code, out) == (2, "")
    assert err


def test_an_unavailable_enclave_exits_one_and_a_spent_budget_three(stip_command: Any, path: str, enclave: Any):
    enclave.opens_fail = [Overloaded("full")] * 3 + [BudgetSpent("spent")]
    code, _, err = stip_command("generate", "--profile", path, "x")
    assert code == 1
    assert "[overloaded]: try again" in err
    code, _, err = stip_command("generate", "--profile", path, "x")
    assert code == 3
    assert "[budget_spent]" in err


def test_a_busy_enclave_exits_one_and_says_when_to_try_again(stip_command: Any, path: str, enclave: Any):
    enclave.opens_fail = [Overloaded("full", retry_after=89.2)]
    code, _, err = stip_command("generate", "--profile", path, "x")
    assert code == 1
    assert err.splitlines()[-1] == "stip: full [overloaded]: try again in 90 s"
    assert len(enclave.opens) == 1


def test_drafts_reach_the_enclave_and_their_help_says_what_they_show(stip_command: Any, path: str, enclave: Any):
    assert stip_command("generate", "--profile", path, "--drafts", "3", "x")[0] == 0
    assert stip_command("chat", "--profile", path, "--drafts", "7", stdin="One.\n")[0] == 0
    assert stip_command("generate", "--profile", path, "x")[0] == 0
    assert [turn.sampling.drafts for turn in enclave.turns] == [3, 7, 0]
    assert stip_command("generate", "--profile", path, "--drafts", "8", "x")[0] == 2
    for command in ("generate", "chat"):
        out = " ".join(stip_command(command, "--help")[1].split())
        assert "The operator then sees how many guesses were right, and so how repetitive your text is" in out


def test_chat_takes_a_line_a_round_where_input_is_no_terminal(stip_command: Any, path: str, enclave: Any):
    code, out, _ = stip_command("chat", "--profile", path, stdin="One.\n\nTwo.\n/quit\nThree.\n")
    assert (code, out) == (0, f"{TEXT}\n{TEXT}\n")
    assert (len(enclave.opens), len(enclave.turns)) == (1, 2)


def test_keys_are_made_listed_shown_and_enrolled(stip_command: Any, tmp_path: Path):
    code, out, _ = stip_command("keys", "create", "--user", "ada lovelace")
    public = keys.load(keys.locate("default")).public.hex()
    assert code == 0
    assert f"stip-keyservice users add 'ada lovelace' --public-key {public}" in out
    assert stip_command("keys", "show")[1] == public + "\n"
    assert stip_command("keys", "list")[1] == f"default\t{public}\n"
    assert public in stip_command("keys", "enrol", "--user", "ada")[1]
    request = tmp_path / "enrolment.json"
    assert stip_command("keys", "enrol", "--user", "ada", "--out", str(request))[0] == 0
    assert json.loads(request.read_text())["public_key"] == public
    code, _, err = stip_command("keys", "create")
    assert code == 2
    assert "never overwritten" in err


def test_an_interruption_just_as_a_step_is_handed_over_stops_that_step(
    path: str, enclave: Any, monkeypatch: pytest.MonkeyPatch
):
    enclave.hold_after = 1
    handed_over, interruptions = asyncio.run_coroutine_threadsafe, [KeyboardInterrupt()]

    def interrupted(work: Any, loop: Any) -> Any:
        future = handed_over(work, loop)
        if interruptions:
            raise interruptions.pop()
        return future

    with stip.connect(Path(path)) as connection, connection.session() as session:
        stream = session.generate("One.", timeout=600)
        next(stream)
        monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        enclave.hold_after = None
        assert [chunk.text for chunk in session.generate("Two.")]


UNNOTICED = """
import asyncio, os, signal, threading
from stip.sync import _LOOP

async def interrupted():
    # Taken by a thread that is not the waiting one, as a signal is that comes just before the wait begins.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)
    await asyncio.Event().wait()

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
try:
    _LOOP.run(interrupted())
except KeyboardInterrupt:
    print("interrupted")
"""


def test_a_ctrl_c_that_does_not_end_the_wait_is_noticed_all_the_same() -> None:
    done = subprocess.run([sys.executable, "-c", UNNOTICED], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("interrupted\n", 0), done.stderr


def test_ctrl_c_stops_the_answer_and_not_the_conversation(path: str, enclave: Any):
    enclave.hold_after = 3
    # A shell's background job, such as a test run may be, hands on that SIGINT is ignored.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from stip.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-u", "-c", code, "chat", "--profile", path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=0,
        env=os.environ | {"NO_COLOR": "1"},
    ) as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        chat.stdin.write("One.\n")
        assert chat.stdout.read(4) == TEXT[:4]
        chat.send_signal(signal.SIGINT)
        assert chat.stdout.readline().endswith("\n")
        enclave.hold_after = None
        chat.stdin.write("Two.\n/quit\n")
        out, err = chat.communicate(timeout=30)
    assert chat.returncode == 0
    assert out == TEXT + "\n"
    assert "Traceback" not in err
    assert "[cancelled]" in err
