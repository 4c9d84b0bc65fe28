"""Collateral for whoever asks: from disk while it is valid, renewed early from a source, or from a bundle alone.

What is served has not expired: where no source answers, collateral is served for as long as it is valid and not a
second longer. A renewal is due when the share `refresh_share` of its life is left, is tried at most every
`retry_minutes`, and happens aside: who asks waits only where nothing valid is kept, and not longer than
`wait_seconds`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass

from pydantic import Field

from stip_protocol.attestation import collateral_bundle
from stip_protocol.attestation.authenticity import require_authentic, require_current
from stip_protocol.attestation.collateral_cache import CollateralCache, Kept
from stip_protocol.attestation.pccs import Endpoint, PccsClient
from stip_protocol.attestation.platforms import PlatformKind
from stip_protocol.errors import CollateralUnavailable, ConfigurationError, StipError
from stip_protocol.runtime.config import ConfigPath, Settings

FETCHES = 4
"""Platforms fetched at once."""


class CollateralSettings(Settings):
    """The table `[collateral]`."""

    cache: ConfigPath
    """Folder; made where there is none."""
    endpoints: tuple[Endpoint, ...] = Field(default=(), max_length=8)
    """Sources, in the order they are tried. None: offline, from the cache and the bundle alone."""
    bundle: ConfigPath | None = None
    """A collateral bundle, taken into the cache at start."""
    refresh_share: float = Field(default=1 / 3, gt=0, lt=1)
    """Share of its life that is left when collateral is renewed."""
    retry_minutes: float = Field(default=10.0, gt=0, le=24 * 60)
    """The least time between two tries to renew the collateral of a platform."""
    wait_seconds: float = Field(default=4.0, gt=0, le=60)
    """How long a release waits for collateral of a platform that none is kept of."""
    waiters: int = Field(default=2, ge=0, le=1024)
    """Releases that may wait for collateral at once; others are told to come back. Fewer than the service's threads."""
    fetch_seconds: float = Field(default=20.0, gt=0, le=300)
    """How long one fetch may try, all endpoints and pauses together."""


