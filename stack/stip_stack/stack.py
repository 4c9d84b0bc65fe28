"""The whole system on loopback: every part a process of its own, on free ports."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from stip import keys
from stip_stack.processes import Process, run
from stip_stack.workspace import MEASUREMENT, Published, Workspace

BIN = Path(sys.executable).parent


class Stack:
    """Starts key service, replicas, gateway and enclave in the order they need each other; stops those in front first.

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

    def enrol(self, user: str, published: Published, *more: Published, budget: int = 1_000_000) -> Path:
        """A user with a fresh key, a budget and access to the instances; returns their profile for the first."""
        folder = self.workspace.path / "user"
        folder.mkdir(mode=0o700, exist_ok=True)
        key = keys.create(folder / f"{user}.pem")
        allowed = [word for each in (published, *more) for word in ("--instance", each.manifest.instance)]
        self.keyservice("users", "add", user, "--public-key", key.public.hex(), "--budget", str(budget), *allowed)
        return self.profile(user, published, name=f"profile-{user}")

    def profile(self, user: str, published: Published, *, name: str) -> Path:
        """`<name>.toml`: the profile of an enrolled user for one instance."""
        return self.workspace.client(
            enclave=self.processes["enclave"].address,
            published=published,
            user_key=self.workspace.path / "user" / f"{user}.pem",
            name=name,
        )

    def keyservice(self, *arguments: str) -> str:
        """Run a command of the key service's CLI on this stack's home; returns its stdout."""
        return run([str(BIN / "stip-keyservice"), *arguments, "--home", str(self.workspace.home.path)])

    def restart(self, name: str) -> None:
        """Start a process that was stopped or killed (or stop it now) again, where it listened before."""
        before = self.processes[name]
        before.stop()
        self.workspace.listen(name, address=before.address, metrics=before.metrics)
        self._begin(name, before.argv).wait_until_listening()

    def stop(self) -> dict[str, int]:
        """Stop every process: enclave, then gateway, then all others at once. Idempotent; exit statuses by name."""
        front = [self.processes[name] for name in ("enclave", "gateway") if name in self.processes]
        others = [process for process in self.processes.values() if process not in front]
        try:
            for process in front:
                process.stop()
        finally:
            for process in others:
                process.terminate()
            for process in others:
                process.stop()
        return {name: process.stop() for name, process in self.processes.items()}

    def _begin(self, name: str, argv: Sequence[str]) -> Process:
        process = Process(name, argv, self.workspace.logs / f"{name}.jsonl", environment=self._environment)
        self.processes[name] = process
        return process
