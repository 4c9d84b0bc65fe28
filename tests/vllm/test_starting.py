"""What is not started: a checkpoint that asks for more than its tensors, and an environment that says otherwise."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest

from stip_protocol.errors import CheckpointInvalid
from stip_protocol.manifest import Manifest, file_digest
from stip_server.engine import Form
from stip_server.engines.vllm.starting import load
from stip_server.engines.vllm.surroundings import LOUD, surround
from tests.vllm.conftest import DEVELOPER, SETTINGS

pytestmark = pytest.mark.timeout(120)
CODE = "import pathlib\npathlib.Path({mark!r}).touch()\nclass Evil: ...\n"


def resigned(instance: Path, out: Path, **changes: Any) -> Path:
    """The same instance under another configuration, by a developer who signs anything."""
    manifest, _ = Manifest.load(instance / "manifest.json", DEVELOPER.public_key())
    server = out / "server"
    server.mkdir(parents=True)
    for path in (instance / "server").iterdir():
        (server / path.name).write_bytes(path.read_bytes())
    config = server / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    (server / "evil.py").write_text(CODE.format(mark=str(out / "ran")))
    files = {path.name: file_digest(path) for path in server.iterdir()}
    manifest.model_copy(update={"server": files}).write(out / "manifest.json", DEVELOPER)
    return out


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}, "auto_map"),
        ({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}, "config.json"),
        ({"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}, "quantization_config"),
        ({"model_type": "mamba"}, "model_type"),
    ],
    ids=str,
)
async def test_a_signed_checkpoint_that_brings_code_or_conversions_is_refused(
    make_instance: Any, tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    evil = resigned(make_instance(Form.IDS).directory, tmp_path / "evil", **changes)
    with pytest.raises(CheckpointInvalid) as refused:
        await load(evil, DEVELOPER.public_key(), SETTINGS)
    assert field in refused.value.message
    assert not (evil / "ran").exists()


def test_vllm_gets_a_folder_of_its_own_and_no_variable_that_undoes_a_promise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in os.environ.items():
        monkeypatch.setenv(name, value)  # restored afterwards
    for name in (*LOUD, "VLLM_HOST_IP"):
        monkeypatch.setenv(name, "/elsewhere")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    surround(SETTINGS)
    (folder,) = tmp_path.iterdir()
    assert (tempfile.gettempdir(), os.environ["TMPDIR"]) == (str(folder), str(folder))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not set(LOUD) & os.environ.keys()
    assert (os.environ["VLLM_HOST_IP"], os.environ["GLOO_SOCKET_IFNAME"]) == ("127.0.0.1", "lo")


def test_workers_on_other_machines_are_met_where_the_operator_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in os.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", tempfile.gettempdir())
    monkeypatch.setenv("VLLM_HOST_IP", "192.0.2.7")
    surround(SETTINGS.model_copy(update={"distributed_backend": "ray"}))
    assert os.environ["VLLM_HOST_IP"] == "192.0.2.7"