@dataclass(frozen=True, slots=True)
class Shelf:
    """One platform's collateral, for people and metrics."""

    kept: Kept
    refresh_due: int
    """Unix seconds."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """A file of the cache as it was read."""

    stamp: tuple[int, ...]
    kept: Kept
    opens: int


class CollateralSource:
    """Collateral by platform. Safe between threads; several processes may share one cache folder."""

    def __init__(self, settings: CollateralSettings, anchor: bytes, *, clock: Callable[[], float] = time.time) -> None:
        """`anchor`: DER of the root that collateral must chain to.

        Raises `ConfigurationError` (folder, CA file, bundle file), `EvidenceMalformed`, `EvidenceRefused` (the bundle).
        """
        self._settings, self._anchor, self._clock = settings, anchor, clock
        self._cache = CollateralCache(settings.cache, anchor)
        self._client = PccsClient(settings.endpoints, anchor, clock=clock) if settings.endpoints else None
        self._threads = ThreadPoolExecutor(FETCHES, thread_name_prefix="collateral")
        self._lock = threading.Lock()
        self._waiters = threading.BoundedSemaphore(settings.waiters)
        self._seen: dict[PlatformKind, _Seen] = {}
        self._fetching: dict[PlatformKind, Future[Kept]] = {}
        self._tried: dict[PlatformKind, float] = {}
        """When a platform was last fetched, also where that brought nothing newer."""
        self._failed: dict[PlatformKind, float] = {}
        """When it was last fetched in vain."""
        if settings.bundle is not None:
            for carried in collateral_bundle.load(settings.bundle):
                self._cache.store(
                    carried.data, now=int(self._clock())
                )  # also what ran out: it is shown, and never served

    def for_quote(self, quote: bytes) -> bytes:
        """Valid collateral for the platform that made a quote.

        Raises what `PlatformKind.of_quote` raises, and `CollateralUnavailable`.
        """
        return self.get(PlatformKind.of_quote(quote, self._anchor)).data

    def get(self, kind: PlatformKind) -> Kept:
        """Valid collateral of a platform: what is kept, or else fetched within `wait_seconds`.

        Raises `CollateralUnavailable`.
        """
        kept = self._valid(kind)
        if kept is not None:
            return kept
        future = self._fetch(kind, self._failed)
        if future is None:
            return self._require_valid(kind)  # which a fetch that ended just now has brought
        if not self._waiters.acquire(blocking=False):
            raise CollateralUnavailable(
                f"collateral of {kind}: is being fetched", field="collateral", retry_after=self._settings.wait_seconds
            )
        try:
            future.result(self._settings.wait_seconds)
        except FutureTimeout:
            raise CollateralUnavailable(
                f"collateral of {kind}: not fetched within {self._settings.wait_seconds} s",
                field="collateral",
                retry_after=self._settings.wait_seconds,
            ) from None
        except ConfigurationError as error:
            # Which folder that is concerns the operator, whose logs and doctor say so, and not who asks.
            raise CollateralUnavailable(f"collateral of {kind}: cannot be kept", field="collateral") from error
        finally:
            self._waiters.release()
        return self._require_valid(kind)

    def renew(self, kind: PlatformKind) -> Kept:
        """Fetch now, whatever is kept. Raises `CollateralUnavailable`, `ConfigurationError` (it cannot be kept)."""
        if self._client is None:
            raise CollateralUnavailable(f"collateral of {kind}: offline, no endpoint is configured", field="collateral")
        data = self._client.fetch(kind, seconds=self._settings.fetch_seconds)
        return self._cache.store(data, now=int(self._clock()))

    def due(self) -> list[PlatformKind]:
        """Platforms whose collateral should be renewed now."""
        now = self._clock()
        return [shelf.kept.kind for shelf in self.shelves() if shelf.refresh_due <= now]

    def renew_due(self) -> dict[PlatformKind, StipError | None]:
        """Renew what is due, and wait for it; gives how it went. Offline nothing is tried."""
        under_way = {kind: self._fetch(kind, self._tried) for kind in self.due()}
        return {kind: _failure(future) for kind, future in under_way.items() if future is not None}

    def take(self, found: list[Kept]) -> list[Kept]:
        """Keep collateral that was carried here, where it is authentic and in its dates; gives what is kept then.

        Raises `EvidenceRefused`, `CollateralExpired`, `ConfigurationError`: then nothing of it was kept.
        """
        for kept in found:
            require_authentic(kept.collateral, kept.kind, self._anchor)
            require_current(kept.collateral, int(self._clock()))
        return [self._cache.store(kept.data, now=int(self._clock())) for kept in found]

    def shelves(self) -> list[Shelf]:
        """Everything that is kept, expired or not."""
        found = [self._look(kind) for kind in self._cache.kinds()]
        return [Shelf(seen.kept, self._refresh_due(seen.kept)) for seen in found if seen is not None]

    def close(self) -> None:
        """Forget what is under way; what is being fetched ends by its own time."""
        if self._client is not None:
            self._client.stop()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _valid(self, kind: PlatformKind) -> Kept | None:
        """What is kept, where it holds now."""
        seen = self._look(kind)
        return None if seen is None or not seen.opens <= self._clock() <= seen.kept.expires else seen.kept

    def _require_valid(self, kind: PlatformKind) -> Kept:
        kept = self._valid(kind)
        if kept is None:
            raise self._unavailable(kind)
        return kept

    def _look(self, kind: PlatformKind) -> _Seen | None:
        """What is kept. Each file is parsed, and its signatures checked, once."""
        stamp = self._cache.stamp(kind)
        if stamp is None:
            return None
        seen = self._seen.get(kind)
        if seen is None or seen.stamp != stamp:
            kept = self._cache.read(kind)
            if kept is None:
                return None
            opens = max(window.opens for window in kept.collateral.windows())
            seen = self._seen[kind] = _Seen(stamp, kept, int(opens.timestamp()))
        return seen

    def _refresh_due(self, kept: Kept) -> int:
        return int(kept.expires - (kept.expires - kept.issued) * self._settings.refresh_share)

    def _fetch(self, kind: PlatformKind, before: Mapping[PlatformKind, float]) -> Future[Kept] | None:
        """The fetch of a platform that is under way, or a new one; None: offline, or `before` says that it was tried
        just now."""
        with self._lock:
            under_way = self._fetching.get(kind)
            if under_way is not None:
                return under_way
            tried = before.get(kind)
            if self._client is None or (
                tried is not None and 0 <= self._clock() - tried < self._settings.retry_minutes * 60
            ):
                return None
            future = self._threads.submit(self.renew, kind)
            self._fetching[kind] = future
        future.add_done_callback(lambda done: self._ended(kind, done))
        return future

    def _ended(self, kind: PlatformKind, done: Future[Kept]) -> None:
        with self._lock:
            self._fetching.pop(kind, None)
            self._failed.pop(kind, None)
            self._tried[kind] = self._clock()
            if done.cancelled() or done.exception() is not None:
                self._failed[kind] = self._tried[kind]

    def _unavailable(self, kind: PlatformKind) -> CollateralUnavailable:
        if self._client is None:
            reason, again = "offline, and none that is valid is kept: import a collateral bundle", None
        else:
            reason, again = "no source gave it just now", self._settings.retry_minutes * 60
        return CollateralUnavailable(f"collateral of {kind}: {reason}", field="collateral", retry_after=again)


def _failure(future: Future[Kept]) -> StipError | None:
    try:
        future.result()
    except StipError as error:
        return error
    return None
