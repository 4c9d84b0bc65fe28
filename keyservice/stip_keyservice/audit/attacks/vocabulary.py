"""Vocabulary matching: whoever can run the first layers of a model guesses a prompt token by token.

At each position the candidates for the next token are run behind those found before and compared with what the server
computes there. Under a permutation of features sorted values are compared, as published; under a dense key what it
keeps: lengths, and inner products with the states before. A language model proposes which candidates to try first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from stip_keyservice.audit.attacks import Attack
from stip_keyservice.audit.attacks.matching import Doubles, centred, is_centred
from stip_keyservice.audit.attacks.public_text import GUESSES, PublicText
from stip_keyservice.audit.claims import Claims
from stip_keyservice.audit.network import Network
from stip_keyservice.audit.view import Ids, View

LAYERS = 1
"""Layers of the prefix: the first states that depend on the tokens before."""
CHUNKS = (32, 128, 512)
"""Candidates tried at once, in the order of the proposal; behind them all that are left."""
BATCH, STRIP = 2048, 128
"""Candidates run at once, and beside one another in a session: bound memory."""
SIGNIFICANCE = 1e-4
"""Probability that the best of wrong candidates is accepted."""
DIMENSIONS = 2
"""Features taken for independent, at most, when that probability is computed: states have much in common, and so have
their inner products with others."""
PATIENCE = 2
"""Positions in a row without an acceptable candidate at which a session is given up."""
TRIAL = 8
"""Positions of the first session on which comparisons are tried."""

STACKS = (("layers", "norm"), ("h", "ln_f"))
"""Names of the stack of blocks and of the final norm: of Llama and most others, of GPT-2."""

Compare = Callable[[Doubles, Doubles], Doubles]
"""[c, f] features of c states [c, d] behind the states [n, d] found or seen before."""


def _sorted_values(states: Doubles, before: Doubles) -> Doubles:
    return np.sort(states, axis=1)


def _sorted_absolute(states: Doubles, before: Doubles) -> Doubles:
    return np.sort(np.abs(states), axis=1)


def _gram(states: Doubles, before: Doubles) -> Doubles:
    lengths = np.linalg.norm(before, axis=1)
    return np.column_stack([np.linalg.norm(states, axis=1), states @ before.T / lengths])


COMPARISONS: dict[str, Compare] = {
    "sorted values": _sorted_values,
    "sorted absolute values": _sorted_absolute,
    "lengths and inner products": _gram,
}


class _Runner:
    """Blocks of a network that run sessions in step, a token at a time, and can try continuations."""

    def __init__(self, blocks: Any) -> None:
        self._blocks, self._length = blocks, 0
        self._cache: list[tuple[torch.Tensor, torch.Tensor]] = []

    def extend(self, ids: Ids) -> Any:
        """Append one token [b] to each session; what the blocks give for it."""
        result, self._cache = self._run(ids[:, None], self._cache)
        self._length += 1
        return result

    def attempt(self, sessions: Ids, candidates: Ids) -> Doubles:
        """[p, c, d] states of `candidates` [p, c] behind `sessions` [p]; nothing is appended."""
        count = candidates.shape[1]
        strips = -(-count // STRIP)
        width = -(-count // strips)
        # short strips are filled up with their session's last candidate
        padded = np.concatenate([candidates, np.repeat(candidates[:, -1:], strips * width - count, axis=1)], axis=1)
        places, lines = np.repeat(sessions, strips), padded.reshape(-1, width)
        step, states = max(1, BATCH // width), []
        for first in range(0, len(lines), step):
            rows = torch.from_numpy(places[first : first + step])
            cache = [(keys[rows], values[rows]) for keys, values in self._cache]
            result, _ = self._run(lines[first : first + step], cache)
            states.append(result.last_hidden_state.double().numpy())
        found = np.concatenate(states)
        return found.reshape(len(sessions), strips * width, found.shape[-1])[:, :count]

    def keep(self, sessions: Ids) -> None:
        """Go on with these sessions only, renumbered."""
        places = torch.from_numpy(sessions)
        self._cache = [(keys[places], values[places]) for keys, values in self._cache]

    def _run(
        self, ids: Ids, cache: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[Any, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Tokens [b, w], each as if it alone came next: all at the same position, none sees another."""
        count, width = ids.shape
        hidden = torch.full((width, width), torch.finfo(torch.float32).min).fill_diagonal_(0.0)
        mask = torch.cat([torch.zeros(width, self._length), hidden], dim=1)
        with torch.inference_mode():
            result = self._blocks(
                input_ids=torch.from_numpy(np.ascontiguousarray(ids)),
                attention_mask=mask.expand(count, 1, -1, -1),
                past_key_values=DynamicCache(cache),
                position_ids=torch.full((count, width), self._length),
                use_cache=True,
            )
        return result, [(layer.keys, layer.values) for layer in result.past_key_values.layers]


def _prefix(network: Network, layers: int) -> Any:
    """The first blocks of a network, without its final norm."""
    blocks = network.model.base_model
    stack, norm = next(names for names in STACKS if hasattr(blocks, names[0]))
    short = copy.copy(blocks)
    # a copy shares the table of its parts with the original; this one gets its own
    short._modules = {**blocks._modules, stack: getattr(blocks, stack)[:layers], norm: torch.nn.Identity()}
    return short


