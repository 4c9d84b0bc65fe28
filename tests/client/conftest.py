"""A scripted enclave behind a real TLS socket, a switch to move its address elsewhere, and a recording impostor."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from stip import keys
from stip.profile import Profile
from stip.tokenizer import Tokenizer
from stip_protocol import rpc
from stip_protocol.attestation import freshness, ratls
from stip_protocol.errors import StipError
from stip_protocol.manifest import ClientManifest, file_digest
from stip_protocol.wire import enclave_pb2, enclave_pb2_grpc
from stip_stack.tee import SimulatedPlatform
from tests.client.impostor import Impostor

DEMO_MODEL = Path(__file__).parents[2] / "stack" / "demo_model"
MEASUREMENT = bytes(range(32))
INSTANCE = "00112233445566778899aabbccddeeff"
SERVER_NAME = "enclave.test"
VOCABULARY = 2048
POSITIONS = 256
STOP_ID = 1


class ScriptedEnclave(enclave_pb2_grpc.EnclaveServicer):
    """Speaks the real protocol with real evidence; says what its script says, and records what it hears."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, provider: Any, *, answers: list[list[int]], certificate_provider: Any
    ) -> None:
        self._loop = loop
        self.provider = provider
        self.identity = ratls.issue(
            certificate_provider or provider, dns_name=SERVER_NAME, lifetime=3600, now=int(time.time())
        )
        self.answers = answers
        self.hold_after: int | None = None
        """Tokens of an answer after which the enclave waits to be cancelled."""
        self.deaf = False
        """Ignores Cancel."""
        self.opens_fail: list[StipError] = []
        self.challenges_fail: list[StipError] = []
        self.turn_fails: tuple[str, str] | None = None
        self.turn_retry_ms = 0
        self.answer: Callable[[bytes], freshness.Answer] = self.attested
        self.opened: dict[str, Any] = {}
        self.steps: Callable[[list[int]], list[enclave_pb2.Step]] | None = None
        self.opens: list[enclave_pb2.Open] = []
        self.turns: list[enclave_pb2.Turn] = []
        self.nonces: list[bytes] = []
        self.request_ids: list[str] = []
        self.port = 0
        self._server: Any = None

    def attested(self, nonce: bytes) -> freshness.Answer:
        return freshness.answer(self.provider, nonce, self.identity.spki_sha256)

    async def Attest(self, request: Any, context: Any) -> enclave_pb2.AttestReply:  # noqa: N802
        self.nonces.append(request.nonce)
        if self.challenges_fail:
            raise self.challenges_fail.pop(0)
        found = self.answer(request.nonce)
        return enclave_pb2.AttestReply(
            claims=found.claims, quote=found.evidence.quote, collateral=found.evidence.collateral
        )

    async def Session(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:  # noqa: N802
        self.request_ids.append(dict(context.invocation_metadata())[rpc.REQUEST_ID_KEY])
        frames: asyncio.Queue[Any] = asyncio.Queue()

        async def read() -> None:
            async for frame in requests:
                frames.put_nowait(frame)
            frames.put_nowait(None)

        reader = asyncio.create_task(read())
        try:
            self.opens.append((await frames.get()).open)
            if self.opens_fail:
                raise self.opens_fail.pop(0)
            told = {"vocabulary": VOCABULARY, "max_positions": POSITIONS, "preset": "hardened", "simulated": True}
            yield enclave_pb2.EnclaveFrame(opened=enclave_pb2.Opened(**told | self.opened))
            position = 0
            while (frame := await frames.get()) is not None:
                if frame.WhichOneof("body") != "turn":
                    continue  # a Cancel that came too late
                self.turns.append(frame.turn)
                if self.turn_fails is not None:
                    code, message = self.turn_fails
                    failed = enclave_pb2.Failed(code=code, message=message, retry_after_ms=self.turn_retry_ms)
                    yield enclave_pb2.EnclaveFrame(failed=failed)
                    return
                position += len(frame.turn.ids) // 4
                async for step in self._turn(frame.turn, frames, position):
                    position = step.position
                    yield enclave_pb2.EnclaveFrame(step=step)
        finally:
            reader.cancel()

    async def _turn(self, turn: Any, frames: Any, position: int) -> AsyncIterator[Any]:
        if self.steps is not None:
            for step in self.steps(unpack(turn.ids)):
                yield step
            return
        answer = self.answers[(len(self.turns) - 1) % len(self.answers)]
        for count, id_ in enumerate(answer):
            if count == self.hold_after:
                if self.deaf:
                    await asyncio.Event().wait()
                assert (await frames.get()).WhichOneof("body") == "cancel"
                yield enclave_pb2.Step(id=0, kind=3, position=position)
                return
            if count == turn.sampling.max_tokens:
                yield enclave_pb2.Step(id=0, kind=2, position=position)
                return
            if id_ in unpack(turn.sampling.stop_ids):
                yield enclave_pb2.Step(id=0, kind=1, position=position)
                return
            position += 1
            yield enclave_pb2.Step(id=id_, kind=0, position=position)
        yield enclave_pb2.Step(id=0, kind=2, position=position)

    def start(self) -> None:
        async def serve() -> None:
            self._server = grpc.aio.server(
                interceptors=[rpc.ErrorInterceptor(lambda error: None)], options=rpc.SERVER_OPTIONS
            )
            enclave_pb2_grpc.add_EnclaveServicer_to_server(self, self._server)
            credentials = rpc.server_credentials(
                self.identity.certificate_pem, self.identity.private_key_pem, client_ca=None
            )
            self.port = self._server.add_secure_port("127.0.0.1:0", credentials)
            await self._server.start()

        asyncio.run_coroutine_threadsafe(serve(), self._loop).result(10)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._server.stop(None), self._loop).result(10)


