"""H: KV-cache attacks ("Shadow in the Cache", NDSS 2026): tokens from the keys and values that a server keeps.

Published, both assume a cache without keys. **Inversion**: keys and values of the first layer are linear in the normed
row, so least squares leads back to it. **Collision**: candidates run through the base behind what is decoded so far;
the one that looks like what the server computed is right. Here both compare what every lossless key leaves alone:

- A head's values are v' = B·W·K⁻¹·K·x + B·b with B invertible and K orthogonal. The least-squares inverse under the
  server's *own* weights is K·(W⁺W)·x: the keyed row, seen through the head. Its length is that of W⁺W·x.
- Attention probabilities, up to the order of heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from stip_keyservice.audit.attacks import Attack
from stip_keyservice.audit.attacks.folded import Doubles, fold
from stip_keyservice.audit.attacks.matching import centred
from stip_keyservice.audit.attacks.public_text import GUESSES
from stip_keyservice.audit.claims import NO_GUESS, Claims, Point
from stip_keyservice.audit.knowledge import Grant
from stip_keyservice.audit.network import Inside, Network
from stip_keyservice.audit.view import Entry, Floats, Ids, NotApplicable, View

PROPOSED = 8
"""Candidates of each position by the inversion, and so many by what the base expects next."""
AT_ONCE = 16
"""Sessions that are decided side by side."""
TINY = 1e-12
EPSILON = 1e-6
"""Of the norm: it moves the length of a row by parts in a million, and all rows alike."""


@dataclass(frozen=True)
class FirstValues:
    """The values of a network's first layer as a function of rows: W·unit(x) + b, the norm's weights folded in."""

    weight: Doubles
    """[kv_heads, head_dim, d]."""
    bias: Doubles
    """[kv_heads, 1, head_dim]."""
    centred: bool
    """LayerNorm takes the mean away; RMSNorm does not."""

    @classmethod
    def of(cls, network: Network) -> FirstValues:
        """Raises `NotApplicable` for a family whose layout is not known."""
        folded = fold(network)
        values, heads = folded.layers[0].values, folded.kv_heads
        weight = values.weight
        if folded.names.centred:
            weight = centred(weight)
        return cls(weight.reshape(heads, -1, weight.shape[1]), values.bias.reshape(heads, 1, -1), folded.names.centred)

    def __call__(self, rows: Floats) -> Doubles:
        """[kv_heads, n, head_dim] values of rows [n, d]."""
        wide = centred(rows) if self.centred else rows.astype(np.float64)
        unit = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + EPSILON)
        values: Doubles = unit @ self.weight.transpose(0, 2, 1) + self.bias
        return values

    def inverted(self, values: NDArray[Any]) -> Doubles:
        """[kv_heads + 1, n, d] least-squares rows behind values [kv_heads, n, head_dim]: by each head, and by all."""
        linear = values - self.bias
        by_head = linear @ np.linalg.pinv(self.weight).transpose(0, 2, 1)
        joint = np.linalg.pinv(self.weight.reshape(-1, self.weight.shape[-1]))
        together = np.concatenate(list(linear), axis=1) @ joint.T
        return np.concatenate([by_head, together[None]])

    def lengths(self, values: NDArray[Any]) -> Doubles:
        """[n, kv_heads + 1] logarithms of the lengths of `inverted`: heads rising, for their order is a key."""
        found = np.log(np.linalg.norm(self.inverted(values), axis=-1).T + TINY)
        return np.concatenate([np.sort(found[:, :-1], axis=1), found[:, -1:]], axis=1)


def _run(view: View) -> Claims:
    if view.base is None:
        raise NotApplicable("without the base's weights nothing says what a token's keys and values are")
    server, base = FirstValues.of(view.server), FirstValues.of(view.base)
    insides = [view.server.inside(view.rows(seen)) for seen in view.victims]
    if not _alike(view.base, insides[0]):
        raise NotApplicable("the base has other numbers of layers or heads than the server part")
    inverted = [_by_length(server, base, inside, view.entry) for inside in insides]
    published = [_as_published(base, inside, view.entry) for inside in insides]
    return Claims(
        tokens=_collided(view.base, insides, inverted),
        points=[
            Point("layers of the cache, inverted", 1, [guesses[:, :GUESSES] for guesses in inverted]),
            Point("layers of the cache, inverted as published, blind to keys", 1, published),
        ],
    )


def _alike(base: Network, inside: Inside) -> bool:
    shape = base.inside(np.ones((1, base.model.config.hidden_size), np.float32)).attentions.shape
    return shape[:2] == inside.attentions.shape[:2]


def _by_length(server: FirstValues, base: FirstValues, inside: Inside, entry: Entry) -> Ids:
    """[n, 2 * PROPOSED] guesses: tokens whose inverted values are nearest in length."""
    wanted = server.lengths(inside.values[0])
    return _nearest(wanted, entry, lambda rows: base.lengths(base(rows)), 2 * PROPOSED)


def _as_published(base: FirstValues, inside: Inside, entry: Entry) -> Ids:
    """[n, GUESSES] guesses: tokens whose normed rows are nearest to what the base's weights invert the cache to."""
    wanted = base.inverted(inside.values[0])[-1]
    return _nearest(wanted, entry, lambda rows: base.inverted(base(rows))[-1], GUESSES)


