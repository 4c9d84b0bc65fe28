"""`verify-equivalence`, on instances that `protect` wrote: what it says, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from stip_keyservice.home import Home
from stip_keyservice.protect.commands.verify import verify_equivalence
from stip_keyservice.protect.instance import protect

from .conftest import Case

PROCESS = [sys.executable, "-c", "from stip_keyservice.cli import main; main()", "verify-equivalence"]


@dataclass(frozen=True)
class Made:
    """An instance, its source and the home that made it."""

    instance: Path
    model: Path
    home: Path

    def run(self, *options: str | Path, **changed: Path) -> Result:
        """The command in this process, with another folder in place of one of the three."""
        places = {"instance": self.instance, "model": self.model, "home": self.home} | changed
        home = ["--home", str(places["home"])]
        return CliRunner().invoke(
            verify_equivalence, [str(places["instance"]), str(places["model"]), *home, *map(str, options)]
        )


Make = Callable[[Case, str], Made]


@pytest.fixture(scope="module")
def made(checkpoint_of: Callable[[Case], Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Instances, each made on first use: none may be written to."""
    home = tmp_path_factory.mktemp("home") / "keyservice"
    found: dict[tuple[Case, str], Made] = {}

    def make(case: Case, preset: str) -> Made:
        if (case, preset) not in found:
            out = tmp_path_factory.mktemp("instance") / "out"
            opened = Home.open(home)
            protect(
                checkpoint_of(case),
                out,
                preset=preset,  # type: ignore[arg-type]
                developer=opened.developer,
                seal_to=opened.sealing.public_key(),
                accept_tied_head=True,
                accept_token_cipher=True,
                samples=1,
            )
            found[case, preset] = Made(out, checkpoint_of(case), home)
        return found[case, preset]

    return make


LLAMA, GPT2 = Case("llama", tied=False), Case("gpt2", tied=True)


def copied(made: Made, folder: Path) -> Made:
    shutil.copytree(made.instance, folder / "instance")
    return Made(folder / "instance", made.model, made.home)


@pytest.mark.parametrize(
    ("case", "preset"),
    [(GPT2, "paper"), (GPT2, "hardened"), (LLAMA, "paper"), (LLAMA, "hardened"), (LLAMA, "throughput")],
    ids=str,
)
def test_an_instance_is_equivalent_to_its_source(made: Make, case: Case, preset: str) -> None:
    result = made(case, preset).run("--json", "--quiet", "--samples", "2", "--length", "20")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["equivalent"] is True
    assert found["departs"] is None
    assert found["preset"] == preset
    certificate = found["certificate"]
    assert (certificate["samples"], certificate["positions"]) == (2, 40)
    assert [layer["name"] for layer in certificate["layers"]] == ["entry", "layer 0", "layer 1", "final norm"]
    assert result.stderr == ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_table_shows_both_dtypes(made: Make, dtype: torch.dtype) -> None:
    result = made(Case("llama", tied=False, dtype=dtype), "hardened").run()
    assert result.exit_code == 0, result.output
    name = str(dtype).removeprefix("torch.")
    for text in ("hardened", "float32", f"{name}: plain", "entry", "layer 1", "final norm", "logits, random"):
        assert text in result.stdout
    assert "Random: 4 sequences, 256 positions; same top-1" in result.stdout
    assert "Equivalent: rms" in result.stdout
    for text in ("Enclave's embedding: all 173 rows", "Enclave's head: all 173 rows", "of 80 positions"):
        assert text in result.stdout


def test_the_certificate_tells_what_was_compared(made: Make) -> None:
    found = json.loads(made(GPT2, "hardened").run("--json").stdout)["certificate"]
    assert {table["name"]: table["rows"] for table in found["tables"]} == {
        "embedding": 151,
        "positions": 48,
        "head": 151,
        "head_bias": 151,
    }
    assert (found["coverage"]["length"], found["coverage"]["max_positions"]) == (48, 48)
    assert 0 < found["coverage"]["ids"] <= found["coverage"]["vocabulary"] == 151
    assert (found["undecided"], found["coverage"]["experts"]) == (0, 0)


def test_given_ids_are_compared_too(made: Make, tmp_path: Path) -> None:
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps([[1, 2, 3, 4], [150]]))
    result = made(LLAMA, "hardened").run("--ids", ids)
    assert result.exit_code == 0, result.output
    assert "Given: 2 sequences, 5 positions" in result.stdout
    assert "logits, given" in result.stdout
    alone = made(LLAMA, "hardened").run("--ids", ids, "--samples", "0", "--json")
    assert [group["name"] for group in json.loads(alone.stdout)["certificate"]["groups"]] == ["given"]


def test_seed_length_and_dtype_are_as_asked(made: Make) -> None:
    result = made(GPT2, "hardened").run("--json", "--seed", "7", "--length", "9", "--dtype", "float64")
    certificate = json.loads(result.stdout)["certificate"]
    assert certificate["passed"] is True
    assert (certificate["seed"], certificate["positions"], certificate["compute_dtype"]) == (7, 36, "float64")


