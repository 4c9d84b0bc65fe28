"""The load generator: streams of releases, one after the other in each, every bundle opened and checked.

What a release takes is the time of its two calls, the challenge and the release, as the enclave sees them. Writing the
quote between the two is the enclave's work and is left out; it happens on the generator's core.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from benchmarks.releases.place import MEASUREMENT, Customer, Place, Service
from stip_protocol import rpc
from stip_protocol.documents import Signed
from stip_protocol.release import Bundle, Claims, Delegation, report_data, unseal
from stip_protocol.wire import keyservice_pb2, keyservice_pb2_grpc

WARM_SECONDS = 1.0


@dataclass(frozen=True)
class Round:
    """What one round measured."""

    seconds: float
    releases: int
    latencies: tuple[float, ...]
    cpu_seconds: float
    """Of the service."""

    @property
    def per_second(self) -> float:
        return self.releases / self.seconds

    @property
    def cpu_per_release(self) -> float:
        return self.cpu_seconds / self.releases

    @property
    def per_core_second(self) -> float:
        """What a core would do that the service had for itself: releases by its own CPU time."""
        return self.releases / self.cpu_seconds

    def quantile(self, share: float) -> float:
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Enclave:
    """One enclave's keys: fresh claims for every release, as a new session has them."""

    def __init__(self, place: Place) -> None:
        self._provider = place.platform.provider(MEASUREMENT)
        self._collateral = self._provider.collateral()
        self._tls_key = secrets.token_bytes(32)
        link = ec.generate_private_key(ec.SECP256R1()).public_key()
        self._link = link.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self._hpke = X25519PrivateKey.generate()

    async def release(self, stub: Any, place: Place, customer: Customer) -> float:
        """One whole release; returns the seconds of its two calls."""
        delegation = self._delegation(customer)
        began = time.perf_counter()
        challenge = await stub.Challenge(keyservice_pb2.ChallengeRequest())
        challenged = time.perf_counter()
        claims = Claims(
            nonce=challenge.nonce,
            hpke_key=self._hpke.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw),
            tls_key=self._tls_key,
            link_key=self._link,
            service=challenge.service,
            delegation=hashlib.sha256(delegation).digest(),
            kind="bundle",
            instance=customer.instance,
            tokens=1,
        ).to_bytes()
        request = keyservice_pb2.ReleaseRequest(
            claims=claims,
            quote=self._provider.quote(report_data(claims)),
            collateral=self._collateral,
            delegation=delegation,
        )
        asked = time.perf_counter()
        reply = await stub.Release(request)
        ended = time.perf_counter()
        bundle = unseal(reply.sealed, reply.signature, claims, self._hpke, place.home.service.public_key())
        assert isinstance(bundle, Bundle)
        assert bundle.instance == customer.instance
        return challenged - began + ended - asked

    def _delegation(self, customer: Customer) -> bytes:
        delegation = Delegation(
            user=customer.public,
            enclave_key=self._tls_key,
            measurement=MEASUREMENT,
            instance=customer.instance,
            nonce=secrets.token_bytes(32),
            expires=int(time.time()) + 600,
        )
        return Signed.sign(delegation, customer.key).to_bytes()


async def run(place: Place, service: Service, *, streams: int, seconds: float) -> Round:
    """One round: `streams` enclaves that ask as fast as they are answered."""
    customers = itertools.cycle(place.customers)
    async with rpc.channel(service.address, roots=place.home.tls_ca.pem, server_name="localhost") as channel:
        stub = keyservice_pb2_grpc.KeyServiceStub(channel)
        enclaves = [Enclave(place) for _ in range(streams)]
        await _drive(stub, place, enclaves, customers, WARM_SECONDS)
        cpu, began = service.cpu_seconds(), time.perf_counter()
        latencies = await _drive(stub, place, enclaves, customers, seconds)
        return Round(time.perf_counter() - began, len(latencies), tuple(latencies), service.cpu_seconds() - cpu)


async def _drive(
    stub: Any, place: Place, enclaves: list[Enclave], customers: Iterator[Customer], seconds: float
) -> list[float]:
    ends = time.perf_counter() + seconds

    async def stream(enclave: Enclave) -> list[float]:
        taken = []
        while time.perf_counter() < ends:
            taken.append(await enclave.release(stub, place, next(customers)))
        return taken

    done = await asyncio.gather(*(stream(enclave) for enclave in enclaves))
    return [each for taken in done for each in taken]
