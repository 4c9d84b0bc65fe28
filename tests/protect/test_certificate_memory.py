"""What a certificate takes of memory: a layer, not the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stip_keyservice.home import Home
from stip_keyservice.protect.instance import protect
from stip_keyservice.protect.storage.memory import bound

from .decoders import DECODERS

MEASURE = """
import json, sys
from pathlib import Path
from stip_keyservice.home import Home
from stip_keyservice.protect.equivalence.verification import verify

def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

home, *pairs = map(Path, sys.argv[1:])
peaks = []
for instance, model in zip(pairs[::2], pairs[1::2]):
    _, certificate = verify(instance, model, Home.open(home))
    assert certificate.passed
    peaks.append(peak())
print(json.dumps(peaks))
"""
LARGE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 14,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "attention_bias": False,
    "mlp_bias": False,
}


def made(folder: Path, home: Home, **fields: object) -> tuple[Path, Path]:
    """(instance, model)"""
    model = DECODERS["llama"].store(folder / "model", torch.float32, **fields)
    protect(
        model,
        folder / "instance",
        preset="paper",
        developer=home.developer,
        seal_to=home.sealing.public_key(),
        samples=1,
    )
    return folder / "instance", model


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux: the peak is read from /proc")
def test_a_certificate_holds_a_small_part_of_the_model(tmp_path: Path) -> None:
    """In a child: first a tiny model, for what the libraries take, then one of 14 layers."""
    home = Home.open(tmp_path / "home")
    small, large = made(tmp_path / "small", home), made(tmp_path / "large", home, **LARGE)
    size = (large[1] / "model.safetensors").stat().st_size
    assert size > 390e6
    arguments = [str(tmp_path / "home"), *map(str, (*small, *large))]
    ended = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    libraries, peak = json.loads(ended.stdout)
    assert peak - libraries < size / 2, f"{peak - libraries} of {size} bytes"


PROTECT = """
import json, sys
from pathlib import Path
from stip_keyservice.home import Home
from stip_keyservice.protect.instance import protect

home = Home.open(Path(sys.argv[1]))
protect(
    Path(sys.argv[2]), Path(sys.argv[3]), preset="hardened", developer=home.developer,
    seal_to=home.sealing.public_key(), samples=4,
)
line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps(int(line.split()[1]) * 1024))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux: the peak is read from /proc")
def test_a_protection_with_its_certificate_keeps_near_the_promised_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a child: a large vocabulary, whose logits are much larger than the model.

    What the allocator keeps between the two depends on the machine: peaks of 0.94 to 1.35 GB were seen where 1.27 are
    promised, hence the quarter.
    """
    monkeypatch.setattr("tests.protect.decoders.VOCABULARY", 256_000)
    model = DECODERS["llama"].store(tmp_path / "model", torch.bfloat16, hidden_size=96, num_hidden_layers=1)
    arguments = [str(tmp_path / name) for name in ("home", "model", "instance")]
    ended = subprocess.run([sys.executable, "-c", PROTECT, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    promised = bound((model / "model.safetensors").stat().st_size)
    assert json.loads(ended.stdout) <= 1.25 * promised
