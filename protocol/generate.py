"""Generate the gRPC messages and their type stubs from the .proto files.

python protocol/generate.py          write them
python protocol/generate.py --check  exit 1 where the committed files are not what would be written
"""

from __future__ import annotations

import argparse
import filecmp
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path

ROOT = Path(__file__).parent
WIRE = Path("stip_protocol/wire")
OUTPUTS = ("python", "grpc_python", "mypy", "mypy_grpc")


def generate(target: Path) -> list[Path]:
    """Write all generated files under `target`; returns their paths relative to it."""
    include = resources.files("grpc_tools") / "_proto"
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / WIRE).glob("*.proto"))
    plugins = [
        f"--plugin=protoc-gen-{name}={Path(sys.executable).parent / f'protoc-gen-{name}'}" for name in OUTPUTS[2:]
    ]
    outputs = [f"--{name}_out={target}" for name in OUTPUTS]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}", f"-I{include}", *plugins, *outputs, *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"protoc failed:\n{done.stderr}")
    return sorted(path.relative_to(target) for path in (target / WIRE).glob("*_pb2*.py*"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where files are stale")
    if not parser.parse_args().check:
        generate(ROOT)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        fresh = generate(Path(folder))
        stale = [path for path in fresh if not filecmp.cmp(Path(folder) / path, ROOT / path, shallow=False)]
    for path in stale:
        print(f"{path}: not what its .proto generates; run `make proto`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