def unpack(data: bytes) -> list[int]:
    return [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]


class Switch:
    """A TCP forwarder with a fixed address, whose target can change and whose connections can be dropped."""

    def __init__(self, *targets: int) -> None:
        self.targets = list(targets)
        """Ports for the next connections; the last one stays."""
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                port = self.targets.pop(0) if len(self.targets) > 1 else self.targets[0]
                try:
                    far = socket.create_connection(("127.0.0.1", port))
                except OSError:
                    near.close()
                    continue
                self._pairs.append((near, far))
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def drop(self) -> None:
        for pair in self._pairs:
            for one in pair:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                one.close()
        self._pairs.clear()

    def close(self) -> None:
        self._listener.close()
        self.drop()


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory) -> SimulatedPlatform:
    return SimulatedPlatform.create(tmp_path_factory.mktemp("platform") / "tee")


@pytest.fixture(scope="session")
def developer() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


@pytest.fixture
def client_folder(tmp_path: Path, developer: Ed25519PrivateKey) -> Path:
    """The signed client part of an instance with the demo model's tokenizer."""
    folder = tmp_path / "client"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, folder / name)
    sign_client_part(folder, developer)
    return folder


def sign_client_part(folder: Path, developer: Ed25519PrivateKey, **changes: Any) -> None:
    names = sorted({path.name for path in folder.iterdir()} - {"manifest.json", "manifest.json.sig"})
    fields: dict[str, Any] = {
        "instance": INSTANCE,
        "epoch": 0,
        "vocabulary": VOCABULARY,
        "max_positions": POSITIONS,
        "stop_ids": (STOP_ID,),
        "files": {name: file_digest(folder / name) for name in names},
    }
    ClientManifest(**fields | changes).write(folder / "manifest.json", developer)


@pytest.fixture
def resign(developer: Ed25519PrivateKey) -> Callable[..., None]:
    return lambda folder, **changes: sign_client_part(folder, developer, **changes)


@pytest.fixture
def tokenizer(client_folder: Path, developer: Ed25519PrivateKey) -> Tokenizer:
    return Tokenizer.open(client_folder, developer.public_key(), instance=INSTANCE)


@pytest.fixture
def make_profile(
    tmp_path: Path, client_folder: Path, developer: Ed25519PrivateKey, platform: SimulatedPlatform
) -> Callable[..., Path]:
    """Writes a profile with its files; development mode unless told otherwise. Returns its path."""
    keys.create(tmp_path / "user.pem")
    (tmp_path / "developer.pub").write_bytes(
        developer.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    (tmp_path / "root.der").write_bytes(platform.root_der)

    def toml(values: dict[str, Any]) -> str:
        return "".join(f"{key} = {value!r}\n" for key, value in values.items() if value is not None)

    def write(port: int, *, policy: dict[str, Any] | None = None, **changes: Any) -> Path:
        rules = {
            "mode": "development",
            "measurements": [MEASUREMENT.hex()],
            "simulated_root_sha256": platform.root_sha256.hex(),
        }
        (tmp_path / "policy.toml").write_text(toml(rules | (policy or {})))
        fields = {
            "enclave": f"127.0.0.1:{port}",
            "server_name": SERVER_NAME,
            "instance": INSTANCE,
            "tokenizer": "client",
            "developer_key": "developer.pub",
            "user_key": "user.pem",
            "policy": "policy.toml",
            "mode": "development",
            "simulated_root": "root.der",
        }
        path = tmp_path / "profile.toml"
        path.write_text(toml(fields | changes))
        return path

    return write


@pytest.fixture(scope="session")
def serving_loop() -> asyncio.AbstractEventLoop:
    """Servers live on a loop of their own, so that synchronous clients can be tried against them."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


@pytest.fixture
def start_enclave(
    platform: SimulatedPlatform, tokenizer: Tokenizer, serving_loop: asyncio.AbstractEventLoop
) -> Iterator[Callable[..., ScriptedEnclave]]:
    """Starts scripted enclaves; the default script is one sentence and a stop id."""
    running: list[ScriptedEnclave] = []

    def start(provider: Any = None, **options: Any) -> ScriptedEnclave:
        said = tokenizer.encode(" And the light was good, and the waters were calm.", special=False)
        options = {"answers": [[*said, STOP_ID]], "certificate_provider": None} | options
        enclave = ScriptedEnclave(serving_loop, provider or platform.provider(MEASUREMENT), **options)
        enclave.start()
        running.append(enclave)
        return enclave

    yield start
    for enclave in running:
        enclave.stop()


@pytest.fixture
def enclave(start_enclave: Callable[..., ScriptedEnclave]) -> ScriptedEnclave:
    return start_enclave()


@pytest.fixture
def profile(enclave: ScriptedEnclave, make_profile: Callable[..., Path]) -> Profile:
    return Profile.load(make_profile(enclave.port))


@pytest.fixture
def switch() -> Iterator[Callable[..., Switch]]:
    made: list[Switch] = []

    def make(*targets: int) -> Switch:
        made.append(Switch(*targets))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def impostor(platform: SimulatedPlatform, tmp_path: Path) -> Iterator[Impostor]:
    """Even with genuine evidence for its own key: it is not the enclave that was verified."""
    provider = platform.provider(MEASUREMENT)
    found = Impostor(ratls.issue(provider, dns_name=SERVER_NAME, lifetime=3600, now=int(time.time())), tmp_path)
    yield found
    found.close()
