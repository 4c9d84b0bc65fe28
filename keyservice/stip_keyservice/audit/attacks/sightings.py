"""The distinct rows that a server sees: equal ids make equal rows, at every position or at their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stip_keyservice.audit.attacks.matching import Doubles, comparable
from stip_keyservice.audit.claims import NO_GUESS
from stip_keyservice.audit.view import Floats, Ids, View


@dataclass(frozen=True)
class Sightings:
    """Rows to be read, and where they were seen."""

    rows: Floats
    """[m, d] distinct keyed rows; under `throughput` the server's whole table, in permuted order."""
    positions: Ids
    """[m] where each was first seen: where positions are learned, the only position it can come at."""
    sessions: Sequence[Ids]
    """For each victim's session, [n] which row stands at each position."""
    beginning: int | None
    """The row that every session begins with. None where they do not agree."""

    @classmethod
    def of(cls, view: View) -> Sightings:
        """Of the victims' sessions in `view`."""
        if all(seen.ids is not None for seen in view.victims):
            rows = view.server.embedding
            sessions = [seen.ids for seen in view.victims if seen.ids is not None]
            positions = np.zeros(len(rows), np.int64)
        else:
            every = np.ascontiguousarray(np.concatenate([view.rows(seen) for seen in view.victims]))
            # equal bytes: one sort of opaque strings, no comparison of floats
            strings = every.view(np.dtype((np.void, every.dtype.itemsize * every.shape[1])))[:, 0]
            _, firsts, inverse = np.unique(strings, return_index=True, return_inverse=True)
            lengths = [len(seen) for seen in view.victims]
            sessions = np.split(inverse.astype(np.int64), np.cumsum(lengths)[:-1])
            positions = np.concatenate([np.arange(length) for length in lengths])[firsts].astype(np.int64)
            rows = every[firsts]
        beginnings = {int(session[0]) for session in sessions}
        return cls(rows, positions, sessions, beginnings.pop() if len(beginnings) == 1 else None)

    def sample(self, generator: np.random.Generator, count: int) -> Sightings:
        """`count` of the rows, or all: enough to find a key by. In no session's order."""
        some = np.sort(generator.permutation(len(self.rows))[:count])
        return Sightings(self.rows[some], self.positions[some], [], None)

    def places(self, view: View) -> list[tuple[int, Ids]]:
        """Positions at which tables differ, each with the rows to be looked up there: one where none are learned."""
        if view.entry.positions is None:
            return [(0, np.arange(len(self.rows)))]
        return [(int(each), np.flatnonzero(self.positions == each)) for each in np.unique(self.positions)]

    def table(self, view: View, position: int) -> Doubles:
        """[V, d] plain rows of every id at `position`, as the attacker believes them, to be compared with `rows`."""
        return comparable(view.entry.at(position), self.rows)

    def tokens(self, guesses: Ids) -> list[Ids]:
        """Per session [n, k], of guesses [m, k] per distinct row."""
        return [guesses[session] for session in self.sessions]

    def vocabulary(self, view: View, guesses: Ids, accepted: Ids) -> Ids | None:
        """[V] claimed true id of each permuted id, of the rows in `accepted`; None where rows are no permuted ids."""
        if any(seen.ids is None for seen in view.victims):
            return None
        found = np.full(len(self.rows), NO_GUESS, np.int64)
        found[accepted] = guesses[accepted, 0]
        return found
