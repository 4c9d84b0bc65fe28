"""Claims come to what is true of them, beside the best that somebody guesses who saw nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from stip_keyservice.audit import priors
from stip_keyservice.audit.claims import NO_GUESS, Claims, Point
from stip_keyservice.audit.document import Bounds, Metric
from stip_keyservice.audit.network import CompleteModel
from stip_keyservice.audit.scoring import ClaimInvalid, Judge, Scores
from stip_keyservice.audit.traffic import observe
from stip_keyservice.audit.view import Floats, Ids, Labelled, NotApplicable
from stip_protocol.leakage import Interval


@dataclass
class Court:
    """Judges of the ground's instances, and the texts that claims are about."""

    ground: Any

    def judge(self, preset: str = "paper", knowledge: str = "server", **changed: Any) -> Judge:
        return Judge(replace(self.ground.material(preset, knowledge), **changed))

    @property
    def texts(self) -> list[Ids]:
        return [text[:-1] for text in self.ground.victims]

    @property
    def right(self) -> list[Ids]:
        return [text[:, None] for text in self.texts]


@pytest.fixture(scope="module")
def court(ground: Any) -> Court:
    return Court(ground)


@pytest.fixture(scope="module")
def judge(court: Court) -> Judge:
    return court.judge()


def figure(scores: Scores, name: str, of: str = "") -> Metric:
    return next(metric for metric in scores.metrics if (metric.name, metric.of) == (name, of))


def value(scores: Scores, name: str) -> float:
    return figure(scores, name).measured.value


# Tokens.


def test_true_tokens_are_all_of_them_and_the_interval_says_how_many_were_looked_at(court: Court, judge: Judge) -> None:
    scores = judge.score(Claims(tokens=court.right))
    assert {metric.name: metric.measured.value for metric in scores.metrics} == {
        "token_top1": 1.0,
        "sequence_exact": 1.0,
        "rouge_l": 1.0,
    }
    top = figure(scores, "token_top1")
    assert top.counted == 8 * 47  # 48 fed, of which all begin alike
    assert 0.98 < top.measured.low < 1.0
    assert figure(scores, "sequence_exact").counted == 8
    assert figure(scores, "sequence_exact").measured.low < 0.7


def test_no_guess_is_no_token_and_the_interval_does_not_say_never(court: Court, judge: Judge) -> None:
    scores = judge.score(Claims(tokens=[np.full_like(text, NO_GUESS) for text in court.right]))
    for metric in scores.metrics:
        assert metric.measured.value == 0.0
        assert metric.measured.high > 0.0


def test_tokens_after_the_first_guess_count_among_ten_and_only_there(court: Court, judge: Judge) -> None:
    behind = [np.hstack([np.full((len(text), 9), NO_GUESS), text]) for text in court.right]
    scores = judge.score(Claims(tokens=behind))
    assert (value(scores, "token_top1"), value(scores, "token_top10")) == (0.0, 1.0)
    eleventh = [np.hstack([np.full((len(text), 1), NO_GUESS), text]) for text in behind]
    assert value(judge.score(Claims(tokens=eleventh)), "token_top10") == 0.0


def test_a_beginning_that_all_texts_share_is_nobodys_finding(court: Court, judge: Judge) -> None:
    only_first = [np.where(np.arange(len(text))[:, None] == 0, text, NO_GUESS) for text in court.right]
    assert value(judge.score(Claims(tokens=only_first)), "token_top1") == 0.0
    unshared = court.judge(public_text=[np.array([3, 5]), np.array([4, 5])])
    found = figure(unshared.score(Claims(tokens=only_first)), "token_top1")
    assert found.measured.value == pytest.approx(1 / 48)
    assert found.counted == 8 * 48


def test_one_wrong_token_spoils_its_session_alone(court: Court, judge: Judge) -> None:
    claimed = [text.copy() for text in court.right]
    claimed[3][20] = NO_GUESS
    scores = judge.score(Claims(tokens=claimed))
    assert value(scores, "token_top1") == pytest.approx(1 - 1 / 376)
    assert value(scores, "sequence_exact") == pytest.approx(7 / 8)
    assert value(scores, "rouge_l") == pytest.approx(1 - (1 - 2 * 46 / 93) / 8)


