"""Reports whose numbers are made up: round, and of an instance that does not exist."""

from __future__ import annotations

import pytest

from stip_keyservice.audit.document import Bounds, Cell, Correlation, Metric, Point, Report, Subject, Traffic
from stip_protocol.leakage import Interval

TOKENS, SESSIONS = 2000, 20
GUESS, SURROGATE = 0.18, 0.22
"""Made up: of the best guess of a token, and of an agreement with the model."""
RUN = {
    "A": ("server", "base"),
    "B": ("server", "drifted", "table", "base"),
    "C": ("server", "drifted", "table", "base"),
    "D": ("base",),
    "E": ("sibling",),
    "F": ("base",),
    "G": ("accomplice",),
    "H": ("base",),
    "I": ("server",),
    "J": ("accomplice",),
    "K": ("accomplice",),
    "L": ("accomplice",),
    "M": ("accomplice",),
    "N": ("enclave",),
    "O": ("host",),
}
ROWS = ("server", "drifted", "table", "base", "accomplice", "sibling", "enclave", "host")
READ = {
    "paper": {"B": (0.17, 0.995, 1.0, 1.0), "C": (0.16, 0.97, 1.0, 1.0), "A": (0.18, 1.0), "I": (0.12,), "O": (0.31,)},
    "hardened": {
        "B": (0.15, 0.15, 0.15, 0.15),
        "C": (0.16, 0.62, 1.0, 1.0),
        "A": (0.17, 0.99),
        "I": (0.12,),
        "O": (0.31,),
    },
    "throughput": {
        "B": (0.15, 0.15, 0.15, 0.15),
        "C": (0.16, 0.9, 1.0, 1.0),
        "A": (0.18, 1.0),
        "I": (0.205,),
    },
}
"""Made up: tokens read by attack, over its rows."""
HELPED = {"D": 0.998, "E": 0.999, "H": 0.93, "K": 1.0, "L": 0.88, "M": 0.35}


def interval(value: float, counted: int = TOKENS) -> Interval:
    """An interval about as wide as of so many tokens."""
    half = 2 * (max(value * (1 - value), 1 / counted) / counted) ** 0.5
    return Interval(value=value, low=max(0.0, value - half), high=min(1.0, value + half))


def share(name: str, value: float, guess: float | None, *, named: str = "own prediction", of: str = "") -> Metric:
    """One share beside its guess."""
    prior = None if guess is None else interval(guess)
    return Metric(name=name, of=of, measured=interval(value), prior=prior, prior_name=named, counted=TOKENS)


def tokens(value: float) -> tuple[Metric, ...]:
    """What an attack on texts comes to."""
    whole = Interval(value=float(value == 1), low=0.8 if value == 1 else 0.0, high=1.0 if value == 1 else 0.17)
    return (
        share("token_top1", value, GUESS),
        share("token_top10", min(1.0, value * 1.3), 0.5),
        Metric(
            name="sequence_exact",
            measured=whole,
            prior=Interval(value=0, low=0, high=0.17),
            prior_name="own prediction",
            counted=SESSIONS,
        ),
        share("rouge_l", min(1.0, value * 1.1), 0.25),
    )


def perplexity(of: str, value: float) -> Metric:
    return Metric(
        name="stolen_perplexity",
        of=of,
        measured=Bounds(value=value, low=value * 0.95, high=value * 1.06),
        prior=Bounds(value=140, low=130, high=151),
        prior_name="surrogate",
        counted=TOKENS,
    )


def _cell(letter: str, knowledge: str, preset: str) -> Cell:
    less = {"paper": 0.0, "hardened": 0.04, "throughput": 0.08}[preset]
    if knowledge not in RUN[letter]:
        reason = f"gives {letter} nothing that another row does not give it"
        if "base" in RUN[letter] and len(RUN[letter]) == 1:
            reason = "needs the public model from which this one derives"
        return Cell(attack=letter, knowledge=knowledge, not_applicable=reason)
    found = READ[preset].get(letter)
    if found is not None:
        metrics = tokens(found[RUN[letter].index(knowledge)])
        if letter in "BC" and knowledge != "server":
            metrics += (share("residual_cosine", found[1], 0.06, named="random guess"),)
        return Cell(attack=letter, knowledge=knowledge, metrics=metrics, figures={"rows_matched": 64.0})
    if letter in "GJF":
        vocabulary = share("vocabulary_recovered", 1.0, 0.001, named="random guess")
        models = {"train-transformed": 0.41, "from scratch": 0.2} if letter == "J" else {"": 0.95}
        stolen = tuple(
            share("stolen_agreement", value, SURROGATE, named="surrogate", of=of) for of, value in models.items()
        )
        metrics = (*stolen, *(perplexity(of, 40 / value) for of, value in models.items()))
        if letter == "G" and preset != "hardened":
            metrics = (vocabulary, *metrics)
        points = [
            Point(curve="labelled rows of a linear fit", x=x, measured=interval(0.02 * index))
            for index, x in enumerate((48, 96, 192, 384))
        ]
        figures = {"plain_perplexity": 31.5, "gate: rows matched as they are": 0.01}
        return Cell(
            attack=letter,
            knowledge=knowledge,
            metrics=metrics,
            figures=figures if letter != "G" else {},
            points=tuple(points) if letter == "J" else (),
        )
    if letter in HELPED:
        points = []
        if letter == "L":
            points = [
                Point(curve="labelled tokens", x=x, measured=interval(value - less))
                for x, value in ((10, 0.21), (100, 0.4), (1000, 0.6), (10000, 0.81), (64000, HELPED["L"]))
            ]
        if letter == "M":
            points = [
                Point(curve="blocks in the enclave", x=x, measured=interval(value - less))
                for x, value in ((0, 0.88), (1, HELPED["M"]), (4, 0.27))
            ]
        return Cell(attack=letter, knowledge=knowledge, metrics=tokens(HELPED[letter]), points=tuple(points))
    reasons = {"N": "the head is not tied to the embedding", "O": "no table lies in the enclave"}
    return Cell(attack=letter, knowledge=knowledge, not_applicable=reasons[letter])


def made_up(preset: str, origin: str = "bundled model", instance: str = "0123456789abcdef", seed: int = 0) -> Report:
    """A whole report of an instance under a preset."""
    return Report(
        subject=Subject(
            instance=instance,
            epoch=1,
            preset=preset,
            dtype="float32",
            width=192,
            vocabulary=2048,
            layers=5,
            tied=False,
            origin=origin,
            server_sha256="5e" * 32,
        ),
        traffic=Traffic(
            source="recorded", sha256="7a" * 32, sessions=SESSIONS, positions=TOKENS, accomplice_tokens=64000
        ),
        seed=seed,
        versions={"torch": "2.13.0", "transformers": "5.19.0", "numpy": "2.4.6", "stip": "0.1.0"},
        cells=tuple(_cell(letter, knowledge, preset) for knowledge in ROWS for letter in RUN),
        correlations=(
            Correlation(
                what="rows", one_minus_pearson=0.98, distance_correlation=0.02, distance_correlation_of_rows=1.0
            ),
            Correlation(what="weights", one_minus_pearson=0.99, distance_correlation=0.01),
        ),
    )


@pytest.fixture(scope="session")
def reports() -> list[Report]:
    """The bundled model under every preset, and a fine-tune of it under two."""
    tuned = "a fine-tune of the bundled model"
    return [
        made_up("paper"),
        made_up("hardened"),
        made_up("throughput"),
        made_up("hardened", tuned, "fedcba9876543210"),
        made_up("paper", tuned, "fedcba9876543211"),
    ]
