"""`server.toml`: which engine, with which settings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from stip_protocol.errors import ConfigurationError
from stip_protocol.runtime.config import load
from stip_server.config import ServerSettings, TransformersSettings, VllmSettings
from stip_server.engines.factories import FACTORIES
from stip_server.engines.vllm.surroundings import surround

HEAD = "".join(
    f'{name} = "x"\n' for name in ("name", "instance", "developer_key", "certificate", "private_key", "client_ca")
)


def read(tmp_path: Path, engine: str) -> ServerSettings:
    path = tmp_path / "server.toml"
    path.write_text(HEAD + engine)
    return load(ServerSettings, path)


@pytest.mark.parametrize("engine", ["", "[engine]\nslots = 16\n", '[engine]\nkind = "transformers"\n'])
def test_the_engine_is_transformers_where_nothing_else_is_said(tmp_path: Path, engine: str) -> None:
    assert read(tmp_path, engine).engine == TransformersSettings()


def test_a_vllm_table_is_read_with_its_own_keys(tmp_path: Path) -> None:
    engine = '[engine]\nkind = "vllm"\nmemory_gb = 0.5\ntensor_parallel = 4\ndistributed_backend = "ray"\n'
    settings = VllmSettings(kind="vllm", memory_gb=0.5, tensor_parallel=4, distributed_backend="ray")
    assert read(tmp_path, engine).engine == settings


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ('[engine]\nkind = "scripted"\n', "engine: kind must be 'transformers' or 'vllm'"),
        ('[engine]\nkind = ["vllm"]\n', "engine: kind must be 'transformers' or 'vllm'"),
        ('[engine]\nkind = "vllm"\ngather_window_ms = 1\n', "engine.vllm.gather_window_ms"),
        ('[engine]\ndistributed_backend = "ray"\n', "engine.transformers.distributed_backend"),
        ('[engine]\nkind = "vllm"\nblock = 16\n', "engine.vllm.block"),
        ('[engine]\nkind = "vllm"\ndistributed_backend = "uni"\n', "engine.vllm.distributed_backend"),
        ('[engine]\nkind = "vllm"\nmemory_gb = 0\n', "engine.vllm.memory_gb"),
    ],
)
def test_a_wrong_engine_table_names_the_field(tmp_path: Path, engine: str, said: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        read(tmp_path, engine)
    assert said in refused.value.message


def test_every_kind_of_engine_that_can_be_configured_can_be_made() -> None:
    assert set(FACTORIES) == {"transformers", "vllm"}


async def test_vllm_is_refused_where_it_is_not_installed() -> None:
    with pytest.raises(ConfigurationError, match=r"^engine\.kind: got vllm, allowed: transformers, or"):
        await FACTORIES["vllm"](Path("x"), Ed25519PrivateKey.generate().public_key(), VllmSettings(kind="vllm"))


def test_the_environment_of_vllm_is_quiet_whatever_it_was_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"VLLM_LOGGING_CONFIG_PATH": "x", "VLLM_NO_USAGE_STATS": "0", "HOME": "y"})
    surround(VllmSettings(kind="vllm", threads=3, tensor_parallel=2))
    assert os.environ.items() >= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HOME": "y"}.items()
    assert os.environ["VLLM_LOGGING_LEVEL"] == "CRITICAL"
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert not {"VLLM_LOGGING_CONFIG_PATH", "VLLM_ENABLE_V1_MULTIPROCESSING"} & set(os.environ)


def test_reading_a_configuration_loads_no_engine() -> None:
    code = "import sys, stip_server.config, stip_server.cli, stip_server.engines.factories as f; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "vllm"} & set(modules)