def test_every_figure_stands_beside_the_best_prior_guess_by_name(court: Court, ground: Any, judge: Judge) -> None:
    known = priors.guesses(ground.plain, ground.public, ground.material("paper").victims)
    own = judge.score(Claims(tokens=known[priors.OWN_PREDICTION]))
    common = judge.score(Claims(tokens=known[priors.COMMONEST]))
    for name in ("token_top1", "token_top10", "rouge_l"):
        assert figure(own, name).prior_name == figure(common, name).prior_name == priors.OWN_PREDICTION
        assert figure(own, name).measured == figure(own, name).prior == figure(common, name).prior
        assert value(common, name) < value(own, name)
        assert figure(own, name).weaker_priors == {priors.COMMONEST: figure(common, name).measured}


def test_the_commonest_token_is_the_prior_where_it_is_the_better_guess(court: Court, ground: Any) -> None:
    monotonous = [np.concatenate([text[:1], np.full(60, 1999)]) for text in ground.public]
    victims = [
        replace(victim, ids=np.concatenate([victim.ids[:1], np.full(47, 1999)]))
        for victim in ground.material("paper").victims
    ]
    judge = court.judge(public_text=monotonous, victims=victims)
    found = figure(judge.score(Claims(tokens=court.right)), "token_top1")
    assert (found.prior_name, found.prior and found.prior.value) == (priors.COMMONEST, 1.0)


def test_recovery_does_not_depend_on_the_order_of_sessions(court: Court, ground: Any, judge: Judge) -> None:
    generator = np.random.default_rng(1)
    claimed = [np.where(generator.random(text.shape) < 0.6, text, NO_GUESS) for text in court.right]
    order = generator.permutation(len(claimed))
    victims = [ground.material("paper").victims[place] for place in order]
    shuffled = court.judge(victims=victims).score(Claims(tokens=[claimed[place] for place in order]))
    first = judge.score(Claims(tokens=claimed))
    for name in ("token_top1", "sequence_exact", "rouge_l"):
        assert value(shuffled, name) == pytest.approx(value(first, name))
        assert figure(shuffled, name).measured.high == pytest.approx(figure(first, name).measured.high, abs=0.02)


def test_answers_are_judged_at_the_positions_that_they_led_to(court: Court, judge: Judge) -> None:
    only_answers = [np.where(np.arange(len(text))[:, None] >= 24, text, NO_GUESS) for text in court.right]
    scores = judge.score(
        Claims(tokens=only_answers, scope="answers", points=[Point("labelled tokens", 10.0, only_answers)])
    )
    assert figure(scores, "token_top1").counted == 8 * 24
    assert [value(scores, name) for name in ("token_top1", "sequence_exact", "rouge_l")] == [1.0, 1.0, 1.0]
    assert figure(scores, "token_top1").prior_name == priors.COMMONEST  # an answer is the model's own prediction
    assert scores.points[0].measured.value == 1.0
    assert value(judge.score(Claims(tokens=only_answers)), "token_top1") == pytest.approx(24 / 47)


def test_points_of_a_curve_are_judged_as_tokens_are(court: Court, judge: Judge) -> None:
    half = [np.where(np.arange(len(text))[:, None] % 2, text, NO_GUESS) for text in court.right]
    scores = judge.score(Claims(tokens=court.right, points=[Point("labelled tokens", 1e3, half)]))
    (point,) = scores.points
    assert (point.curve, point.x) == ("labelled tokens", 1e3)
    assert point.measured == figure(judge.score(Claims(tokens=half)), "token_top1").measured


# Keys.


def test_a_vocabulary_permutation_is_counted_entry_by_entry(ground: Any, judge: Judge) -> None:
    true = ground.truth("paper").vocabulary
    assert value(judge.score(Claims(vocabulary=true)), "vocabulary_recovered") == 1.0
    known = np.where(np.arange(len(true)) < 512, true, NO_GUESS)
    found = figure(judge.score(Claims(vocabulary=known)), "vocabulary_recovered")
    assert (found.measured.value, found.counted) == (0.25, 2048)
    assert found.prior_name == priors.RANDOM
    assert found.prior == Interval(value=1 / 2048, low=1 / 2048, high=1 / 2048)