@dataclass
class _Session:
    """One victim's session while it is read."""

    states: Doubles
    """[n, d] what the server computes at `LAYERS`."""
    number: int
    read: list[int] = field(default_factory=list)
    found: list[Doubles] = field(default_factory=list)
    """States of the prefix behind each token read."""
    guesses: list[Ids] = field(default_factory=list)
    accepted: int = 0
    rejected: int = 0
    """Positions in a row without an acceptable candidate."""

    @property
    def broken(self) -> bool:
        """Two such positions: the first one's nearest candidate was not it, what comes behind cannot be compared."""
        return self.rejected == PATIENCE

    def distances(self, compare: Compare, tried: Doubles) -> tuple[Doubles, int]:
        """[c] L1 distances of `tried` states [c, d] from what the server has next, and how many features count."""
        position, width = len(self.read), self.states.shape[1]
        before = np.array(self.found).reshape(position, tried.shape[1])
        features = compare(tried, before)
        seen = compare(self.states[position][None], self.states[:position].reshape(position, width))
        return np.abs(features - seen).sum(axis=1), min(features.shape[1], DIMENSIONS)


@dataclass(frozen=True)
class _Reader:
    """What an attack reads with: a prefix to run, a language model that proposes, and a comparison."""

    prefix: Any
    proposer: Any
    public: PublicText
    compare: Compare
    centre: bool

    def read(self, sessions: list[_Session], length: int) -> list[_Session]:
        """Read up to `length` positions of every session."""
        prefix, proposer = _Runner(self.prefix), _Runner(self.proposer)
        running, order = list(sessions), np.tile(self.public.ranked, (len(sessions), 1))
        for position in range(length):
            staying = np.array([row for row, each in enumerate(running) if len(each.states) > position], np.int64)
            if not len(staying):
                break
            if len(staying) < len(running):
                prefix.keep(staying)
                proposer.keep(staying)
                running, order = [running[row] for row in staying], order[staying]
            if position == 0 and self.public.first is not None:
                chosen = np.full(len(running), self.public.first)
            else:
                chosen = self._choose(prefix, running, order)
            states = self._plain(prefix.extend(chosen).last_hidden_state[:, -1].double().numpy())
            for session, token, state, proposed in zip(running, chosen, states, order, strict=True):
                others = proposed[proposed != token][: GUESSES - 1]
                session.read.append(int(token))
                session.found.append(state)
                session.guesses.append(np.concatenate([[token], others]))
            logits = proposer.extend(chosen).logits[:, -1].numpy()
            order = np.argsort(-logits, axis=1, kind="stable")
        return sessions

    def _plain(self, states: Doubles) -> Doubles:
        return centred(states) if self.centre else states

    def _choose(self, prefix: _Runner, running: list[_Session], order: Ids) -> Ids:
        """[b] the accepted candidate of each session, or the nearest; the proposal's own guess once it is broken."""
        chosen, tried = order[:, 0].copy(), 0
        pending = np.array([row for row, each in enumerate(running) if not each.broken], np.int64)
        nearest = np.full(len(running), np.inf)
        for count in (*CHUNKS, order.shape[1]):
            candidates = order[pending, tried : tried + count]
            if not candidates.size:
                break
            states, left = prefix.attempt(pending, candidates), []
            for row, some, each in zip(pending, candidates, states, strict=True):
                distances, dimensions = running[row].distances(self.compare, self._plain(each))
                best, second = np.argsort(distances, kind="stable")[:2] if len(distances) > 1 else (0, 0)
                if distances[best] < nearest[row]:
                    chosen[row], nearest[row] = some[best], distances[best]
                # of points spread evenly in k dimensions, the nearest is at (d1/d2)^k <= p with probability p
                if distances[best] ** dimensions < SIGNIFICANCE * distances[second] ** dimensions:
                    chosen[row], running[row].rejected = some[best], 0
                    running[row].accepted += 1
                else:
                    left.append(row)
            pending, tried = np.array(left, np.int64), tried + count
        for row in pending:
            running[row].rejected += 1
            if running[row].broken:
                chosen[row] = order[row, 0]
        return chosen


def _sessions(states: Sequence[Doubles]) -> list[_Session]:
    return [_Session(each, number) for number, each in enumerate(states)]


def run(view: View) -> Claims:
    """Tokens by the comparison that accepts most of a first trial."""
    network = view.base or view.surrogate
    layers = min(LAYERS, view.server.model.config.num_hidden_layers - 1)
    states = [view.server.inside(view.rows(seen)).states[layers].astype(np.float64) for seen in view.victims]
    centre = all(is_centred(each) for each in states)
    prefix, public = _prefix(network, layers), PublicText.of(view)
    readers = {name: _Reader(prefix, network.model, public, compare, centre) for name, compare in COMPARISONS.items()}
    trials = {name: reader.read(_sessions(states[:1]), TRIAL)[0].accepted for name, reader in readers.items()}
    best = max(trials, key=lambda name: trials[name])
    sessions = readers[best].read(_sessions(states), max(map(len, states)))
    return Claims(
        tokens=[np.stack(session.guesses) for session in sessions],
        figures={
            "positions accepted": sum(session.accepted for session in sessions) / sum(map(len, states)),
            "sessions read to the end": sum(not session.broken for session in sessions) / len(sessions),
        },
    )


ATTACK = Attack(
    letter="A",
    name="Vocabulary matching",
    source="Thomas et al., Hidden No More: Attacking and Defending Private Third-Party LLM Inference, ICML 2025, "
    "arXiv 2505.18332",
    assumes="The attacker can run the model's first layers: it has the public model, or hopes that its own is near.",
    cost="Some hundred runs of the first layer for each token; seconds for thousands of tokens.",
    rows=("server", "base"),
    needs=frozenset(),
    run=run,
)
