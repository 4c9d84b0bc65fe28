"""What one attacker holds: exactly what its knowledge grants, and no key.

Ids called *true* are the tokenizer's; under `throughput` the server sees *permuted* ids instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from stip_keyservice.audit.network import Network

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


class NotApplicable(Exception):
    """Raised by an attack that what it holds makes meaningless; the text is the reason, for the report."""


@dataclass(frozen=True)
class Top:
    """The largest logits of m answers, as `paper` shows them: permuted ids."""

    indices: Ids
    """[m, k], largest first."""
    values: Floats
    """[m, k]."""
    log_sum_exp: Floats
    """[m], over the whole row."""


@dataclass(frozen=True)
class Seen:
    """One session, as its server sees it: n rows, and m answers that were asked for."""

    rows: Floats | None
    """[n, d] keyed rows, position by position. None under `throughput`."""
    ids: Ids | None
    """[n] permuted ids, prompt and answer. Under `throughput` alone."""
    asked: Ids
    """[m] positions behind which an answer was asked for, rising: the last row of the prompt, and every later row."""
    hidden: Floats | None = None
    """[m, d] answers of `hardened`: final hidden states, keyed."""
    top: Top | None = None
    """Answers of `paper`."""

    def __len__(self) -> int:
        """Positions n."""
        return len(self.rows if self.rows is not None else self.ids if self.ids is not None else ())


@dataclass(frozen=True)
class Labelled:
    """A session of somebody who helps: what the server saw, and what it was."""

    seen: Seen
    ids: Ids
    """[n] true ids of the positions fed."""
    answers: Ids
    """[m] true ids that the user was given behind `seen.asked`."""


@dataclass(frozen=True)
class Entry:
    """A table that an attacker knows or believes in: what a true id looks like before any key."""

    rows: Floats
    """[V, d]."""
    positions: Floats | None
    """[P, d], added at each position, where positions are learned."""
    drift: float
    """Standard deviation by which an entry may be off, over that of the table. 0: exact; infinite: it is the
    attacker's own, of an unrelated model with the same tokenizer."""

    def at(self, position: int) -> Floats:
        """[V, d]: every token's row at one position."""
        return self.rows if self.positions is None else self.rows + self.positions[position]


@dataclass(frozen=True)
class Sibling:
    """Another instance of the same model."""

    server: Network
    labelled: Sequence[Labelled]


@dataclass(frozen=True)
class Accomplice:
    """A user of the same instance."""

    labelled: Sequence[Labelled]
    decode: Callable[[Seen], Ids]
    """What the user reads when the server answers their session with another session's answers: [m] true ids. It is
    their enclave that decodes, honestly."""


@dataclass(frozen=True)
class PageTrace:
    """The pages that one session's lookups touched."""

    pages: Sequence[tuple[int, ...]]
    """A position each: numbers of pages from the start of the table."""
    page_bytes: int
    row_bytes: int


@dataclass(frozen=True)
class View:
    """Everything an attack gets."""

    preset: str
    server: Network
    """The server part, which the attacker runs on whatever it likes."""
    victims: Sequence[Seen]
    public_text: Sequence[Ids]
    """Text of the same kind as the victims', as true ids."""
    vocabulary: int
    seed: int
    entry: Entry
    """The best table that this attacker has; under `server` one of its own, unrelated."""
    surrogate: Network
    """A small model of the attacker's own, trained on `public_text`: proposes what comes next, and is all that those
    have who have no better."""
    base: Network | None = None
    accomplice: Accomplice | None = None
    sibling: Sibling | None = None
    enclave: Mapping[str, Floats] | None = field(default=None, repr=False)
    """Keyed tables of a broken enclave by name: `embedding`, `head`."""
    pages: Sequence[PageTrace] | None = None

    def generator(self, what: str) -> np.random.Generator:
        """Randomness of an attack: seeded, a stream for each use. Never for keys."""
        return np.random.default_rng([self.seed, *what.encode()])

    def rows(self, seen: Seen) -> Floats:
        """[n, d]: what enters the first layer of the server part."""
        if seen.rows is not None:
            return seen.rows
        assert seen.ids is not None
        return self.server.rows(seen.ids)
