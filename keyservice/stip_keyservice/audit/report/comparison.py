"""What papers claim and earlier experiments saw, beside what was measured here.

Figures are cited from their sources; `Claim.note` says what keeps one from being compared with ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from stip_keyservice.audit.document import Cell, Correlation, Metric, Report
from stip_keyservice.audit.report.numbers import amount, between, figure
from stip_keyservice.audit.report.words import rows

ARXIV = "STIP, arXiv 2312.00025"
NDSS = "STIP, NDSS 2026"
SYNTHETIC = "own experiments before this audit, on synthetic weights"
SCALE = "Not comparable in scale: other models, other texts."


@dataclass(frozen=True)
class Correlated:
    """Ours: the distance correlations of a report."""

    of: Literal["rows", "weights"]
    what: str = "Székely's dCor and 1 − |Pearson| of entries"


@dataclass(frozen=True)
class Measured:
    """Ours: what an attack measured, row by row of the matrix."""

    letter: str
    what: str = "Tokens read"
    """What the figures are, for the reader."""
    metrics: tuple[str, ...] = ("token_top1",)
    """Their names, one or several."""
    figures: tuple[str, ...] = ()
    """Words in the names of its other figures; empty: none."""
    curve: bool = False


@dataclass(frozen=True)
class Claim:
    """One figure from elsewhere."""

    subject: str
    source: str
    figure: str
    ours: Correlated | Measured
    note: str = ""


CLAIMS = (
    Claim(
        "Distance correlation of the weights before and after the key",
        f"{ARXIV}, Fig. 6a; {NDSS}, Fig. 7",
        "0.062 on average over GPT2-1.5b (random projection: 0.76)",
        Correlated("weights"),
        "The arXiv text cites Székely's measure, the NDSS figures are 1 − Pearson. Either says that entries moved, not "
        "that nobody can read them: for that see attack B with a known table, on the same rows. " + SCALE,
    ),
    Claim(
        "Distance correlation of the embeddings before and after the key",
        f"{ARXIV}, Fig. 6b; {NDSS}, Fig. 7",
        "0.14 at width 128, falling to 0.017 at width 8192 (random projection: above 0.6)",
        Correlated("rows"),
        "As above. The papers take it for a bound on leakage; it bounds no attack. " + SCALE,
    ),
    Claim(
        "The protected model by itself is of no use",
        f"{ARXIV}, Table 4",
        "one prompt to GPT2-1.5b: the protected weights alone continue it with meaningless tokens",
        Measured("G", "Next tokens on which a copy agrees", ("stolen_agreement",)),
        "The server part lacks what only its enclave has; beside it stands what it gives with one user's help. "
        + SCALE,
    ),
    Claim(
        "Extracting the model by training on authorised pairs",
        f"{NDSS}, Table V",
        "perplexity, GPT2-124m: original 31; from scratch 538; train-transformed 919–1028; train-linear 11640–13963",
        Measured(
            "J",
            "Perplexity of models made with one user's help, and of the original",
            ("stolen_perplexity",),
            ("plain_perplexity",),
        ),
        SCALE,
    ),
    Claim(
        "Fitting a linear map from known pairs",
        f"{NDSS}, Fig. 9b",
        "a linear fit x → x′ from authorised pairs; its values are not quoted here",
        Measured(
            "J",
            "Error of the fit on rows that were not fitted, and tokens read through it",
            (),
            ("relative error",),
            curve=True,
        ),
        SCALE,
    ),
    Claim(
        "A: vocabulary matching",
        "Hidden No More, ICML 2025, arXiv 2505.18332",
        "97.6–100 % of decodes perfect, Gemma-2-2B and Llama-3.1-8B",
        Measured("A", "Tokens, sessions whole", ("token_top1", "sequence_exact")),
        SCALE,
    ),
    Claim(
        "B: sorted-value fingerprint",
        SYNTHETIC,
        "100 % of tokens with the table known; at least 99.5 % with a table off by a tenth",
        Measured("B"),
    ),
    Claim(
        "C: norm and Gram matching",
        SYNTHETIC,
        "orthogonal key: fp32, norms alone 99.6 %, with inner products 100 % from two tokens on; bf16, 1.9 % alone, "
        "100 % from eight tokens on",
        Measured("C"),
    ),
    Claim(
        "D: alignment to a public base",
        SYNTHETIC,
        "100 % with weights that moved by 0–10 %, within seconds at width 256",
        Measured("D"),
    ),
    Claim("E: linking two instances", SYNTHETIC, "exact", Measured("E")),
    Claim(
        "F: ArrowMatch",
        "Game of Arrows, USENIX Security 2025",
        "over 98 % of weights of TransLinkGuard, TSQP, SOTER, ShadowNet and Tempo",
        Measured(
            "F",
            "Rows of matrices matched, and next tokens on which the model put together agrees",
            ("stolen_agreement",),
            ("rows matched", "taken from"),
        ),
        "They count weights of other schemes. " + SCALE,
    ),
    Claim(
        "G: theft by operator and user",
        SYNTHETIC,
        "the vocabulary key 100 %, the stolen model agrees on 94–97 %",
        Measured("G", "Vocabulary key, next tokens", ("vocabulary_recovered", "stolen_agreement")),
    ),
    Claim(
        "H: attacks on the KV cache",
        "Shadow in the Cache, NDSS 2026",
        "BERTScore 1.0 without a defence",
        Measured("H", "ROUGE-L", ("rouge_l",)),
        SCALE,
    ),
    Claim(
        "I: frequency analysis",
        "argued, and reported for substitution ciphers",
        "weak alone: about 5 % among ten guesses",
        Measured("I", "Tokens: first guess, among ten", ("token_top1", "token_top10")),
        SCALE,
    ),
    Claim("K: reply splicing", SYNTHETIC, "100 % of the answer's tokens", Measured("K", "Tokens of answers read")),
    Claim(
        "L: dictionary by ordinary use",
        "counted on text, vocabulary 32,000",
        "10,000 tokens of a helping user cover 73 % of a victim's, 100,000 cover 91 %",
        Measured("L", "Tokens read, by labelled tokens", (), curve=True),
        SCALE,
    ),
    Claim(
        "M: trained inverter",
        SYNTHETIC,
        "64,000 labelled tokens: 35–100 % behind one block, 25–100 % behind four",
        Measured("M", "Tokens read, by blocks in the enclave", (), curve=True),
        SCALE,
    ),
    Claim(
        "N: tied table under a dense key",
        SYNTHETIC,
        "100 % in fp32, 97 % in bf16",
        Measured("N", "The residual key", ("residual_cosine", "residual_permutation")),
    ),
)


def ours(claim: Claim, report: Report) -> str:
    """What a report has beside a claim; empty where it was not measured."""
    if isinstance(claim.ours, Correlated):
        return "; ".join(_correlation(each) for each in report.correlations if each.what == claim.ours.of)
    cells = {cell.knowledge: cell for cell in report.cells if cell.attack == claim.ours.letter}
    said = {knowledge: _of_cell(claim.ours, cells[knowledge]) for knowledge in rows(report) if knowledge in cells}
    return "; ".join(f"{knowledge} {', '.join(lines)}" for knowledge, lines in said.items() if lines)


def _of_cell(which: Measured, cell: Cell) -> list[str]:
    said = [_metric(metric) for name in which.metrics for metric in cell.metrics if metric.name == name]
    for name, value in sorted(cell.figures.items(), key=lambda item: _natural(item[0])):
        if any(words in name for words in which.figures):
            said.append(f"{name.replace('_', ' ')} {amount(value)}")
    if which.curve:
        said += [f"{figure(point.measured)} at {amount(point.x)}" for point in cell.points]
    return said


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts numbers in a name by their value, whatever their length."""
    parts = re.split(r"([0-9]+)", name)  # texts and numbers in turn
    return [(len(part.lstrip("0")), part.lstrip("0")) if at % 2 else (-1, part) for at, part in enumerate(parts)]


def _metric(metric: Metric) -> str:
    of = f"{metric.of} " if metric.of else ""
    return f"{of}{figure(metric.measured)} ({between(metric.measured)})"


def _correlation(each: Correlation) -> str:
    said = f"{amount(each.distance_correlation)} and {amount(each.one_minus_pearson)}"
    whole = each.distance_correlation_of_rows
    return said if whole is None else f"{said}; dCor of whole rows {amount(whole)}"
