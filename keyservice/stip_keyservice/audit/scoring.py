"""Where claims meet the truth, and nowhere else: an attack's findings as figures, each beside the best prior guess."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from stip_keyservice.audit import metrics, priors
from stip_keyservice.audit.claims import NO_GUESS, Claims, Stolen
from stip_keyservice.audit.document import Bounds, Metric, Point
from stip_keyservice.audit.intervals import by_session, exact, exponential_mean, share, wilson
from stip_keyservice.audit.material import Material
from stip_keyservice.audit.network import CompleteModel
from stip_keyservice.audit.view import Ids, NotApplicable
from stip_protocol.leakage import Interval

Positions = Sequence[Ids]
"""For each session, the positions that count."""


@dataclass(frozen=True)
class Scores:
    """What one attack comes to."""

    metrics: tuple[Metric, ...]
    points: tuple[Point, ...]
    figures: dict[str, float]


_SCOPES = {"all": "text behind its beginning", "answers": "an answer that was fed"}


class ClaimInvalid(Exception):
    """An attack claims something of the wrong form: a fault in the attack, never a finding."""


class Judge:
    """Knows the truth about one instance. What all claims are held against is computed once, when it is needed."""

    def __init__(self, material: Material) -> None:
        self._material = material
        self._texts = [victim.ids for victim in material.victims]
        self._vocabulary = material.truth.manifest.vocabulary

    def score(self, claims: Claims) -> Scores:
        """Every figure that these claims allow.

        Raises `ClaimInvalid` where they have not the form that `Claims` says, or claim nothing at all, and
        `NotApplicable` where all that they claim is tokens, and none was said that counts.
        """
        scope = self._scope(claims)
        counts = any(map(len, scope))
        found = (*self._tokens(claims, scope), *self._keys(claims), *self._stolen(claims))
        if not found and claims.tokens is not None:
            raise NotApplicable(f"nothing of a victim's session counts: none of it is {_SCOPES[claims.scope]}")
        if not found:
            raise ClaimInvalid("claims: nothing that can be held against the truth")
        if strange := [name for name, value in claims.figures.items() if not math.isfinite(value)]:
            raise ClaimInvalid(f"claims: figures {strange} are not finite")
        points = tuple(
            Point(curve=point.curve, x=point.x, measured=self._top(self._checked(point.tokens), scope, 1))
            for point in claims.points
            if counts
        )
        original = {"plain_perplexity": self._plain[1].value} if claims.stolen else {}
        return Scores(found, points, claims.figures | original)

    # Tokens.

    def _tokens(self, claims: Claims, scope: Positions) -> Iterator[Metric]:
        if claims.tokens is None:
            return
        tokens = self._checked(claims.tokens)
        if not any(map(len, scope)):
            return
        positions, sessions = sum(map(len, scope)), sum(len(each) > 0 for each in scope)
        figures: list[tuple[str, int, Callable[[Positions], Interval]]] = [
            ("token_top1", positions, lambda guesses: self._top(guesses, scope, 1)),
            ("token_top10", positions, lambda guesses: self._top(guesses, scope, priors.FIRST)),
            ("sequence_exact", sessions, lambda guesses: self._exact(guesses, scope)),
            ("rouge_l", sessions, lambda guesses: self._rouge(guesses, scope)),
        ]
        if all(guesses.shape[1] == 1 for guesses in tokens):
            del figures[1]  # of one guess there are no ten
        for name, counted, measure in figures:
            prior = {known: measure(guesses) for known, guesses in self._prior_guesses.items()}
            yield _beside(name, measure(tokens), prior, counted)

    def _checked(self, tokens: Sequence[Ids]) -> Sequence[Ids]:
        if len(tokens) != len(self._texts):
            raise ClaimInvalid(f"claims: tokens of {len(tokens)} sessions, of {len(self._texts)}")
        for number, (guesses, text) in enumerate(zip(tokens, self._texts, strict=True)):
            if guesses.ndim != 2 or len(guesses) != len(text) or not guesses.shape[1]:
                raise ClaimInvalid(f"claims: tokens of session {number} are {guesses.shape}, not [{len(text)}, k]")
            if guesses.dtype.kind != "i" or guesses.min() < NO_GUESS or guesses.max() >= self._vocabulary:
                raise ClaimInvalid(f"claims: tokens of session {number} are no ids below {self._vocabulary}")
        return tokens

    def _scope(self, claims: Claims) -> Positions:
        """Positions of each session that count: those claimed, without a beginning that everybody knows."""
        known = priors.beginning(self._material.public_text)
        scope = []
        for victim in self._material.victims:
            positions = priors.answered(victim) if claims.scope == "answers" else np.arange(len(victim.ids))
            if len(positions) and positions[0] == 0 and victim.ids[0] == known:
                positions = positions[1:]
            scope.append(positions)
        return scope

    @cached_property
    def _prior_guesses(self) -> Mapping[str, Sequence[Ids]]:
        return priors.guesses(self._material.truth.plain, self._material.public_text, self._material.victims)

    def _right(self, tokens: Sequence[Ids], scope: Positions, first: int) -> list[NDArray[np.bool_]]:
        return [
            metrics.found(guesses[positions], text[positions], first)
            for guesses, text, positions in zip(tokens, self._texts, scope, strict=True)
        ]

    def _top(self, tokens: Sequence[Ids], scope: Positions, first: int) -> Interval:
        right = self._right(tokens, scope, first)
        hits, counts = _sums(right), np.array([len(each) for each in right], np.float64)
        return share(hits, counts, trials=int(counts.sum()), seed=self._material.seed)

    def _exact(self, tokens: Sequence[Ids], scope: Positions) -> Interval:
        whole = [each.all() for each in self._right(tokens, scope, 1) if len(each)]
        return wilson(sum(map(int, whole)), len(whole))

    def _rouge(self, tokens: Sequence[Ids], scope: Positions) -> Interval:
        words, claimed, true = self._material.words, [], []
        for guesses, text, positions in zip(tokens, self._texts, scope, strict=True):
            best = guesses[positions, 0]
            if len(positions):
                claimed.append(words(best[best != NO_GUESS]))
                true.append(words(text[positions]))
        scores = metrics.rouge_l(claimed, true)
        trials = max(1, sum(map(len, true)))
        return share(scores, np.ones(len(scores)), trials=trials, seed=self._material.seed)

    # Keys.

    def _keys(self, claims: Claims) -> Iterator[Metric]:
        if claims.vocabulary is not None:
            yield self._vocabulary_found(claims.vocabulary)
        if claims.residual is not None:
            yield self._residual_found(claims)

    def _vocabulary_found(self, claimed: Ids) -> Metric:
        true = self._material.truth.vocabulary
        if true is None:
            raise ClaimInvalid("claims: a vocabulary permutation, where no server sees one")
        if claimed.shape != true.shape:
            raise ClaimInvalid(f"claims: vocabulary of {claimed.shape}, not {true.shape}")
        measured = wilson(int((claimed == true).sum()), len(true))
        return _beside("vocabulary_recovered", measured, {priors.RANDOM: exact(1 / len(true))}, len(true))

    def _residual_found(self, claims: Claims) -> Metric:
        claimed, true = claims.residual, self._relative if claims.relative else self._material.truth.residual
        assert claimed is not None
        width = len(true)
        if claimed.shape != true.shape or not np.isfinite(claimed).all():
            raise ClaimInvalid(f"claims: residual of {claimed.shape}, not finite numbers of {true.shape}")
        if metrics.is_permutation(true):
            if claims.unordered:
                raise ClaimInvalid("claims: the axes of a permutation, which everybody knows")
            measured = wilson(int(metrics.permutation_found(claimed, true).sum()), width)
            return _beside("residual_permutation", measured, {priors.RANDOM: exact(1 / width)}, width)
        prior = exact(metrics.random_cosine(width))
        if claims.unordered:
            claimed, prior = metrics.axes_in_order(claimed, true), self._random_axes(true)
        measured = wilson(float(metrics.cosines(claimed, true).sum()), width)
        return _beside("residual_cosine", measured, {priors.RANDOM: prior}, width)

    def _random_axes(self, true: NDArray[np.float64]) -> Interval:
        """What the axes of one random key come to, put in order as kindly as claimed ones."""
        generator, width = np.random.default_rng([self._material.seed, *b"axes"]), len(true)
        drawn = np.linalg.qr(generator.normal(size=(width, width)))[0]
        return wilson(float(metrics.cosines(metrics.axes_in_order(drawn, true), true).sum()), width)

    @property
    def _relative(self) -> NDArray[np.float64]:
        """K of this instance over K of its twin: the inverse of a residual's key is its transpose, where it has one."""
        if self._material.twin is None:
            raise ClaimInvalid("claims: a key relative to a sibling, where there is none")
        return np.asarray(self._material.truth.residual @ self._material.twin.truth.residual.T)

    # Stolen models.

    def _stolen(self, claims: Claims) -> Iterator[Metric]:
        """The model that agrees most comes first."""
        if not claims.stolen:
            return
        agreement, perplexity = self._surrogate
        counted = sum(len(text) - 1 for text in self._material.held_out)
        ran = sorted(((name, *self._ran(stolen)) for name, stolen in claims.stolen), key=lambda each: -each[1].value)
        for name, agrees, _ in ran:
            yield _beside("stolen_agreement", agrees, {priors.SURROGATE: agreement}, counted, of=name)
        for name, _, perplexed in ran:
            yield Metric(
                name="stolen_perplexity",
                of=name,
                measured=perplexed,
                prior=perplexity,
                prior_name=priors.SURROGATE,
                counted=counted,
            )

    def _ran(self, stolen: Stolen) -> tuple[Interval, Bounds]:
        """Agreement with the plain model's next token, and perplexity, on the held-out text."""
        agrees, surprises = [], []
        for text, best in zip(self._material.held_out, self._plain_best, strict=True):
            logits = stolen.logits(text[:-1])
            if logits.shape != (len(text) - 1, self._vocabulary) or not np.isfinite(logits.max(axis=1)).all():
                shape = (len(text) - 1, self._vocabulary)
                raise ClaimInvalid(f"claims: logits {logits.shape} of a stolen model, not numbers of {shape}")
            agrees.append((logits.argmax(axis=1) == best).astype(np.float64))
            surprises.append(metrics.surprise(logits, text[1:]))
        seed, trials = self._material.seed, sum(map(len, agrees))
        agreement = share(_sums(agrees), np.array([len(each) for each in agrees], np.float64), trials=trials, seed=seed)
        return agreement, exponential_mean(*by_session(surprises), seed=seed)

    @cached_property
    def _surrogate(self) -> tuple[Interval, Bounds]:
        return self._ran(CompleteModel(self._material.surrogate.model))

    @cached_property
    def _plain(self) -> tuple[Interval, Bounds]:
        return self._ran(CompleteModel(self._material.truth.plain.model))

    @cached_property
    def _plain_best(self) -> list[Ids]:
        plain = CompleteModel(self._material.truth.plain.model)
        return [plain.logits(text[:-1]).argmax(axis=1) for text in self._material.held_out]


def _sums(sessions: Sequence[NDArray[np.bool_]] | Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.array([each.sum() for each in sessions], np.float64)


def _beside(name: str, measured: Interval, prior: Mapping[str, Interval], counted: int, of: str = "") -> Metric:
    """The figure beside the prior guesses, the best of them apart."""
    best = max(prior, key=lambda known: prior[known].value)
    return Metric(
        name=name,
        of=of,
        measured=measured,
        prior=prior[best],
        prior_name=best,
        weaker_priors={known: weaker for known, weaker in prior.items() if known != best},
        counted=counted,
    )
