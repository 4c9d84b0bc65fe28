"""Rate limits by peer: a token bucket each, as the generic cell rate algorithm (ITU-T I.371, annex A).

A peer is an IPv4 address or an IPv6 /64 (RFC 6177: what one site has at least). The table of peers is bounded, and
forgetting somebody must not be a way to be let in again: only buckets that are full are forgotten, which changes
nothing for their owners. Where there is no room, newcomers share one bucket.

Behind one address there may be many, and one who floods must not starve a lease that runs: a renewal that its peer's
bucket refuses is admitted by a bucket of its lease's own, where it is signed by that lease's link key.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Literal
from urllib.parse import unquote

from cryptography.hazmat.primitives.asymmetric import ec

from stip_keyservice.service.config import Rate, Rates
from stip_keyservice.service.linkca import read_link_key
from stip_protocol.errors import Overloaded, StipError
from stip_protocol.release import HEARTBEAT_LIMIT, SIGNATURE_LIMIT, Heartbeat, open_heartbeat

Kind = Literal["challenge", "release", "renewal", "watch"]
KINDS: tuple[Kind, ...] = ("challenge", "release", "renewal", "watch")
_NEWCOMERS = object()
LEASES_KEPT = 65_536


def peer_name(address: str) -> str:
    """Who a gRPC peer string ("ipv4:…:port", "ipv6:[…]:port", percent-encoded; gRPC "Naming") is to the limits."""
    scheme, _, rest = unquote(address).partition(":")
    host = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return "local" if scheme == "unix" else "unknown"
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)


class Buckets:
    """Token buckets of one rate, by key. Safe from any thread."""

    def __init__(self, rate: Rate, *, keys: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval, self._tolerance = 1 / rate.per_second, (rate.burst - 1) / rate.per_second
        self._keys, self._clock = keys, clock
        self._lock = threading.Lock()
        self._full_at: OrderedDict[Hashable, float] = OrderedDict()
        """When each bucket is full again, the one used longest ago first."""

    def take(self, key: Hashable) -> float:
        """Take one token: 0, or the seconds after which there is one."""
        with self._lock:
            now = self._clock()
            if key not in self._full_at and not self._room(now):
                key = _NEWCOMERS
            full_at = max(self._full_at.get(key, now), now)
            wait = full_at - now - self._tolerance
            if wait > 0:
                return wait
            self._full_at[key] = full_at + self._interval
            self._full_at.move_to_end(key)
            return 0.0

    def _room(self, now: float) -> bool:
        """Forget what is full and was used longest ago: whatever was not used for long enough is full."""
        while self._full_at and next(iter(self._full_at.values())) <= now:
            self._full_at.popitem(last=False)
        return len(self._full_at) < self._keys


class LinkKeys:
    """Link keys of leases that were signed here, by handle; the latest ones. Safe from any thread."""

    def __init__(self, kept: int = LEASES_KEPT) -> None:
        self._kept = kept
        self._keys: OrderedDict[bytes, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def note(self, handle: bytes, link_key: bytes) -> None:
        with self._lock:
            self._keys[handle] = link_key
            self._keys.move_to_end(handle)
            while len(self._keys) > self._kept:
                self._keys.popitem(last=False)

    def get(self, handle: bytes) -> bytes | None:
        with self._lock:
            return self._keys.get(handle)


class Limiter:
    """Admits requests of one process, or raises `Overloaded` with the time after which to try again."""

    def __init__(
        self,
        rates: Rates,
        link_keys: LinkKeys,
        *,
        refused: Callable[[Kind], None] = lambda kind: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._peers = {kind: Buckets(getattr(rates, kind), keys=rates.peers, clock=clock) for kind in KINDS}
        self._leases = Buckets(rates.lease, keys=LEASES_KEPT, clock=clock)
        self._refused = refused
        self._link_keys = link_keys

    def admit(self, kind: Kind, peer: str) -> None:
        """Take from the peer's bucket. Raises `Overloaded`."""
        wait = self._peers[kind].take(peer)
        if wait > 0:
            raise self._overloaded(kind, wait)

    def admit_renewal(self, peer: str, heartbeat: bytes, signature: bytes) -> None:
        """Take from the peer's bucket, or from the lease's own where the heartbeat is its holder's.

        Raises `Overloaded`.
        """
        wait = self._peers["renewal"].take(peer)
        if wait > 0:
            handle = self._proven(heartbeat, signature)
            if handle is None:
                raise self._overloaded("renewal", wait)
            wait = self._leases.take(handle)
            if wait > 0:
                raise self._overloaded("renewal", wait)

    def _proven(self, heartbeat: bytes, signature: bytes) -> bytes | None:
        if len(heartbeat) > HEARTBEAT_LIMIT or len(signature) > SIGNATURE_LIMIT:
            return None
        try:
            handle = Heartbeat.from_bytes(heartbeat).handle
            known = self._link_keys.get(handle)
            if known is None:
                return None
            key: ec.EllipticCurvePublicKey = read_link_key(known)
            open_heartbeat(heartbeat, signature, key)
        except StipError:  # not a heartbeat of that lease: the peer's bucket has spoken
            return None
        return handle

    def _overloaded(self, kind: Kind, wait: float) -> Overloaded:
        self._refused(kind)
        error = Overloaded.because(f"{kind} requests", "more than the limit of this peer", "what [limits.rates] allows")
        error.retry_after = wait
        return error
