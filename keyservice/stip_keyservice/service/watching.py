"""What an enclave must hear of its leases: found in the state, whichever process changed it.

A lease has *ended* as `endings` says. It is *superseded* while its epoch drains. An instance or an epoch is *closed*
where it was revoked or retired: whoever holds its grant must drop it.

Found anew at each look and compared with what was told before, so that nothing is missed: not what another replica or
the command line did, not what happened while nobody watched. A link key is told of its own leases alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from sqlalchemy import Connection, Select, and_, or_, select

from stip_keyservice.service import endings
from stip_keyservice.service.revocations import epoch_subject
from stip_keyservice.service.state.schema import epochs, leases, revocations
from stip_protocol.release import HANDLES_LIMIT, Notice

KEYS_AT_ONCE = 500
"""Link keys in one query: SQLite takes 32,766 parameters, PostgreSQL's planner likes fewer."""

Place = tuple[str, int | None]
"""An instance, and one epoch of it or (None) the whole."""


@dataclass(frozen=True)
class Standing:
    """What the leases of one link key have come to. Leases that go on as before are not in it."""

    ended: Mapping[bytes, Place] = field(default_factory=dict)
    """By handle, where the lease was for."""
    superseded: frozenset[bytes] = frozenset()
    closed: frozenset[Place] = frozenset()


@dataclass(frozen=True)
class Change:
    """What one notice says, beside whom it is for."""

    kind: str
    handles: tuple[bytes, ...] = ()
    place: Place | None = None

    def notice(self, nonce: bytes, sequence: int) -> Notice:
        """The document, not signed yet."""
        instance, epoch = self.place or (None, None)
        fields = {"kind": self.kind, "nonce": nonce, "sequence": sequence, "handles": self.handles}
        return Notice.model_validate(fields | {"instance": instance, "epoch": epoch})


WATCHING = Change("watching")


def standings(db: Connection, link_keys: Collection[bytes], *, now: int, grace: int) -> dict[bytes, Standing]:
    """What there is to hear for each link key (SHA-256 of its SubjectPublicKeyInfo); nothing for those not in it.

    Leases that cannot be renewed any more (`grace` seconds after their end) only count for what was closed.
    """
    found: dict[bytes, Standing] = {}
    for keys in _parts(sorted(link_keys), KEYS_AT_ONCE):
        rows = db.execute(_query(keys, now, grace)).all()
        closed = _closed(db, {(row.instance, row.epoch) for row in rows})
        for key, of_key in groupby(rows, key=lambda row: row.link_key_digest):
            mine = list(of_key)
            live = [row for row in mine if row.expires > now - grace]
            places = {place for row in mine for place in _widest((row.instance, row.epoch), closed)}
            found[key] = Standing(
                ended={row.handle: (row.instance, row.epoch) for row in live if row.ended},
                superseded=frozenset(row.handle for row in live if not row.ended),
                closed=frozenset(places),
            )
    return found


def changes(told: Standing, found: Standing) -> Iterator[Change]:
    """The notices that lead from what was told to what was found: what was closed first, each with its leases."""
    ended = found.ended.keys() - told.ended.keys()
    by_place: defaultdict[Place | None, list[bytes]] = defaultdict(list)
    for place in found.closed - told.closed:
        by_place[place] = []
    for handle in sorted(ended):
        closed = _widest(found.ended[handle], found.closed)
        by_place[closed[0] if closed else None].append(handle)
    for at, handles in by_place.items():
        yield from (Change("revoked", chunk, at) for chunk in _chunks(handles))
    superseded = sorted(found.superseded - told.superseded)
    if superseded:
        yield from (Change("superseded", chunk) for chunk in _chunks(superseded))


def _query(keys: Sequence[bytes], now: int, grace: int) -> Select[Any]:
    """Leases of these link keys that have ended or are superseded, by key."""
    columns = (leases.c.link_key_digest, leases.c.handle, leases.c.instance, leases.c.epoch, leases.c.expires)
    ended = endings.ended(now)
    return (
        select(*columns, ended.label("ended"))
        .select_from(endings.JOINED)
        .where(leases.c.link_key_digest.in_(keys), or_(ended, and_(endings.DRAINING, leases.c.expires > now - grace)))
        .order_by(leases.c.link_key_digest)
    )


def _closed(db: Connection, copies: Collection[tuple[str, int]]) -> frozenset[Place]:
    """Of these epochs and their instances, those that were revoked or retired."""
    if not copies:
        return frozenset()
    named = {instance for instance, _ in copies}
    present = epochs.c.instance.in_(named), epochs.c.state != "removed"
    kept = {
        (row.instance, row.number) for row in db.execute(select(epochs.c.instance, epochs.c.number).where(*present))
    }
    kinds = revocations.c.kind.in_(("instance", "epoch"))
    revoked = set(db.execute(select(revocations.c.subject).where(revocations.c.lifted_at.is_(None), kinds)).scalars())
    whole = {instance for instance in named if instance in revoked or instance not in {each for each, _ in kept}}
    single = {copy for copy in copies if epoch_subject(*copy) in revoked or copy not in kept}
    return frozenset({*((instance, None) for instance in whole), *single})


def _widest(place: Place, closed: Collection[Place]) -> list[Place]:
    """The closed place that holds this one, the whole instance before an epoch; none where both are open."""
    return [each for each in ((place[0], None), place) if each in closed][:1]


def _chunks(handles: Sequence[bytes]) -> Iterator[tuple[bytes, ...]]:
    """At most `HANDLES_LIMIT` a notice, and one notice where there are none."""
    yield from (tuple(part) for part in _parts(handles, HANDLES_LIMIT))
    if not handles:
        yield ()


def _parts(items: Sequence[bytes], size: int) -> Iterator[Sequence[bytes]]:
    return (items[start : start + size] for start in range(0, len(items), size))