def test_a_moved_instance_is_still_equivalent(made: Make, tmp_path: Path) -> None:
    result = copied(made(LLAMA, "paper"), tmp_path).run("--quiet")
    assert result.exit_code == 0, result.output
    assert result.output == ""


@pytest.mark.parametrize("preset", ["paper", "hardened"])
def test_one_changed_tensor_of_the_model_is_found_and_placed(made: Make, preset: str, tmp_path: Path) -> None:
    instance = made(LLAMA, preset)
    other = tmp_path / "model"
    shutil.copytree(instance.model, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"] *= 1.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    result = instance.run(model=other)
    assert result.exit_code == 3
    assert "layer 1" in result.stdout, "the table is shown all the same"
    assert "not equivalent" in result.stderr
    assert "they part at: layer 1" in result.stderr
    told = json.loads(instance.run("--json", model=other).stdout)
    assert (told["equivalent"], told["departs"]) == (False, "layer 1")


def test_other_weights_of_the_same_form_are_found_from_the_first_row_on(made: Make, tmp_path: Path) -> None:
    """As after further training: every tensor is another."""
    instance = made(LLAMA, "hardened")
    other = tmp_path / "model"
    shutil.copytree(instance.model, other)
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(other / "model.safetensors")
    for tensor in tensors.values():
        tensor += 0.01 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    result = instance.run("--quiet", model=other)
    assert result.exit_code == 3
    assert "they part at: entry" in result.stderr


def test_a_model_of_another_form_is_no_source(made: Make, checkpoint_of: Callable[[Case], Path]) -> None:
    other = made(LLAMA, "hardened").run(model=checkpoint_of(GPT2))
    assert other.exit_code == 3
    assert "model width: got 32, allowed: 48: the model is not this instance's source" in other.stderr
    dtype = made(LLAMA, "hardened").run(model=checkpoint_of(Case("llama", tied=False, dtype=torch.bfloat16)))
    assert dtype.exit_code == 3
    assert "model dtype: got bfloat16, allowed: float32" in dtype.stderr


def test_a_model_with_one_layer_less_is_no_source(made: Make, tmp_path: Path) -> None:
    instance = made(LLAMA, "hardened")
    other = tmp_path / "model"
    shutil.copytree(instance.model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "layer_types": None}))
    tensors = load_file(other / "model.safetensors")
    fewer = {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}
    save_file(fewer, other / "model.safetensors", metadata={"format": "pt"})
    result = instance.run("--json", model=other)
    assert result.exit_code == 3
    assert "server part, tensor layers.1." in json.loads(result.stdout)["error"]["message"]


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("server/model.safetensors", "manifest_mismatch"),
        ("enclave/head.sealed", "manifest_mismatch"),
        ("certificate.json", "manifest_mismatch"),
        ("manifest.json", "signature_invalid"),
        ("secrets.sealed", "sealed_part_invalid"),
    ],
)
def test_a_changed_file_is_found_before_anything_runs(made: Make, tmp_path: Path, file: str, code: str) -> None:
    instance = copied(made(LLAMA, "hardened"), tmp_path)
    path = instance.instance / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    result = instance.run("--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["error"]["code"] == code


def test_another_home_neither_signed_nor_opens_it(made: Make, tmp_path: Path) -> None:
    result = made(LLAMA, "hardened").run("--json", home=tmp_path / "other")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["error"]["code"] == "signature_invalid"


@pytest.mark.parametrize(
    ("options", "changed", "message"),
    [
        (["--samples", "0"], {}, "samples: got 0, allowed: 1 to 64, or 0 with a file of ids"),
        (["--length", "81"], {}, "length: got 81, allowed: at most 80"),
        (["--ids", "/nowhere/ids.json"], {}, "ids /nowhere/ids.json: No such file"),
        ([], {"instance": Path("/nowhere")}, "instance: got no such folder"),
        ([], {"model": Path("/nowhere")}, "model: got no such folder"),
    ],
    ids=["samples", "length", "ids", "instance", "model"],
)
def test_input_that_is_refused_is_named(made: Make, options: list[str], changed: Any, message: str) -> None:
    result = made(LLAMA, "hardened").run(*options, **changed)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_ids_outside_the_vocabulary_are_refused_without_being_quoted(made: Make, tmp_path: Path) -> None:
    ids = tmp_path / "ids.json"
    ids.write_text("[[1, 98765]]")
    result = made(LLAMA, "hardened").run("--ids", ids)
    assert result.exit_code == 2
    assert "ids, sequence 1, position 1: got no id of the model, allowed: 0 to 172" in result.stderr
    assert "98765" not in result.output


def test_the_command_is_one_of_the_key_services(made: Make) -> None:
    """As a process: its own file handles, its own exit code, nothing but the result on stdout."""
    instance = made(GPT2, "hardened")
    arguments = [str(instance.instance), str(instance.model), "--home", str(instance.home), "--json", "--quiet"]
    ended = subprocess.run([*PROCESS, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["equivalent"] is True
    assert ended.stderr == ""