def _nearest(wanted: Doubles, entry: Entry, features: Callable[[Floats], Doubles], count: int) -> Ids:
    """[n, count] tokens whose features [V, f] are nearest to those wanted [n, f], position by position."""
    known = features(entry.at(0))
    guesses = []
    for position, each in enumerate(wanted):
        if entry.positions is not None:
            known = features(entry.at(position))
        guesses.append(np.argsort(((known - each) ** 2).sum(axis=1), kind="stable")[:count])
    return np.stack(guesses)


def _collided(base: Network, insides: Sequence[Inside], inverted: Sequence[Ids]) -> list[Ids]:
    """The guesses of every session; sessions of one length are decided together."""
    found: dict[int, Ids] = {}
    lengths = np.array([len(guesses) for guesses in inverted])
    for length in np.unique(lengths):
        alike = np.flatnonzero(lengths == length)
        for block in np.array_split(alike, -(-len(alike) // AT_ONCE)):
            attentions = np.stack([np.sort(insides[number].attentions, axis=1) for number in block])
            guesses = _collide(base, attentions, np.stack([inverted[number] for number in block]))
            found |= dict(zip(block.tolist(), guesses, strict=True))
    return [found[number] for number in range(len(inverted))]


@torch.inference_mode()
def _collide(base: Network, attentions: Floats, inverted: Ids) -> Ids:
    """[s, n, GUESSES] guesses for the server's attention [s, L, heads, n, n], heads in rising order, and guesses by
    inversion [s, n, k]. At each position, candidates are run behind those decided before, and the one whose attention
    is nearest to the server's (L1) is decided."""
    sessions, length, _ = inverted.shape
    guesses = np.full((sessions, length, GUESSES), NO_GUESS)
    cache = DynamicCache(config=base.model.config)
    candidates = inverted[:, 0]
    for position in range(length):
        count = candidates.shape[1]
        result = base.model(
            input_ids=torch.from_numpy(candidates.reshape(-1, 1)),
            past_key_values=cache,
            use_cache=True,
            output_attentions=True,
        )
        shown = np.sort(torch.stack(result.attentions, dim=1)[:, :, :, 0].numpy(), axis=2)
        wanted = attentions[:, None, :, :, position, : position + 1]
        apart = np.abs(shown.reshape(sessions, count, *shown.shape[1:]) - wanted).mean(axis=(2, 3, 4))
        order = np.argsort(apart, axis=1, kind="stable")
        for row, ranked in zip(guesses[:, position], np.take_along_axis(candidates, order, axis=1), strict=True):
            best = list(dict.fromkeys(ranked.tolist()))[:GUESSES]
            row[: len(best)] = best
        if position + 1 < length:
            decided = torch.from_numpy(np.arange(sessions) * count + order[:, 0])
            cache.batch_select_indices(decided)
            logits = result.logits[decided, -1]
            expected = logits.topk(min(PROPOSED, logits.shape[1])).indices.numpy()
            candidates = np.concatenate([inverted[:, position + 1, :PROPOSED], expected], axis=1)
            cache.batch_repeat_interleave(candidates.shape[1])
    return guesses


ATTACK = Attack(
    letter="H",
    name="KV-cache inversion and collision",
    source="Shadow in the Cache, NDSS 2026; its comparison made invariant under keys by us",
    assumes="the cache's values, the attention of a session, and the weights of the model that this one derives from",
    cost="one least-squares inverse a head; a forward pass of the base a position",
    rows=("base",),
    needs=frozenset({Grant.BASE}),
    run=_run,
)