def test_a_residual_permutation_is_counted_entry_by_entry(ground: Any, judge: Judge) -> None:
    true = ground.truth("paper").residual
    swapped = true[[1, 0, *range(2, len(true))]]
    found = figure(judge.score(Claims(residual=swapped)), "residual_permutation")
    assert found.measured.value == pytest.approx(190 / 192)
    assert found.counted == 192


def test_a_dense_residual_key_is_known_by_its_columns(court: Court, ground: Any) -> None:
    true, judge = ground.truth("hardened").residual, court.judge("hardened")
    assert value(judge.score(Claims(residual=true)), "residual_cosine") == pytest.approx(1.0)
    drawn = np.linalg.qr(np.random.default_rng(2).normal(size=true.shape))[0]
    found = figure(judge.score(Claims(residual=drawn)), "residual_cosine")
    assert isinstance(found.prior, Interval)
    assert found.measured.low < found.prior.value < found.measured.high


def test_axes_without_order_stand_beside_random_axes_put_in_order_as_kindly(court: Court, ground: Any) -> None:
    true, judge = ground.truth("hardened").residual, court.judge("hardened")
    generator = np.random.default_rng(3)
    claimed = true[:, generator.permutation(len(true))]
    found = figure(judge.score(Claims(residual=claimed, unordered=True)), "residual_cosine")
    assert found.measured.value == pytest.approx(1.0)
    random = np.linalg.qr(generator.normal(size=true.shape))[0]
    nothing = figure(judge.score(Claims(residual=random, unordered=True)), "residual_cosine")
    assert nothing.prior is not None
    assert nothing.measured.value > 0.1  # more than without an order, and no finding:
    assert nothing.measured.low < nothing.prior.value < nothing.measured.high
    assert value(judge.score(Claims(residual=claimed)), "residual_cosine") < 0.2


def test_a_key_relative_to_a_siblings_is_this_key_over_that_one(court: Court, ground: Any) -> None:
    judge = court.judge("paper", "sibling")
    ours, theirs = ground.truth("paper").residual, ground.truth("paper", 1).residual
    relative = ours @ np.linalg.inv(theirs)
    assert value(judge.score(Claims(residual=relative, relative=True)), "residual_permutation") == 1.0
    assert value(judge.score(Claims(residual=ours, relative=True)), "residual_permutation") < 0.1


# Stolen models.


@dataclass
class Distorted:
    """A stolen model that is the plain one, with noise on its logits."""

    plain: Any
    noise: float

    def logits(self, ids: Ids) -> Floats:
        noise = np.random.default_rng(4).normal(0, self.noise, (len(ids), 2048))
        return (CompleteModel(self.plain.model).logits(ids) + noise).astype(np.float32)


def test_a_stolen_model_agrees_and_predicts_as_well_as_it_is_true(ground: Any, judge: Judge) -> None:
    stolen = [("rough", Distorted(ground.plain, 3.0)), ("exact", Distorted(ground.plain, 0.0))]
    scores = judge.score(Claims(stolen=stolen, figures={"epochs": 3.0}))
    assert [(metric.name, metric.of) for metric in scores.metrics] == [
        ("stolen_agreement", "exact"),
        ("stolen_agreement", "rough"),
        ("stolen_perplexity", "exact"),
        ("stolen_perplexity", "rough"),
    ]
    exact, rough = figure(scores, "stolen_agreement", "exact"), figure(scores, "stolen_agreement", "rough")
    assert exact.measured.value == 1.0
    assert 0.1 < rough.measured.value < 0.9
    assert exact.counted == 4 * 48
    perplexity = figure(scores, "stolen_perplexity", "exact")
    assert isinstance(perplexity.measured, Bounds)
    assert isinstance(perplexity.prior, Bounds)
    assert scores.figures == {"epochs": 3.0, "plain_perplexity": perplexity.measured.value}
    assert perplexity.measured.low < perplexity.measured.value < perplexity.measured.high < perplexity.prior.low


def test_the_prior_of_a_stolen_model_is_the_attackers_own(ground: Any, judge: Judge) -> None:
    claims = Claims(stolen=[("own", CompleteModel(ground.surrogate.model))])
    found = figure(judge.score(claims), "stolen_agreement", "own")
    assert (found.measured, found.prior_name) == (found.prior, priors.SURROGATE)


# What is refused.


