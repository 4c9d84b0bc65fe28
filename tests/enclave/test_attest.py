"""The evidence that an enclave gives: over its own key and the caller's nonce, at a bounded rate."""

from __future__ import annotations

import os
import time
from typing import Any

import grpc.aio
import pytest

from stip_protocol import rpc
from stip_protocol.attestation import freshness, ratls
from stip_protocol.attestation.quote import SgxQuote
from stip_protocol.wire import enclave_pb2


@pytest.fixture
async def started(world: Any, developer: Any) -> Any:
    await world.start(developer.protected("llama", "hardened"))
    return world


async def test_the_certificate_and_the_fresh_evidence_bind_this_enclaves_key(started: Any) -> None:
    seen = ratls.read(started.identity.tls.certificate_pem, now=int(time.time()))
    nonce = os.urandom(32)
    reply = await started.stub.Attest(enclave_pb2.AttestRequest(nonce=nonce))
    report = freshness.check(reply.claims, nonce=nonce, tls_key=seen.spki_sha256)
    assert SgxQuote.parse(reply.quote).report_data == report


@pytest.mark.parametrize("nonce", [b"", bytes(31), bytes(33), bytes(64)])
async def test_nothing_but_a_nonce_is_quoted(started: Any, nonce: bytes) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await started.stub.Attest(enclave_pb2.AttestRequest(nonce=nonce))
    assert rpc.from_rpc(caught.value).code == "frame_invalid"


async def test_evidence_is_given_at_a_bounded_rate(world: Any, developer: Any) -> None:
    await world.start(developer.protected("llama", "hardened"), attests_per_second=0.001)
    request = enclave_pb2.AttestRequest(nonce=bytes(32))
    await world.stub.Attest(request)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.stub.Attest(request)
    refused = rpc.from_rpc(caught.value)
    assert refused.code == "overloaded"
    assert refused.retry_after == pytest.approx(1000, rel=0.1)
