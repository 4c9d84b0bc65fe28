"""The whole system on loopback: every part a process of its own, on free ports."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from stip import keys
from stip_protocol.errors import ConfigurationError
from stip_stack.delay import Dial
from stip_stack.processes import Process, run
from stip_stack.workspace import MEASUREMENT, Published, Workspace

BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Launch:
    """How one model server is started, where it differs from the others."""

    engine: Mapping[str, Any] = field(default_factory=dict)
    """Over the `[engine]` table that all servers get."""
    python: Path = Path(sys.executable)
    """Of the environment it runs in; the one of vLLM is not ours. It must be able to import `stip_server`."""
    seconds: float = 120.0
    """It may take to listen."""


class Stack:
    """Starts key service, replicas, gateway and enclave in the order they need each other; stops those in front first.

        with Stack(path) as stack:
            instance = stack.protect(model, "hardened")
            stack.start([instance])
            profile = stack.enrol("demo", instance)

    `environment` is added to every process's. Model servers are called `server-I-R`: replica R of the instance I, as
    they are given to `start`; the other processes `keyservice`, `gateway`, `enclave` and, where there are any, `delay`
    and `recorder-server-I-R`.
    A part that was killed as a crash would (`stack.processes[name].kill()`) comes back with `restart`.
    """

    def __init__(self, path: Path, *, environment: Mapping[str, str] | None = None) -> None:
        self.workspace = Workspace(path)
        self.processes: dict[str, Process] = {}
        self._environment = dict(environment or {})
        self._dial: Dial | None = None
        self._added: set[bytes] = set()
        self._routes: dict[str, tuple[str, Published]] = {}
        self._engine: dict[str, Any] = {}

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
        limits: Mapping[str, Any] | None = None,
        replicas: int = 1,
        launches: Mapping[str, Launch] | None = None,
        link_delay_ms: float | None = None,
        recorded: Collection[str] = (),
        keyservice_at: Callable[[str], str] = lambda address: address,
    ) -> None:
        """Start everything for the instances given; each gets `replicas` model servers and is `shared`.

        `engine` is the `[engine]` table of every server, `launches` says by name which differ; `limits` is the
        enclave's table of that name. With `link_delay_ms`, enclave and gateway meet in a proxy that delays by so much
        one way, until `delay_link` says otherwise. Before each server whose name is `recorded` stands a process that
        keeps what the server sees (`tape`). `keyservice_at` gives the address at which the enclave finds a key service
        that listens at another: of something that stands between them. A stack that was stopped may start again, also
        for other instances.
        """
        workspace = self.workspace
        if running := [name for name, process in self.processes.items() if process.running]:
            raise ConfigurationError(f"stack: {', '.join(running)} still run; stop it before it starts again")
        self.processes, self._dial = {}, None
        servers = {f"server-{number}-{copy}": each for number, each in enumerate(published) for copy in range(replicas)}
        launches = {name: Launch() for name in servers} | dict(launches or {})
        if unknown := launches.keys() - servers.keys():
            raise ConfigurationError.because("launches", ", ".join(sorted(unknown)), ", ".join(servers))
        if unknown := set(recorded) - servers.keys():
            raise ConfigurationError.because("recorded", ", ".join(sorted(unknown)), ", ".join(servers))
        config = workspace.keyservice(policy=policy)
        keyservice = self._begin("keyservice", [str(BIN / "stip-keyservice"), "serve", "--config", str(config)])
        for each in published:
            if each.digest not in self._added:
                self.keyservice("instances", "add", str(each.folder), "--shared")
                self._added.add(each.digest)
        started = []
        for name, each in servers.items():
            launch = launches[name]
            config = workspace.server(name, each, engine={**(engine or {}), **launch.engine})
            argv = [str(launch.python), "-m", "stip_server.cli", "serve", "--config", str(config)]
            started.append(self._begin(name, argv))
        keyservice.wait_until_listening()
        for process in started:
            process.wait_until_listening(launches[process.name].seconds)
        addresses = {process.name: process.address for process in started}
        addresses |= {name: self._recorded(name, addresses[name]) for name in recorded}
        self._routes = {name: (address, servers[name]) for name, address in addresses.items()}
        self._engine = dict(engine or {})
        config = workspace.gateway(self._routes)
        gateway = self._begin("gateway", [str(BIN / "stip-gateway"), "serve", "--config", str(config)])
        gateway.wait_until_listening()
        link = gateway.address if link_delay_ms is None else self._delayed(gateway.address, link_delay_ms)
        config = workspace.enclave(
            keyservice=keyservice_at(keyservice.address), gateway=link, published=list(published), limits=limits
        )
        self._begin("enclave", [
            sys.executable, "-m", "stip_stack.enclave_main", "--config", str(config),
            "--insecure-simulated-tee", str(workspace.platform.directory), "--measurement", MEASUREMENT.hex(),
        ]).wait_until_listening()  # fmt: skip

    def join(self, published: Published) -> str:
        """Add another epoch or instance to a running stack: registered, on a server of its own, routed to and held by
        the enclave. Returns the server's name. Gateway and enclave take it by SIGHUP; nothing is restarted.

        Raises `ConfigurationError` where one of them refuses.
        """
        self.keyservice("instances", "add", str(published.folder), "--shared")
        self._added.add(published.digest)
        number = 1 + max(int(name.split("-")[1]) for name in self._routes)
        name = f"server-{number}-0"
        config = self.workspace.server(name, published, engine=self._engine)
        server = self._begin(name, [sys.executable, "-m", "stip_server.cli", "serve", "--config", str(config)])
        server.wait_until_listening()
        self._reroute({**self._routes, name: (server.address, published)})
        return name

    def part(self, name: str) -> None:
        """Take a server out of a running stack: its links drain, and it is stopped. Where it was the last of its
        instance epoch, the enclave lets that go, too."""
        self._reroute({other: route for other, route in self._routes.items() if other != name})
        self.processes[name].stop()

    def delay_link(self, milliseconds: float) -> None:
        """From the next byte on, delay what enclave and gateway say to each other by so much, one way."""
        if self._dial is None:
            raise ConfigurationError("link delay: this stack was started without link_delay_ms")
        self._dial.seconds = milliseconds / 1e3

    def tape(self, name: str) -> Path:
        """What was kept of a server that is `recorded` (`stip_stack.tape`)."""
        return self.workspace.path / f"{name}.tape"

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
        self.begin_again(name).wait_until_listening()

    def begin_again(self, name: str) -> Process:
        """As `restart`, without waiting until it listens."""
        before = self.processes[name]
        before.stop()
        self.workspace.listen(name, address=before.address, metrics=before.metrics)
        return self._begin(name, before.argv)

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

    def _reroute(self, routes: dict[str, tuple[str, Published]]) -> None:
        self.workspace.route(routes)
        self.workspace.hold({published.digest: published for _, published in routes.values()}.values())
        for name in ("gateway", "enclave"):
            if not self.processes[name].reread():
                raise ConfigurationError(f"{name}: did not take it:\n{self.processes[name].end_of_log()}")
        self._routes = routes

    def _delayed(self, target: str, milliseconds: float) -> str:
        """The address of a proxy to `target`."""
        path = self.workspace.path / "delay"
        self._dial = Dial(path, seconds=milliseconds / 1e3)
        argv = [sys.executable, "-m", "stip_stack.delay", "--target", target, "--dial", str(path)]
        process = self._begin("delay", argv)
        process.wait_until_listening()
        return process.address

    def _recorded(self, name: str, server: str) -> str:
        """The address of a recorder before a server."""
        config = self.workspace.recorder(f"recorder-{name}", server=server, tape=self.tape(name))
        process = self._begin(
            f"recorder-{name}", [sys.executable, "-m", "stip_stack.recording", "--config", str(config)]
        )
        process.wait_until_listening()
        return process.address

    def _begin(self, name: str, argv: Sequence[str]) -> Process:
        process = Process(name, argv, self.workspace.logs / f"{name}.jsonl", environment=self._environment)
        self.processes[name] = process
        return process