class Wrong:
    """A stolen model that gives anything."""

    def __init__(self, logits: Callable[[int], Floats]) -> None:
        self._logits = logits

    def logits(self, ids: Ids) -> Floats:
        return self._logits(len(ids))


def changed(texts: Sequence[Ids], one: Any) -> list[Ids]:
    return [one, *texts[1:]]


REFUSED: dict[str, tuple[Callable[[list[Ids]], Claims], str]] = {
    "nothing at all": (lambda right: Claims(figures={"rows": 2.0}), "nothing that can be held"),
    "a session too few": (lambda right: Claims(tokens=right[1:]), "tokens of 7 sessions, of 8"),
    "a position too few": (lambda right: Claims(tokens=changed(right, right[0][1:])), r"not \[48, k\]"),
    "guesses without a column": (lambda right: Claims(tokens=changed(right, right[0][:, 0])), r"not \[48, k\]"),
    "no guess a position": (lambda right: Claims(tokens=changed(right, right[0][:, :0])), r"not \[48, k\]"),
    "shares instead of ids": (lambda right: Claims(tokens=changed(right, right[0] * 1.0)), "no ids below 2048"),
    "an id too large": (lambda right: Claims(tokens=changed(right, right[0] + 2048)), "no ids below 2048"),
    "an id below no guess": (lambda right: Claims(tokens=changed(right, right[0] - 2048)), "no ids below 2048"),
    "a point of another form": (
        lambda right: Claims(tokens=right, points=[Point("x", 1.0, right[1:])]),
        "tokens of 7 sessions",
    ),
    "a figure without end": (lambda right: Claims(tokens=right, figures={"a": np.inf}), "figures .'a'. are not finite"),
    "a vocabulary of another size": (lambda right: Claims(vocabulary=np.arange(5)), "vocabulary of"),
    "a residual of another width": (lambda right: Claims(residual=np.eye(5)), "residual of"),
    "a residual that is no number": (lambda right: Claims(residual=np.full((192, 192), np.nan)), "finite"),
    "axes of a permutation": (lambda right: Claims(residual=np.eye(192), unordered=True), "axes of a permutation"),
    "relative to nobody": (lambda right: Claims(residual=np.eye(192), relative=True), "there is none"),
    "logits of another shape": (
        lambda right: Claims(stolen=[("x", Wrong(lambda n: np.zeros((n, 7), np.float32)))]),
        "logits",
    ),
    "logits that are no numbers": (
        lambda right: Claims(stolen=[("x", Wrong(lambda n: np.full((n, 2048), np.nan, np.float32)))]),
        "logits",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_claims_of_the_wrong_form_are_a_fault_and_no_finding(court: Court, judge: Judge, case: str) -> None:
    claims, message = REFUSED[case]
    with pytest.raises(ClaimInvalid, match=message):
        judge.score(claims(court.right))


def test_a_vocabulary_that_no_server_sees_cannot_be_claimed(court: Court) -> None:
    with pytest.raises(ClaimInvalid, match="no server sees"):
        court.judge("hardened").score(Claims(vocabulary=np.arange(2048)))


def silent(ground: Any) -> list[Labelled]:
    """Victims who were answered nothing."""
    victims = ground.material("paper").victims
    return [replace(victim, seen=replace(victim.seen, asked=np.array([], np.int64))) for victim in victims]


def test_answers_that_nobody_was_given_are_not_applicable_and_no_figure_of_0(court: Court, ground: Any) -> None:
    with pytest.raises(NotApplicable, match="an answer"):
        court.judge(victims=silent(ground)).score(Claims(tokens=court.right, scope="answers"))


def test_what_else_was_claimed_counts_where_nobody_was_answered(court: Court, ground: Any) -> None:
    points = (Point("labelled tokens", 1.0, court.right),)
    order = ground.truth("paper").vocabulary
    scores = court.judge(victims=silent(ground)).score(Claims(vocabulary=order, points=points, scope="answers"))
    assert [metric.name for metric in scores.metrics] == ["vocabulary_recovered"]
    assert scores.points == ()


def test_a_beginning_that_everybody_knows_is_all_that_was_said(court: Court, ground: Any) -> None:
    first = [observe(ground.truth("paper"), text[:2], 1) for text in ground.victims]
    with pytest.raises(NotApplicable, match="behind its beginning"):
        court.judge(victims=first).score(Claims(tokens=[text[:1] for text in court.right]))
