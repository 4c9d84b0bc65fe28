"""The collateral client against a stand-in over real sockets: what it takes, and every way a source can misbehave."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stip_protocol.attestation import hosts, verifier
from stip_protocol.attestation.collateral import Collateral
from stip_protocol.attestation.evidence import Evidence
from stip_protocol.attestation.hostpolicy import HostPolicy
from stip_protocol.attestation.pccs import (
    INTEL_PCS,
    INTEL_ROOT_CA_CRL,
    Endpoint,
    PccsClient,
)
from stip_protocol.attestation.platforms import PlatformKind
from stip_protocol.attestation.policy import EvidencePolicy
from stip_protocol.attestation.quote import without_padding
from stip_protocol.attestation.roots import intel_sgx_root
from stip_protocol.errors import CollateralUnavailable, ConfigurationError, EvidenceMalformed, EvidenceRefused
from stip_stack.pccs import Answer, Fault, StandIn, serve
from stip_stack.pki import Authority
from stip_stack.tee import Faults, SimulatedPlatform

SGX = PlatformKind("sgx", b"STIPSM", "platform")
TDX = PlatformKind("tdx", b"STIPSM", "platform")
DAY = 24 * 3600


def simulated(platform: SimulatedPlatform, now: int, **faults: Any) -> dict[PlatformKind, bytes]:
    """Collateral of the simulated platform, issued now."""
    wrong = Faults(**faults)
    return {SGX: platform.collateral(now, faults=wrong), TDX: platform.collateral(now, faults=wrong, tee="TDX")}


@pytest.fixture
def stand_in(platform: SimulatedPlatform, now: int) -> Iterator[StandIn]:
    with serve(StandIn(simulated(platform, now))) as served:
        yield served


@pytest.fixture
def second(platform: SimulatedPlatform, now: int) -> Iterator[StandIn]:
    with serve(StandIn(simulated(platform, now))) as served:
        yield served


@pytest.fixture
def client(platform: SimulatedPlatform, now: int) -> Callable[..., PccsClient]:
    def build(*sources: StandIn, at: int = now, **options: Any) -> PccsClient:
        endpoints = [Endpoint(url=source.url) for source in sources]
        return PccsClient(endpoints, platform.root_der, clock=lambda: at, **options)

    return build


Build = Callable[..., PccsClient]


def test_enclaves_and_hosts_verify_with_what_a_source_serves(
    client: Build,
    stand_in: StandIn,
    platform: SimulatedPlatform,
    policy: Callable[..., EvidencePolicy],
    evidence: Callable[..., Evidence],
    report_data: bytes,
    now: int,
) -> None:
    quote = evidence().quote
    kind = PlatformKind.of_quote(quote, platform.root_der)
    assert kind == SGX
    fetched = Evidence(quote, client(stand_in).fetch(kind, seconds=5))
    assert verifier.verify(fetched, policy(), report_data=report_data, now=now).tcb_status == "UpToDate"

    host = platform.host_quote(bytes(48), report_data)
    assert PlatformKind.of_quote(host, platform.root_der) == TDX
    rules = HostPolicy.from_mapping(
        {
            "mode": "development",
            "measurements": [bytes(48).hex()],
            "simulated_root_sha256": platform.root_sha256.hex(),
        }
    )
    fetched = Evidence(host, client(stand_in).fetch(TDX, seconds=5))
    assert hosts.verify(fetched, rules, report_data=report_data, now=now).tcb_status == "UpToDate"
    assert stand_in.asked == [
        "/sgx/certification/v4/tcb?fmspc=53544950534D",
        "/sgx/certification/v4/qe/identity",
        "/sgx/certification/v4/pckcrl?ca=platform&encoding=der",
        "/sgx/certification/v4/rootcacrl",
        "/tdx/certification/v4/tcb?fmspc=53544950534D",
        "/tdx/certification/v4/qe/identity",
        "/sgx/certification/v4/pckcrl?ca=platform&encoding=der",
        "/sgx/certification/v4/rootcacrl",
    ]


def test_revocation_lists_in_hexadecimal_are_read_as_intels_pccs_writes_them(client: Build, stand_in: StandIn) -> None:
    plain = client(stand_in).fetch(SGX, seconds=5)
    stand_in.hexadecimal = True
    assert client(stand_in).fetch(SGX, seconds=5) == plain


def only(part: str, change: Callable[[Answer], Answer]) -> Fault:
    """A fault of the answers whose path ends with `part`."""
    return lambda path, answer: change(answer) if path.endswith(part) else answer


def body(change: Callable[[bytes], bytes]) -> Callable[[Answer], Answer]:
    return lambda answer: dataclasses.replace(answer, body=change(answer.body))


def header(name: str, value: str | None) -> Callable[[Answer], Answer]:
    def change(answer: Answer) -> Answer:
        kept = {key: text for key, text in answer.headers.items() if key.lower() != name.lower()}
        return dataclasses.replace(answer, headers=kept if value is None else kept | {name: value})

    return change


def status(code: int, **headers: str) -> Fault:
    return lambda _, answer: Answer(status=code, headers=headers)


PERMANENT: dict[str, tuple[Fault, str]] = {
    "not found": (status(404), "404: it does not know this platform"),
    "bad request": (status(400), "status 400"),
    "unauthorized": (status(401), "status 401"),
    "no content": (status(204), "status 204"),
    "a redirect to another host": (status(302, location="https://example.com/"), "redirect: to another host"),
    "a redirect to another port": (status(301, location="http://127.0.0.1:1/"), "redirect: to another host"),
    "a redirect to nowhere": (status(307), "redirect"),
    "redirects in a circle": (status(308, location="/"), "more than 2 redirects"),
    "an empty body": (only("tcb", body(lambda _: b"")), "body: empty"),
    "a body too large": (only("tcb", body(lambda data: data + b" " * 70_000)), "more than 65536 bytes"),
    "compressed": (only("tcb", header("content-encoding", "gzip")), "content encoding"),
    "not JSON": (only("tcb", body(lambda _: b"<html>")), "body: not"),
    "a list": (only("tcb", body(lambda _: b"[]")), "body: not"),
    "identity for TCB info": (only("tcb", body(lambda d: d.replace(b"tcbInfo", b"enclaveIdentity"))), "body: not"),
    "no signature": (only("identity", body(lambda data: data.split(b',"signature"')[0] + b"}")), "body: not"),
    "a member more": (only("tcb", body(lambda data: data[:-1] + b',"x":1}')), "body: not"),
    "not UTF-8": (only("tcb", body(lambda d: d.replace(b'"id":"SGX"', b'"id":"\xff\xff\xff"'))), "not UTF-8"),
    "another signature": (only("tcb", body(lambda d: d[:-130] + b"ab" * 64 + b'"}')), "signature"),
    "TCB info edited": (only("tcb", body(lambda d: d.replace(b'"tcbType":0', b'"tcbType":1'))), "TCB info signature"),
    "identity edited": (
        only("identity", body(lambda d: d.replace(b'"isvprodid":1', b'"isvprodid":2'))),
        "QE identity signature",
    ),
    "no chain of the TCB info": (only("tcb", header("TCB-Info-Issuer-Chain", None)), "no header TCB-Info"),
    "no chain of the identity": (
        only("identity", header("SGX-Enclave-Identity-Issuer-Chain", None)),
        "no header SGX-Enclave-Identity",
    ),
    "no chain of the CRL": (only("pckcrl", header("SGX-PCK-CRL-Issuer-Chain", None)), "no header SGX-PCK-CRL"),
    "a chain that is none": (only("tcb", header("TCB-Info-Issuer-Chain", "x")), "TCB info chain"),
    "an endless chain": (only("tcb", header("TCB-Info-Issuer-Chain", "x" * 20_000)), "header TCB-Info-Issuer-Chain"),
    "a chain not ASCII": (only("tcb", header("TCB-Info-Issuer-Chain", "%ff")), "ASCII"),
    "a CRL that is none": (only("pckcrl", body(lambda _: b"nothing")), "neither DER nor hexadecimal"),
    "a CRL of garbage": (only("rootcacrl", body(lambda _: b"\x30\x82garbage")), "root CRL"),
    "a CRL edited": (only("pckcrl", body(lambda data: data[:-1] + bytes([data[-1] ^ 1]))), "PCK CRL"),
}


@pytest.mark.parametrize("fault", PERMANENT)
def test_a_source_that_answers_wrongly_is_not_asked_again_and_the_next_one_is(
    client: Build, stand_in: StandIn, second: StandIn, fault: str
) -> None:
    stand_in.fault, told = PERMANENT[fault]
    with pytest.raises(CollateralUnavailable) as refused:
        client(stand_in).fetch(SGX, seconds=5)
    assert told in refused.value.message
    assert len([path for path in stand_in.asked if "/tcb?" in path]) <= 1
    assert Collateral.parse(client(stand_in, second).fetch(SGX, seconds=5))


TEMPORARY: dict[str, tuple[Fault, str]] = {
    "overloaded": (status(503), "status 503"),
    "too many requests": (status(429), "status 429"),
    "broken": (status(500), "status 500"),
    "cut off": (
        only("tcb", lambda answer: dataclasses.replace(answer, promised=len(answer.body) + 100)),
        "RemoteProtocolError",
    ),
    "slow": (only("tcb", lambda answer: dataclasses.replace(answer, delay=0.02)), "takes too long"),
    "silent": (only("tcb", lambda answer: dataclasses.replace(answer, delay=5.0)), "takes too long"),
}


@pytest.mark.parametrize("fault", TEMPORARY)
def test_a_source_that_fails_for_a_moment_is_asked_again_within_the_time(
    client: Build, stand_in: StandIn, second: StandIn, fault: str
) -> None:
    failing, told = TEMPORARY[fault]
    stand_in.fault = failing
    with pytest.raises(CollateralUnavailable, match=told):
        client(stand_in, request_seconds=0.2).fetch(SGX, seconds=0.5)
    assert Collateral.parse(client(stand_in, second, request_seconds=0.2).fetch(SGX, seconds=5))
    seen: list[str] = []

    def at_first(path: str, answer: Answer) -> Answer:
        seen.append(path)
        return answer if len(seen) > 1 else failing("/tcb", answer)

    stand_in.fault = at_first
    assert Collateral.parse(client(stand_in, request_seconds=0.5).fetch(SGX, seconds=10))


def test_a_source_that_asks_for_a_pause_longer_than_the_time_is_not_waited_for(
    client: Build, stand_in: StandIn
) -> None:
    stand_in.fault = status(429, **{"retry-after": "3600"})
    begun = time.monotonic()
    with pytest.raises(CollateralUnavailable, match="429"):
        client(stand_in).fetch(SGX, seconds=30)
    assert time.monotonic() - begun < 20  # far from an hour, and from the time it had
    assert len(stand_in.asked) == 1


def test_a_source_that_is_not_there_gives_its_turn_to_the_next(
    client: Build, stand_in: StandIn, platform: SimulatedPlatform, now: int
) -> None:
    gone = StandIn({}, url="http://127.0.0.1:1")
    assert Collateral.parse(client(gone, stand_in).fetch(SGX, seconds=5))
    with pytest.raises(CollateralUnavailable, match="connection: ConnectError"):
        client(gone).fetch(SGX, seconds=0.1)


def test_a_redirect_on_the_same_host_is_followed(client: Build, stand_in: StandIn) -> None:
    def moved(path: str, answer: Answer) -> Answer:
        query = stand_in.asked[-1].partition("?")[2]
        there = f"/old{path}?{query}"
        return (
            answer
            if "moved" in query or not path.endswith("/tcb")
            else Answer(status=302, headers={"location": f"{path}?{query}&moved=1#{there}"})
        )

    stand_in.fault = moved
    assert Collateral.parse(client(stand_in).fetch(SGX, seconds=5))


@pytest.mark.parametrize(
    ("made", "told"),
    [
        pytest.param({"tcb_info_version": 2}, "TCB info version", id="TCB info version 2"),
        pytest.param({"signer": "pck"}, "TCB info chain", id="signed by a PCK key"),
        pytest.param({"signer": "renamed"}, "common name", id="signed under another name"),
        pytest.param({"qe_identity_id": "TD_QE"}, "QE identity id", id="the identity of the other TEE"),
    ],
)
def test_collateral_that_is_not_in_order_is_not_taken(
    client: Build, stand_in: StandIn, platform: SimulatedPlatform, now: int, made: dict[str, Any], told: str
) -> None:
    stand_in.collateral = simulated(platform, now, **made)
    with pytest.raises(CollateralUnavailable, match=told):
        client(stand_in).fetch(SGX, seconds=5)


def test_collateral_out_of_its_dates_is_not_taken(client: Build, stand_in: StandIn, now: int) -> None:
    for moment in (now - 1, now + 30 * DAY):
        with pytest.raises(CollateralUnavailable, match=r"TCB info: got|root CRL: got"):
            client(stand_in, at=moment).fetch(SGX, seconds=5)


def test_collateral_under_another_root_is_not_taken(client: Build, stand_in: StandIn, tmp_path: Path, now: int) -> None:
    stand_in.collateral = simulated(SimulatedPlatform.create(tmp_path / "other", now=now), now)
    with pytest.raises(CollateralUnavailable, match="trust anchor"):
        client(stand_in).fetch(SGX, seconds=5)
    production = PccsClient([Endpoint(url=stand_in.url)], intel_sgx_root(), clock=lambda: now)
    with pytest.raises(CollateralUnavailable, match="trust anchor"):
        production.fetch(SGX, seconds=5)


def test_the_certificate_of_a_source_is_verified(
    platform: SimulatedPlatform, now: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority("a PCCS authority")
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    chain, key = authority.issue("pccs").write(tmp_path, "pccs")
    with serve(StandIn(simulated(platform, now)), certificate=(str(chain), str(key))) as source:
        trusting = Endpoint(url=source.url, ca=tmp_path / "ca.pem")
        client = PccsClient([trusting], platform.root_der, clock=lambda: now)
        assert Collateral.parse(client.fetch(SGX, seconds=5))
        # another authority is configured: the right one in the environment does not help
        (tmp_path / "other.pem").write_bytes(Authority("another authority").pem)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        other_ca = Endpoint(url=source.url, ca=tmp_path / "other.pem")
        strict = PccsClient([other_ca], platform.root_der, clock=lambda: now)
        with pytest.raises(CollateralUnavailable, match="TLS: the certificate is not trusted"):
            strict.fetch(SGX, seconds=5)
        monkeypatch.delenv("SSL_CERT_FILE")
        of_the_system = PccsClient([Endpoint(url=source.url)], platform.root_der, clock=lambda: now)
        with pytest.raises(CollateralUnavailable, match="TLS: the certificate is not trusted"):
            of_the_system.fetch(SGX, seconds=5)
        other = source.url.replace("127.0.0.1", "127.1")
        client = PccsClient([trusting.model_copy(update={"url": other})], platform.root_der, clock=lambda: now)
        with pytest.raises(CollateralUnavailable, match="TLS: the certificate is not trusted"):
            client.fetch(SGX, seconds=5)


def test_a_ca_file_that_cannot_be_used_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "bad.pem").write_text("nothing")
    for path in (tmp_path / "bad.pem", tmp_path / "none.pem"):
        with pytest.raises(ConfigurationError, match="collateral CA"):
            PccsClient([Endpoint(ca=path)], b"")
    with pytest.raises(ConfigurationError, match="endpoints"):
        PccsClient([], b"")


@pytest.mark.parametrize(
    "url",
    ["http://pccs.example", "ftp://pccs.example", "https://", "pccs", "https://user:secret@pccs", "https://p/?a=b",
     "https://p/#a", "https://p:99999"],
)  # fmt: skip
def test_an_endpoint_without_https_or_with_anything_secret_is_refused(url: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Endpoint(url=url)
    assert "secret" not in str(refused.value)


def test_intels_own_service_has_the_roots_list_where_its_certificate_says() -> None:
    assert Endpoint().root_crl_url == INTEL_ROOT_CA_CRL
    assert INTEL_ROOT_CA_CRL.encode() in intel_sgx_root()
    assert Endpoint(url=INTEL_PCS + "/").url == INTEL_PCS
    assert Endpoint(url="https://pccs:8081").root_crl_url == "https://pccs:8081/sgx/certification/v4/rootcacrl"


def test_a_quote_that_the_anchor_did_not_issue_names_no_platform(
    platform: SimulatedPlatform, evidence: Callable[..., Evidence], tmp_path: Path, now: int, report_data: bytes
) -> None:
    other = SimulatedPlatform.create(tmp_path / "other", now=now)
    for quote in (evidence().quote, platform.host_quote(bytes(48), report_data)):
        with pytest.raises(EvidenceRefused, match="another root"):
            PlatformKind.of_quote(quote, other.root_der)
        with pytest.raises(EvidenceMalformed):
            PlatformKind.of_quote(quote + b"\x00", platform.root_der)
    for name in ("", "sgx-00-platform", "sgx-00a067110000-other", "../sgx-00a067110000-platform"):
        with pytest.raises(EvidenceMalformed):
            PlatformKind.from_name(name)
    assert PlatformKind.from_name(str(SGX)) == SGX


@pytest.mark.dcap_vectors
@pytest.mark.parametrize(("tee", "moment"), [("sgx", 1_750_400_000), ("tdx", 1_750_400_000)])
def test_recorded_collateral_of_real_platforms_goes_through_client_and_verification(tee: str, moment: int) -> None:
    named = os.environ.get("STIP_DCAP_VECTORS")
    if not named:
        pytest.skip("STIP_DCAP_VECTORS is not set: NO REAL COLLATERAL WAS FETCHED in this run")
    quote = without_padding((Path(named) / f"{tee}_quote").read_bytes())
    recorded = (Path(named) / f"{tee}_quote_collateral.json").read_bytes()
    kind = PlatformKind.of_quote(quote, intel_sgx_root())
    assert str(kind) == {"sgx": "sgx-00a067110000-processor", "tdx": "tdx-b0c06f000000-platform"}[tee]
    with serve(StandIn({kind: recorded})) as source:
        client = PccsClient([Endpoint(url=source.url)], intel_sgx_root(), clock=lambda: moment)
        fetched = client.fetch(kind, seconds=5)
    theirs, ours = json.loads(recorded), json.loads(fetched)
    assert ours == theirs
    assert Collateral.parse(fetched).windows() == Collateral.parse(recorded).windows()
