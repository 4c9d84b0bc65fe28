"""What a client refuses, before or after it has verified: nothing of a prompt may reach the wrong place."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import stip
from stip.verification import SIMULATION_WARNING, STEPS
from stip_protocol.attestation import freshness, ratls
from stip_protocol.attestation.evidence import Evidence
from stip_protocol.attestation.quote import Attributes
from stip_protocol.errors import (
    ChannelChanged,
    CollateralExpired,
    ConfigurationError,
    DeadlineExceeded,
    DebugEnclaveRefused,
    EvidenceMalformed,
    EvidenceRefused,
    ManifestMismatch,
    MeasurementRefused,
    Overloaded,
    PolicyInvalid,
    ReportDataMismatch,
    SignatureInvalid,
    SimulatedEvidenceRefused,
    StipError,
    Unavailable,
)
from stip_stack.tee import Faults
from tests.client.impostor import Impostor

SECRET = "a zebra crosses the river at midnight"
MEASUREMENT = bytes(range(32))
DAY = 24 * 3600


async def refused(path: Path, kind: type[StipError], failed: str) -> None:
    """`aconnect` raises `kind`, and the document fails at the step `failed` and skips what it did not reach."""
    with pytest.raises(kind):
        await stip.aconnect(path)
    document = await stip.averify(path)
    assert not document.verified
    assert type(document.refusal) is kind
    states = {step.name: step.status.value for step in document.steps}
    assert tuple(states) == STEPS
    assert next(name for name, state in states.items() if state == "failed") == failed
    assert states["same enclave"] != "passed"
    found = next(step for step in document.steps if step.status == "failed")
    assert found.got
    assert found.remedy


async def test_a_genuine_enclave_passes_every_step_and_the_document_says_so(
    profile: Any, enclave: Any, capsys: pytest.CaptureFixture[str]
):
    document = await stip.averify(profile)
    assert document.verified
    assert [step.name for step in document.steps] == list(STEPS)
    assert {step.status.value for step in document.steps} == {"passed"}
    told = json.loads(document.to_json())
    assert told["verified"] is True
    assert told["measurement"] == MEASUREMENT.hex()
    assert told["enclave_key"] == enclave.identity.spki_sha256.hex()
    assert told["refusal"] is None
    assert set(told["steps"][0]) == {"name", "status", "expected", "got", "remedy"}


async def test_simulation_is_told_loudly_on_stderr_and_in_the_document(
    profile: Any, capsys: pytest.CaptureFixture[str]
):
    async with await stip.aconnect(profile) as connection:
        assert connection.verification.simulated is True
        assert connection.verification.summary()["warning"] == SIMULATION_WARNING
    assert SIMULATION_WARNING in capsys.readouterr().err


async def test_a_simulated_enclave_is_refused_in_production(enclave: Any, make_profile: Callable[..., Path]):
    path = make_profile(
        enclave.port,
        policy={"mode": "production", "simulated_root_sha256": None},
        mode="production",
        simulated_root=None,
    )
    await refused(path, SimulatedEvidenceRefused, "certificate evidence: trust anchor")
    assert enclave.opens == []


async def test_a_simulated_enclave_is_refused_in_development_without_its_root(
    enclave: Any, make_profile: Callable[..., Path]
):
    path = make_profile(enclave.port, policy={"simulated_root_sha256": None}, simulated_root=None)
    await refused(path, SimulatedEvidenceRefused, "certificate evidence: trust anchor")


async def test_no_environment_variable_loosens_a_profile(
    enclave: Any, make_profile: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    root = str(make_profile(enclave.port).parent / "root.der")
    for name in ("MODE", "SIMULATED", "SIMULATED_ROOT", "DEV", "DEVELOPMENT", "INSECURE", "PROFILE_MODE"):
        for prefix in ("STIP_", "", "stip_"):
            monkeypatch.setenv(prefix + name, root if "ROOT" in name else "development")
    monkeypatch.setenv("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", root)
    monkeypatch.setenv("SSL_CERT_FILE", root)
    path = make_profile(
        enclave.port,
        policy={"mode": "production", "simulated_root_sha256": None},
        mode="production",
        simulated_root=None,
    )
    with pytest.raises(SimulatedEvidenceRefused):
        await stip.aconnect(path)


@pytest.mark.parametrize(
    ("changes", "policy", "kind"),
    [
        ({"mode": "production"}, {}, ConfigurationError),
        ({"mode": "production", "simulated_root": None}, {}, PolicyInvalid),
        ({}, {"mode": "production", "simulated_root_sha256": None}, PolicyInvalid),
        ({"simulated_root": None}, {}, ConfigurationError),
        ({}, {"simulated_root_sha256": None}, ConfigurationError),
        ({}, {"simulated_root_sha256": "ab" * 32}, ConfigurationError),
        ({}, {"audience": "keyservice"}, PolicyInvalid),
        ({}, {"measurements": []}, PolicyInvalid),
        ({"mode": "simulated"}, {}, ConfigurationError),
        ({"unknown": 1}, {}, ConfigurationError),
        ({"instance": "short"}, {}, ConfigurationError),
        ({"enclave": "no port"}, {}, ConfigurationError),
        ({"developer_key": "user.pem"}, {}, ConfigurationError),
        ({"developer_key": "missing.pub"}, {}, ConfigurationError),
        ({"user_key": "developer.pub"}, {}, ConfigurationError),
        ({"delegation_seconds": 10**6}, {}, ConfigurationError),
    ],
    ids=str,
)
async def test_a_profile_that_contradicts_itself_is_a_configuration_error(
    make_profile: Callable[..., Path], changes: Any, policy: Any, kind: Any
):
    with pytest.raises(kind):
        await stip.aconnect(make_profile(1, policy=policy, **changes))


async def test_another_measurement_is_refused(enclave: Any, make_profile: Callable[..., Path]):
    path = make_profile(enclave.port, policy={"measurements": ["ab" * 32]})
    await refused(path, MeasurementRefused, "certificate evidence: measurement")


async def test_a_debug_enclave_is_refused(platform: Any, start_enclave: Any, make_profile: Callable[..., Path]):
    faults = Faults(attributes=Attributes.INIT | Attributes.MODE64 | Attributes.DEBUG)
    enclave = start_enclave(platform.provider(MEASUREMENT, faults=faults))
    await refused(make_profile(enclave.port), DebugEnclaveRefused, "certificate evidence: debug")


async def test_an_out_of_date_platform_is_refused(platform: Any, start_enclave: Any, make_profile: Callable[..., Path]):
    enclave = start_enclave(platform.provider(MEASUREMENT, faults=Faults(tcb_status="OutOfDate")))
    await refused(make_profile(enclave.port), EvidenceRefused, "certificate evidence: TCB status")


async def test_expired_collateral_is_refused(platform: Any, start_enclave: Any, make_profile: Callable[..., Path]):
    enclave = start_enclave(platform.provider(MEASUREMENT))
    stale = platform.collateral(int(time.time()) - 400 * DAY)

    def answer(nonce: bytes) -> freshness.Answer:
        found = enclave.attested(nonce)
        return freshness.Answer(found.claims, Evidence(found.evidence.quote, stale))

    enclave.answer = answer
    await refused(make_profile(enclave.port), CollateralExpired, "certificate evidence: dates")


async def test_evidence_over_an_older_nonce_is_refused(enclave: Any, make_profile: Callable[..., Path]):
    old = enclave.attested(bytes(32))
    enclave.answer = lambda nonce: old
    await refused(make_profile(enclave.port), ReportDataMismatch, "freshness")


async def test_evidence_relayed_from_another_enclave_is_refused(
    enclave: Any, start_enclave: Any, make_profile: Callable[..., Path]
):
    other = start_enclave()
    enclave.answer = other.attested
    await refused(make_profile(enclave.port), ReportDataMismatch, "freshness")


async def test_a_quote_that_does_not_bind_its_claims_is_refused(enclave: Any, make_profile: Callable[..., Path]):
    def answer(nonce: bytes) -> freshness.Answer:
        fresh, other = enclave.attested(nonce), enclave.attested(bytes(32))
        return freshness.Answer(fresh.claims, other.evidence)

    enclave.answer = answer
    await refused(make_profile(enclave.port), ReportDataMismatch, "fresh evidence: report data")


async def test_two_accepted_measurements_on_one_channel_are_refused(
    platform: Any, start_enclave: Any, make_profile: Callable[..., Path]
):
    other = bytes(reversed(MEASUREMENT))
    enclave = start_enclave(platform.provider(MEASUREMENT), certificate_provider=platform.provider(other))
    path = make_profile(enclave.port, policy={"measurements": [MEASUREMENT.hex(), other.hex()]})
    await refused(path, MeasurementRefused, "same enclave")


@pytest.mark.parametrize("field", ["claims", "quote", "collateral"])
async def test_garbage_for_evidence_is_refused(enclave: Any, make_profile: Callable[..., Path], field: str):
    class Answer:
        def __init__(self, nonce: bytes) -> None:
            found = enclave.attested(nonce)
            self.claims = b"garbage" if field == "claims" else found.claims
            self.evidence = self
            self.quote = b"garbage" if field == "quote" else found.evidence.quote
            self.collateral = b"" if field == "collateral" else found.evidence.collateral

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(name)

    enclave.answer = Answer
    failed = {
        "claims": "freshness",
        "quote": "fresh evidence: form",
        "collateral": "certificate evidence: form",
    }[field]
    await refused(make_profile(enclave.port), EvidenceMalformed, failed)


async def test_a_certificate_without_evidence_is_refused(
    make_profile: Callable[..., Path], platform: Any, tmp_path: Path
):
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "enclave.test")])
    now = datetime.now(tz=UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=1))
        .not_valid_after(now + timedelta(hours=1))
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(Encoding.PEM)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with contextlib.closing(Impostor(ratls.Identity(pem, private, bytes(32)), tmp_path)) as server:
        await refused(make_profile(server.port), EvidenceMalformed, "certificate")
        assert server.heard == b""


async def test_a_certificate_for_another_name_is_refused(enclave: Any, make_profile: Callable[..., Path]):
    await refused(make_profile(enclave.port, server_name="other.test"), EvidenceRefused, "certificate")


async def test_a_tampered_tokenizer_file_is_refused(
    enclave: Any, make_profile: Callable[..., Path], client_folder: Path
):
    path = client_folder / "tokenizer_config.json"
    path.write_bytes(path.read_bytes().replace(b"512", b"513"))
    await refused(make_profile(enclave.port), ManifestMismatch, "client manifest")
    assert enclave.nonces == []


async def test_an_unlisted_tokenizer_file_is_refused(
    enclave: Any, make_profile: Callable[..., Path], client_folder: Path
):
    (client_folder / "chat_template.jinja").write_text("{{ messages }}")
    await refused(make_profile(enclave.port), ManifestMismatch, "client manifest")


async def test_a_client_manifest_of_another_developer_is_refused(
    enclave: Any, make_profile: Callable[..., Path], client_folder: Path
):
    path = client_folder / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"epoch": 0', b'"epoch": 1'))
    await refused(make_profile(enclave.port), SignatureInvalid, "client manifest")


async def test_a_client_manifest_of_another_instance_is_refused(
    enclave: Any, make_profile: Callable[..., Path], client_folder: Path, resign: Callable[..., None]
):
    resign(client_folder, instance="ab" * 16)
    await refused(make_profile(enclave.port), ManifestMismatch, "client manifest")


async def test_a_certificate_swapped_before_the_challenge_is_refused(
    enclave: Any, impostor: Any, switch: Any, make_profile: Callable[..., Path]
):
    path = make_profile(switch(enclave.port, impostor.port).port)
    with pytest.raises(ChannelChanged):
        await stip.aconnect(path)
    assert impostor.offered > 0
    assert impostor.heard == b""


async def test_after_a_swap_a_new_session_is_refused_and_the_impostor_hears_nothing(
    enclave: Any, impostor: Any, switch: Any, make_profile: Callable[..., Path]
):
    way = switch(enclave.port)
    async with await stip.aconnect(make_profile(way.port)) as connection:
        way.targets = [impostor.port]
        way.drop()
        with pytest.raises(ChannelChanged):
            await connection.session()
        with pytest.raises(ChannelChanged):
            await connection.session()
        assert connection.examined.refusal.code == "channel_changed"
    assert impostor.offered > 0
    assert impostor.heard == b""
    assert enclave.turns == []


async def test_after_a_swap_a_running_session_sends_no_prompt_byte(
    enclave: Any, impostor: Any, switch: Any, make_profile: Callable[..., Path]
):
    way = switch(enclave.port)
    async with await stip.aconnect(make_profile(way.port)) as connection, await connection.session() as session:
        way.targets = [impostor.port]
        way.drop()
        for _ in range(3):
            with pytest.raises(ChannelChanged):
                async for _ in session.generate(SECRET):
                    pass
    assert impostor.offered > 0
    assert impostor.heard == b""
    assert enclave.turns == []


async def test_a_swap_in_the_middle_of_an_answer_ends_it_and_nothing_is_repeated(
    enclave: Any, impostor: Any, switch: Any, make_profile: Callable[..., Path]
):
    enclave.hold_after = 2
    way = switch(enclave.port)
    async with await stip.aconnect(make_profile(way.port)) as connection, await connection.session() as session:
        chunks = session.generate(SECRET)
        await anext(chunks)
        way.targets = [impostor.port]
        way.drop()
        with pytest.raises(ChannelChanged):
            async for _ in chunks:
                pass
    assert impostor.heard == b""
    assert len(enclave.turns) == 1


async def test_a_lost_connection_to_the_same_enclave_is_verified_again(
    enclave: Any, switch: Any, make_profile: Callable[..., Path]
):
    way = switch(enclave.port)
    async with await stip.aconnect(make_profile(way.port)) as connection:
        async with await connection.session():
            pass
        assert len(enclave.nonces) == 1
        way.drop()
        await lost(connection)
        async with await connection.session() as session:
            assert [chunk async for chunk in session.generate("again")]
    assert len(set(enclave.nonces)) == 2


async def test_a_connection_can_be_verified_again_at_will(enclave: Any, profile: Any):
    async with await stip.aconnect(profile) as connection:
        assert (await connection.verify()).verified
        old = enclave.attested(bytes(32))
        enclave.answer = lambda nonce: old
        with pytest.raises(ReportDataMismatch):
            await connection.verify()
        with pytest.raises(ReportDataMismatch):
            await connection.session()
    assert len(enclave.nonces) == 3


async def test_a_refusal_ends_the_sessions_that_are_open_before_another_prompt_leaves(enclave: Any, profile: Any):
    async with await stip.aconnect(profile) as connection, await connection.session() as session:
        old = enclave.attested(bytes(32))
        enclave.answer = lambda nonce: old
        with pytest.raises(ReportDataMismatch):
            await connection.verify()
        for ask in (lambda: session.generate(SECRET), lambda: session.generate(SECRET)):
            with pytest.raises(ReportDataMismatch):
                async for _ in ask():
                    pass
    assert enclave.turns == []


async def test_a_delegation_near_its_end_is_renewed_after_a_new_verification(
    enclave: Any, profile: Any, monkeypatch: pytest.MonkeyPatch
):
    async with await stip.aconnect(profile) as connection:
        async with await connection.session():
            pass
        later = time.time() + 3000
        monkeypatch.setattr("stip.connection.time.time", lambda: later)
        async with await connection.session():
            pass
    assert len(enclave.nonces) == 2
    assert len({opened.delegation for opened in enclave.opens}) == 2


async def test_connecting_is_retried_twice_where_the_enclave_says_retry(enclave: Any, profile: Any):
    enclave.challenges_fail = [Overloaded("busy"), Overloaded("busy")]
    async with await stip.aconnect(profile):
        pass
    assert len(enclave.nonces) == 3


async def test_an_address_where_nobody_listens_is_unavailable(make_profile: Callable[..., Path], impostor: Any):
    impostor.close()
    with pytest.raises(Unavailable):
        await stip.aconnect(make_profile(impostor.port), timeout=5)


async def test_an_enclave_that_never_finishes_its_handshake_is_given_up_in_time(make_profile: Callable[..., Path]):
    silent = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    path = make_profile(silent.sockets[0].getsockname()[1])
    with pytest.raises(DeadlineExceeded):
        await stip.aconnect(path, timeout=0.3)
    silent.close()


async def test_no_error_quotes_a_prompt_or_an_id(enclave: Any, profile: Any, tokenizer: Any):
    enclave.hold_after = 1
    texts: list[str] = []
    async with await stip.aconnect(profile) as connection, await connection.session() as session:
        marked = [*tokenizer.encode(SECRET, special=False), 987654321]
        attempts: list[Callable[[], Any]] = [
            lambda: session.generate(marked),
            lambda: session.generate(SECRET, timeout=0.1),
            lambda: session.generate(SECRET, stop_ids=[987654321]),
            lambda: session.generate(SECRET * 1000),
            lambda: session.chat([{"role": SECRET}]),
        ]
        for attempt in attempts:
            try:
                async for _ in attempt():
                    pass
            except StipError as error:
                texts += [str(error), repr(error), *traceback.format_exception_only(error)]
    assert len(texts) >= 3 * len(attempts)
    assert not any("zebra" in text or "987654321" in text for text in texts)


async def lost(connection: stip.AsyncConnection) -> None:
    """Until the channel has noticed that its connection is gone."""
    channel = connection._enclave.channel
    async with asyncio.timeout(10):
        while channel.continuous:  # noqa: ASYNC110  # the flag is what the promise is about
            await asyncio.sleep(0.01)
