"""`protect`, as a process and as a call: what an instance holds, and what is refused without a trace."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from safetensors.torch import load, load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from stip_keyservice.home import Home
from stip_keyservice.protect.commands.protect import protect as protect_command
from stip_keyservice.protect.instance import Protected, protect
from stip_protocol.errors import CheckpointInvalid, ConfigurationError, PresetRefused, SealedPartInvalid
from stip_protocol.manifest import ClientManifest, Manifest, check_files
from stip_protocol.sealed import read_sealed
from stip_protocol.secrets_file import grant_of, open_secrets

from .conftest import MODEL_NAME, SENTINEL, Case

GPT2, LLAMA = Case("gpt2", tied=True), Case("llama", tied=False, sharded=True)
CASES = [
    (GPT2, "hardened"),
    (GPT2, "paper"),
    (Case("gpt2", tied=False, sharded=True), "hardened"),
    (LLAMA, "hardened"),
    (LLAMA, "paper"),
    (Case("llama", tied=True), "hardened"),
    (Case("llama", tied=False, dtype=torch.bfloat16), "hardened"),
    (Case("llama", tied=False, dtype=torch.bfloat16), "paper"),
    (Case("gpt2", tied=True, dtype=torch.bfloat16), "hardened"),
    (LLAMA, "throughput"),
]
PROCESS = [sys.executable, "-c", "from stip_keyservice.protect.commands.protect import protect; protect()"]
DEVELOPER, SEALING = Ed25519PrivateKey.generate(), X25519PrivateKey.generate()

Checkpoints = Callable[[Case], Path]
Instance = tuple[Path, Protected, Case]


def command(*arguments: str | Path, **options: Any) -> Result:
    """The command in this process: one that imports torch anew takes seconds."""
    return CliRunner().invoke(protect_command, [*map(str, arguments)], **options)


def protected(model: Path, out: Path, preset: str = "hardened", **options: Any) -> Protected:
    return protect(
        model,
        out,
        preset=preset,  # type: ignore[arg-type]
        developer=DEVELOPER,
        seal_to=SEALING.public_key(),
        **({"samples": 1} | options),
    )


def source_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def says_something(tensor: torch.Tensor) -> bool:
    """Whether a tensor is not constant."""
    return bool((tensor != tensor.flatten()[0]).any())


@pytest.fixture(scope="module", params=CASES, ids=lambda param: f"{param[0]}-{param[1]}")
def instance(
    request: pytest.FixtureRequest, checkpoint_of: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> Instance:
    case, preset = request.param
    out = tmp_path_factory.mktemp("instance") / "out"
    options = {"accept_tied_head": True, "accept_token_cipher": True, "epoch": 5, "shard_bytes": 40_000}
    result = protected(checkpoint_of(case), out, preset, **options)
    return out, result, case


@pytest.mark.parametrize(("case", "preset"), [(GPT2, "hardened"), (LLAMA, "paper")], ids=str)
def test_the_command_as_a_process_writes_a_signed_certified_instance(
    checkpoint_of: Checkpoints, tmp_path: Path, case: Case, preset: str
) -> None:
    out = tmp_path / "out"
    arguments = (checkpoint_of(case), "--preset", preset, "--out", out, "--home", tmp_path / "home", "--json")
    done = subprocess.run([*PROCESS, *map(str, arguments)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    home = Home.open(tmp_path / "home")
    manifest, digest = Manifest.load(out / "manifest.json", home.developer.public_key())
    assert (report["instance"], report["manifest_digest"]) == (manifest.instance, digest.hex())
    assert report["certificate"]["passed"] is True
    assert list(report["stages"]) == ["keys", "server", "enclave", "certificate"]
    assert all(stage["seconds"] > 0 for stage in report["stages"].values())
    assert report["stages"]["server"]["bytes"] > 0
    secrets = open_secrets((out / "secrets.sealed").read_bytes(), home.sealing)
    assert (secrets.instance, secrets.manifest_digest) == (manifest.instance, digest)
    assert not list(tmp_path.glob("*.partial"))


def test_the_command_shows_a_table_and_seals_to_a_given_key_service(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    public = SEALING.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "sealing.pub").write_bytes(public)
    environment = {"STIP_KEYSERVICE_HOME": str(tmp_path / "home")}
    seal_to = ("--seal-to", tmp_path / "sealing.pub", "--epoch", "9")
    done = command(checkpoint_of(GPT2), "--out", tmp_path / "out", *seal_to, env=environment)
    assert done.exit_code == 0, done.output
    assert "Same top-1" in done.stdout
    assert "100.00%" in done.stdout
    assert "MB/s" in done.stdout
    assert open_secrets((tmp_path / "out" / "secrets.sealed").read_bytes(), SEALING).epoch == 9


def test_files_match_their_signed_manifests(instance: Instance) -> None:
    out, result, case = instance
    manifest, digest = Manifest.load(out / "manifest.json", DEVELOPER.public_key())
    assert manifest == result.manifest
    assert digest == result.manifest_digest
    check_files(out / "server", manifest.server)
    check_files(out / "enclave", manifest.enclave)
    client, _ = ClientManifest.load(out / "client" / "manifest.json", DEVELOPER.public_key())
    check_files(out / "client", client.files)
    assert (client.instance, client.epoch, client.stop_ids) == (manifest.instance, 5, (2, 7))
    certificate = (out / "certificate.json").read_bytes()
    assert manifest.certificate["sha256"] == hashlib.sha256(certificate).hexdigest()
    assert manifest.dtype == str(case.dtype).removeprefix("torch.")
    assert {path.name for path in out.iterdir()} == {
        *("manifest.json", "manifest.json.sig", "certificate.json", "secrets.sealed"),
        *("server", "enclave", "client"),
    }


def test_the_enclave_part_is_empty_where_the_server_decodes_alone(instance: Instance) -> None:
    _, result, _ = instance
    assert (
        (result.manifest.enclave == {}) is (result.manifest.output == "ids") is (result.manifest.preset == "throughput")
    )


def test_the_client_part_holds_the_tokenizer_and_sampling_defaults(
    instance: Instance, checkpoint_of: Checkpoints
) -> None:
    out, _, case = instance
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        assert (out / "client" / name).read_bytes() == (checkpoint_of(case) / name).read_bytes()
    defaults = json.loads((out / "client" / "generation_config.json").read_text())
    assert defaults == {"temperature": 0.6, "do_sample": True}


def test_secrets_open_the_enclave_part_for_the_key_service_only(instance: Instance) -> None:
    out, result, _ = instance
    data = (out / "secrets.sealed").read_bytes()
    with pytest.raises(SealedPartInvalid):
        open_secrets(data, X25519PrivateKey.generate())
    grant = grant_of(open_secrets(data, SEALING))
    place: dict[str, Any] = {"instance": grant.instance, "epoch": 5, "preset": grant.preset}
    for name in result.manifest.enclave:
        path = out / "enclave" / name
        plain = read_sealed(path, key=grant.part_key, file=name, **place)
        assert list(load(bytes(plain))) == [name.removesuffix(".sealed")]
        with pytest.raises(SealedPartInvalid):
            read_sealed(path, key=grant.part_key, file=name, **(place | {"epoch": 4}))


def test_the_server_part_loads_whole_and_alike_under_any_seed(instance: Instance) -> None:
    out, result, case = instance
    kind = AutoModel if result.manifest.output == "hidden" else AutoModelForCausalLM
    answers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        loaded: Any = kind.from_pretrained(
            out / "server", dtype=case.dtype, local_files_only=True, output_loading_info=True
        )
        network, info = loaded
        assert not any(info[field] for field in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        rows = torch.randn(1, 6, result.manifest.width, generator=torch.Generator().manual_seed(0)).to(case.dtype)
        with torch.inference_mode():
            answers.append(network(inputs_embeds=rows)[0])
    assert torch.equal(*answers)


def test_no_tensor_that_says_anything_equals_its_source(instance: Instance, checkpoint_of: Checkpoints) -> None:
    out, _, case = instance
    sources = source_tensors(checkpoint_of(case)).values()
    for name, tensor in source_tensors(out / "server").items():
        if says_something(tensor):
            assert not any(torch.equal(tensor, source) for source in sources), name


def test_the_operator_gets_no_name_path_tokenizer_or_digest(instance: Instance, checkpoint_of: Checkpoints) -> None:
    out, _, case = instance
    model = checkpoint_of(case)
    words = [MODEL_NAME, str(model), str(out), "acme", SENTINEL, "_name_or_path", "tokenizer", "hello"]
    needles = [word.encode().lower() for word in words]
    for path in model.iterdir():
        digest = hashlib.sha256(path.read_bytes())
        needles += [digest.digest(), digest.hexdigest().encode()]
    for tensor in source_tensors(model).values():
        data = raw_bytes(tensor)
        digest = hashlib.sha256(data)
        needles += [digest.digest(), digest.hexdigest().encode()]
        if says_something(tensor):
            needles.append(raw_bytes(tensor[0]) if tensor.ndim > 1 else data)
    public = [*(out / "server").iterdir(), out / "manifest.json"]
    for path in public:
        content = path.read_bytes()
        assert not [needle for needle in needles if needle in content or needle in content.lower()], path.name
    assert {path.suffix for path in (out / "server").iterdir()} <= {".json", ".safetensors"}


def test_two_protections_share_no_name_key_or_tensor(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    first, second = (protected(checkpoint_of(GPT2), tmp_path / name) for name in ("first", "second"))
    assert first.manifest.instance != second.manifest.instance
    assert not {d.sha256 for d in first.manifest.enclave.values()} & {
        d.sha256 for d in second.manifest.enclave.values()
    }
    other = source_tensors(second.directory / "server")
    for name, tensor in source_tensors(first.directory / "server").items():
        assert not says_something(tensor) or not torch.equal(tensor, other[name]), name


def broken(checkpoint: Path, folder: Path, **changed: torch.Tensor | None) -> Path:
    """A copy of a one-file checkpoint with some tensors replaced, or left out where None."""
    shutil.copytree(checkpoint, folder)
    tensors = source_tensors(folder) | {name: tensor for name, tensor in changed.items() if tensor is not None}
    kept = {name: tensor for name, tensor in tensors.items() if changed.get(name, tensor) is not None}
    save_file(kept, folder / "model.safetensors")
    return folder


BIAS = "transformer.ln_f.bias"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({BIAS: None}, rf"{BIAS}: got no such tensor"),
        ({"transformer.extra.weight": torch.ones(2)}, r"tensor: got transformer\.extra\.weight"),
        ({BIAS: torch.ones(31)}, rf"{BIAS} shape: got \[31\], allowed: \[32\]"),
        ({BIAS: torch.ones(32, dtype=torch.int8)}, rf"{BIAS} dtype: got I8"),
        ({BIAS: torch.ones(32).half()}, rf"{BIAS} dtype: got F16"),
    ],
    ids=["missing", "unknown", "shape", "integer", "mixed"],
)
def test_a_wrong_tensor_is_named_and_leaves_nothing(
    checkpoint_of: Checkpoints, tmp_path: Path, changed: dict[str, Any], says: str
) -> None:
    model = broken(checkpoint_of(GPT2), tmp_path / "model", **changed)
    with pytest.raises(CheckpointInvalid, match=says):
        protected(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_wrong_number_found_when_a_file_is_finished_already_keeps_that_and_says_so(
    checkpoint_of: Checkpoints, tmp_path: Path
) -> None:
    model = broken(checkpoint_of(GPT2), tmp_path / "model", **{BIAS: torch.full((32,), torch.nan)})
    with pytest.raises(CheckpointInvalid, match=r"finite.*out\.partial is kept: run the same command again to go on"):
        protected(model, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.partial"]


@pytest.mark.parametrize("eos", ["2", [-1], 1.0, True, [[2]]])
def test_a_stop_id_that_is_no_id_is_refused(checkpoint_of: Checkpoints, tmp_path: Path, eos: Any) -> None:
    model = broken(checkpoint_of(GPT2), tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(CheckpointInvalid, match="eos_token_id"):
        protected(model, tmp_path / "out")


def test_a_model_without_a_tokenizer_gives_a_client_part_without_one(
    checkpoint_of: Checkpoints, tmp_path: Path
) -> None:
    model = broken(checkpoint_of(GPT2), tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (model / name).unlink()
    (model / "generation_config.json").unlink()
    protected(model, tmp_path / "out")
    client, _ = ClientManifest.load(tmp_path / "out" / "client" / "manifest.json", DEVELOPER.public_key())
    assert list(client.files) == ["generation_config.json"]


def refusal(*arguments: str | Path) -> str:
    done = command(*arguments)
    assert done.exit_code == 2, done.output
    return done.stderr


def test_the_command_refuses_bad_input_in_one_line(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    home = ("--home", tmp_path / "home")
    arguments = (tmp_path / "nowhere", "--out", tmp_path / "out", *home)
    error = refusal(*arguments)
    assert error.count("\n") == 1
    assert "no such folder" in error
    assert "[checkpoint_invalid] — fix configuration" in error
    reported = json.loads(command(*arguments, "--json").stdout)["error"]
    assert (reported["code"], reported["action"]) == ("checkpoint_invalid", "fix_configuration")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["out", "out.partial"])
def test_a_folder_that_is_in_use_is_left_alone(checkpoint_of: Checkpoints, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").write_text("precious")
    with pytest.raises(ConfigurationError, match="out"):
        protected(checkpoint_of(GPT2), tmp_path / "out")
    assert (tmp_path / name / "mine").read_text() == "precious"


def test_an_empty_folder_is_taken(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    protected(checkpoint_of(GPT2), tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").exists()


def test_a_tied_head_under_paper_needs_to_be_accepted(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(PresetRefused, match="tied head"):
        protected(checkpoint_of(GPT2), tmp_path / "out", "paper")


@pytest.mark.parametrize("preset", ["throughput", "none"])
def test_presets_that_are_unknown_or_not_accepted_are_refused(
    checkpoint_of: Checkpoints, tmp_path: Path, preset: str
) -> None:
    with pytest.raises(PresetRefused, match="preset"):
        protected(checkpoint_of(GPT2), tmp_path / "out", preset)


@pytest.mark.parametrize("samples", [0, 65])
def test_a_certificate_without_samples_is_refused(checkpoint_of: Checkpoints, tmp_path: Path, samples: int) -> None:
    with pytest.raises(ConfigurationError, match=f"samples: got {samples}, allowed: 1 to 64"):
        protected(checkpoint_of(GPT2), tmp_path / "out", samples=samples)


@pytest.mark.parametrize("content", [b"no key", None])
def test_a_seal_to_file_that_is_no_x25519_key_is_refused(
    checkpoint_of: Checkpoints, tmp_path: Path, content: bytes | None
) -> None:
    public = DEVELOPER.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "key.pub").write_bytes(content or public)
    arguments = ("--out", tmp_path / "out", "--home", tmp_path / "home", "--seal-to", tmp_path / "key.pub")
    assert "allowed: an X25519 public key in PEM" in refusal(checkpoint_of(GPT2), *arguments)


def test_more_than_the_disk_holds_is_refused_before_anything_is_written(
    checkpoint_of: Checkpoints, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoint_of(GPT2), model)
    width = 1 << 16
    rows = 2 * shutil.disk_usage(tmp_path).free // (4 * width)
    config = json.loads((model / "config.json").read_text())
    larger = {config["vocab_size"]: rows} | {factor * config["n_embd"]: factor * width for factor in (1, 3, 4)}
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": rows, "n_embd": width}))
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in source_tensors(model).items():
        shape = [larger.get(size, size) for size in tensor.shape]
        begin, end = end, end + 4 * torch.Size(shape).numel()
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    with (model / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)  # sparse: takes no space
    with pytest.raises(ConfigurationError, match="free disk space"):
        protected(model, tmp_path / "out", "paper", accept_tied_head=True)
    assert not list(tmp_path.glob("out*"))


def test_a_model_that_cannot_be_certified_is_not_published(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    """The rows of this head share a part a million times larger than what tells them apart: its logits are rounding."""
    checkpoint = checkpoint_of(Case("llama", tied=False))
    head = source_tensors(checkpoint)["lm_head.weight"]
    shared = 1e6 * torch.randn(head.shape[1], generator=torch.Generator().manual_seed(1))
    model = broken(checkpoint, tmp_path / "model", **{"lm_head.weight": head + shared})
    done = command(model, "--out", tmp_path / "out", "--home", tmp_path / "home")
    assert done.exit_code == 3, done.output
    partial = tmp_path / "out.partial"
    assert "error: equivalence: " in done.stderr
    assert f"{partial} is kept unpublished: remove it to start anew [integrity_violated] — stop" in done.stderr
    assert (partial / "resume").exists()
    assert not any(path.exists() for path in (tmp_path / "out", partial / "manifest.json"))


def test_the_other_commands_of_the_key_service_do_not_pay_for_torch() -> None:
    script = "import sys, stip_keyservice.protect.commands.protect; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
