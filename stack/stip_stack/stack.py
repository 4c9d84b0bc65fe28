"""The whole system on loopback: every part a process of its own, on free ports."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from stip import keys
from stip_stack.processes import Process, run
from stip_stack.workspace import MEASUREMENT, Published, Workspace

BIN = Path(sys.executable).parent


class Stack:
    """Starts key service, replicas, gateway and enclave in the order they need each other; stops them in reverse.

        with Stack(path) as stack:
            instance = stack.protect(model, "hardened")
            stack.start([instance])
            profile = stack.enrol("demo", instance)

    `environment` is added to every process's; `engine` is the `[engine]` table of every replica.
    """

    def __init__(self, path: Path, *, environment: Mapping[str, str] | None = None) -> None:
        self.workspace = Workspace(path)
        self.processes: dict[str, Process] = {}
        self._environment = dict(environment or {})
        self._running = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def protection(self, model: Path, preset: str, *arguments: str, name: str | None = None) -> tuple[list[str], Path]:
        """(command, instance folder) that protects a checkpoint with this stack's keys."""
        folder = self.workspace.path / "instances" / (name or preset)
        folder.parent.mkdir(exist_ok=True)
        command = [
            str(BIN / "stip-keyservice"), "protect", str(model), "--preset", preset, "--out", str(folder),
            "--home", str(self.workspace.home.path), *arguments,
        ]  # fmt: skip
        return command, folder

    def protect(self, model: Path, preset: str, *arguments: str, name: str | None = None) -> Published:
        """Protect a checkpoint with the real command; returns the instance."""
        command, folder = self.protection(model, preset, *arguments, name=name)
        run([*command, "--quiet"])
        return self.workspace.published(folder)

    def start(
        self,
        published: Sequence[Published],
        *,
        policy: Mapping[str, Any] | None = None,
        engine: Mapping[str, Any] | None = None,
        replicas: int = 1,
    ) -> None:
        """Start everything for the instances given; each gets `replicas` model servers and is `shared`."""
        workspace = self.workspace
        config = workspace.keyservice(policy=policy)
        keyservice = self._begin("keyservice", [str(BIN / "stip-keyservice"), "serve", "--config", str(config)])
        for each in published:
            self.keyservice("instances", "add", str(each.folder), "--shared")
        servers = {f"server-{number}-{copy}": each for number, each in enumerate(published) for copy in range(replicas)}
        started = [
            self._begin(
                name, [str(BIN / "stip-server"), "serve", "--config", str(workspace.server(name, each, engine=engine))]
            )
            for name, each in servers.items()
        ]
        keyservice.wait_until_listening()
        for process in started:
            process.wait_until_listening()
        routes = {process.name: (process.address, servers[process.name]) for process in started}
        config = workspace.gateway(routes)
        gateway = self._begin("gateway", [str(BIN / "stip-gateway"), "serve", "--config", str(config)])
        gateway.wait_until_listening()
        config = workspace.enclave(keyservice=keyservice.address, gateway=gateway.address, published=list(published))
        self._begin("enclave", [
            sys.executable, "-m", "stip_stack.enclave_main", "--config", str(config),
            "--insecure-simulated-tee", str(workspace.platform.directory), "--measurement", MEASUREMENT.hex(),
        ]).wait_until_listening()  # fmt: skip

    def enrol(self, user: str, published: Published, *, budget: int = 1_000_000) -> Path:
        """A user with a fresh key, a budget and access to one instance; returns the path of their profile."""
        folder = self.workspace.path / "user"
        folder.mkdir(mode=0o700, exist_ok=True)
        key = keys.create(folder / f"{user}.pem")
        self.keyservice(
            "users", "add", user, "--public-key", key.public.hex(), "--budget", str(budget),
            "--instance", published.manifest.instance,
        )  # fmt: skip
        return self.workspace.client(
            enclave=self.processes["enclave"].address,
            published=published,
            user_key=folder / f"{user}.pem",
            name=f"profile-{user}",
        )

    def keyservice(self, *arguments: str) -> str:
        """Run a command of the key service's CLI on this stack's home; returns its stdout."""
        return run([str(BIN / "stip-keyservice"), *arguments, "--home", str(self.workspace.home.path)])

    def stop(self) -> None:
        """Stop every process, the newest first. Idempotent."""
        self._running.close()

    def _begin(self, name: str, argv: list[str]) -> Process:
        process = Process(name, argv, self.workspace.logs / f"{name}.jsonl", environment=self._environment)
        self._running.callback(process.stop)
        self.processes[name] = process
        return process
