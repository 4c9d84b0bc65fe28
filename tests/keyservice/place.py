"""The key service as its operator meets it: a folder with a home and configuration, commands, a running process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from stip_keyservice.cli import main
from stip_stack.tee import SimulatedPlatform

COMMAND = str(Path(sys.executable).with_name("stip-keyservice"))
POLICY = """
[evidence]
mode = "development"
measurements = ["{measurement}"]
simulated_root_sha256 = "{root}"
[lease]
audience = "gateway.test"
"""


@dataclass(frozen=True)
class Place:
    """A folder with a home and the configuration of a service that trusts a simulated TEE."""

    folder: Path
    platform: SimulatedPlatform
    config_name: str = "keyservice.toml"

    @classmethod
    def made(cls, folder: Path, measurement: bytes) -> Place:
        """With a policy that accepts one measurement, of a TEE simulated in that folder."""
        platform = SimulatedPlatform.create(folder / "tee")
        (folder / "root.der").write_bytes(platform.root_der)
        text = POLICY.format(measurement=measurement.hex(), root=platform.root_sha256.hex())
        (folder / "policy.toml").write_text(text)
        (folder / "keyservice.toml").write_text(
            'home = "home"\npolicy = "policy.toml"\nsimulated_root = "root.der"\nsimulated = true\n'
            "[serving]\nmetrics_snapshot_seconds = 0\n"
        )
        return cls(folder, platform)

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def config(self) -> Path:
        return self.folder / self.config_name

    def call(self, *arguments: str, code: int = 0) -> Any:
        """Run one command with `--json`; returns its document."""
        done = subprocess.run(
            [COMMAND, *arguments, "--home", str(self.home), "--json"], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code, done.stdout + done.stderr
        return json.loads(done.stdout)

    def call_here(self, *arguments: str, code: int = 0) -> Any:
        """The same in this process, for tables of many calls."""
        done = CliRunner().invoke(main, [*arguments, "--home", str(self.home), "--json"])
        assert done.exit_code == code, done.output
        return json.loads(done.stdout)

    def call_here_raw(self, *arguments: str, code: int = 0) -> str:
        """All that such a call says, on both streams."""
        done = CliRunner().invoke(main, [*arguments, "--home", str(self.home), "--json"])
        assert done.exit_code == code, done.output
        return done.output

    @contextmanager
    def service(self) -> Iterator[tuple[dict[str, str], list[str]]]:
        """A running service: what it announced and its process id, and its log lines once it is gone."""
        process = subprocess.Popen(
            [COMMAND, "serve", "--config", str(self.config)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        log: list[str] = []
        try:
            yield json.loads(process.stdout.readline()) | {"pid": str(process.pid)}, log
        finally:
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=30)
            log += err.splitlines()
            assert process.returncode == 0, out + err


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *arguments], capture_output=True, text=True, timeout=60, env=os.environ | environment
    )


def told_here(*arguments: str) -> Result:
    """What people are told, on a wide terminal, by a command run in this process."""
    return CliRunner().invoke(main, arguments, env={"COLUMNS": "220"})
