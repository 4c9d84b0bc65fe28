"""Figures of one comparison: what was claimed against what is so. Intervals around them are `intervals`'."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, lgamma, log, pi

import numpy as np
from numpy.typing import NDArray

from stip_keyservice.audit.document import Correlation
from stip_keyservice.audit.view import Floats, Ids

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

FLOOR = 1e-12
"""The smallest probability that a perplexity counts, so that one token thought impossible does not make it infinite."""
ENTRIES = 2000
"""Entries that a distance correlation is taken over: it costs memory by their square."""
ROWS = 1000
_TINY = 1e-9
"""Of a key's entries of about 1, what is rounding."""


def found(guesses: Ids, true: Ids, first: int) -> NDArray[np.bool_]:
    """[n] whether the true id [n] is among the `first` ones of the guesses [n, k], the best first."""
    return np.asarray((guesses[:, :first] == true[:, None]).any(axis=1))


def rouge_l(claimed: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> Vector:
    """[S] ROUGE-L of each text: the F1 of precision and recall of the longest common subsequence of words (Lin, ROUGE,
    2004, equations 2-4 with β = 1). Two texts without a word are alike."""
    ours, theirs = _numbered(claimed, true)
    lengths = np.array([len(one) + len(other) for one, other in zip(claimed, true, strict=True)])
    longest = _longest_common_subsequence(ours, theirs)
    return np.where(lengths == 0, 1.0, 2 * longest / np.maximum(lengths, 1))


def _numbered(claimed: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> tuple[Ids, Ids]:
    """Words as numbers, [S, longest] each, padded with numbers that equal nothing on the other side."""
    number: dict[str, int] = {}
    sides = []
    for texts, padding in ((claimed, -1), (true, -2)):
        padded = np.full((len(texts), max(map(len, texts), default=0)), padding, np.int64)
        for row, words in zip(padded, texts, strict=True):
            row[: len(words)] = [number.setdefault(word, len(number)) for word in words]
        sides.append(padded)
    return sides[0], sides[1]


def _longest_common_subsequence(ours: Ids, theirs: Ids) -> Ids:
    """[S] lengths, of sequences [S, m] and [S, n], by the textbook's table, a row of all texts at a time.

    Cell (i, j) is the largest of its left and upper neighbours and, where the words are equal, one more than the upper
    left one; in the running maximum along a row, the left neighbour takes care of itself.
    """
    above = np.zeros((len(ours), theirs.shape[1] + 1), np.int64)
    for word in ours.T:
        equal = word[:, None] == theirs
        above[:, 1:] = np.maximum(above[:, 1:], above[:, :-1] + equal)
        np.maximum.accumulate(above, axis=1, out=above)
    return above[:, -1]


def is_permutation(key: Matrix) -> bool:
    """Whether a key [d, d] moves and negates entries only."""
    moved = np.abs(key) > _TINY
    return bool((moved.sum(axis=0) == 1).all() and (moved.sum(axis=1) == 1).all() and (np.abs(key[moved]) == 1).all())


def permutation_found(claimed: Matrix, true: Matrix) -> NDArray[np.bool_]:
    """[d] whether each row's largest entry is at the place of a (signed) permutation's, with its sign.

    A row of zeros is no claim.
    """
    rows, places = np.arange(len(true)), np.abs(true).argmax(axis=1)
    right = np.abs(claimed).argmax(axis=1) == places
    return np.asarray(right & (np.sign(claimed[rows, places]) == np.sign(true[rows, places])))


def cosines(claimed: Matrix, true: Matrix) -> Vector:
    """[d] |cosine| between columns of claimed and true key; 0 of a column of zeros.

    A key behind a LayerNorm drops the all-ones direction, which nothing reads: what a claim says of it does not count.
    """
    if np.abs(true.sum(axis=1)).max() < _TINY * len(true):
        claimed = claimed - claimed.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(claimed, axis=0) * np.linalg.norm(true, axis=0)
    found = np.abs((claimed * true).sum(axis=0)) / np.where(lengths > 0, lengths, np.inf)
    return np.asarray(np.minimum(1.0, found))


def axes_in_order(claimed: Matrix, true: Matrix) -> Matrix:
    """[d, d] the claimed columns, each at the place of a true one: pairs are taken by |cosine|, the largest first, each
    column once. For claims that know a key's axes but not which is which."""
    lengths = np.linalg.norm(claimed, axis=0)[:, None] * np.linalg.norm(true, axis=0)
    alike = np.abs(claimed.T @ true) / np.where(lengths > 0, lengths, np.inf)
    ordered = np.zeros_like(claimed)
    while alike.max() > 0:
        best = alike.argmax(axis=1)
        mutual = np.flatnonzero((alike.argmax(axis=0)[best] == np.arange(len(best))) & (alike.max(axis=1) > 0))
        ordered[:, best[mutual]] = claimed[:, mutual]
        alike[:, best[mutual]] = alike[mutual] = 0.0
    return ordered


def random_cosine(width: int) -> float:
    """Expected |cosine| of two independent directions of d dimensions: Γ(d/2) / (√π·Γ((d + 1)/2)), from the first
    coordinate of a uniform point on the sphere, whose square is Beta(1/2, (d - 1)/2)."""
    return exp(lgamma(width / 2) - lgamma((width + 1) / 2) - log(pi) / 2)


def surprise(logits: Floats, true: Ids) -> Vector:
    """[n] -ln of the probability that logits [n, V] give the true ids [n], at most -ln `FLOOR`."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    given = wide[np.arange(len(true)), true] - np.log(np.exp(wide).sum(axis=1))
    return np.asarray(np.minimum(-given, -log(FLOOR)))


def one_minus_pearson(x: NDArray[np.floating], y: NDArray[np.floating]) -> float:
    """1 - |Pearson's correlation| of the flattened entries of two arrays: what the NDSS paper's figures call distance
    correlation. 1 where either does not vary."""
    one, other = x.ravel().astype(np.float64), y.ravel().astype(np.float64)
    one, other = one - one.mean(), other - other.mean()
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return 1.0 if lengths == 0 else 1.0 - min(1.0, abs(float(one @ other)) / lengths)


def distance_correlation(x: NDArray[np.floating], y: NDArray[np.floating]) -> float:
    """Székely's dCor of n ≥ 4 pairs x [n, p] and y [n, q]: 0 for independent ones, 1 where distances are alike up to a
    factor (Székely, Rizzo and Bakirov, Annals of Statistics 35, 2007).

    The square is the bias-corrected statistic of U-centred distances (Székely and Rizzo, Journal of Multivariate
    Analysis 117, 2013), taken as 0 where it is negative. 0 where either does not vary.
    """
    if len(x) < 4 or len(x) != len(y):
        raise ValueError(f"{len(x)} and {len(y)} rows, not four or more pairs")
    one, other = _centred_distances(x), _centred_distances(y)
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    if lengths == 0:
        return 0.0
    return float(np.sqrt(np.clip((one * other).sum() / lengths, 0.0, 1.0)))


def _centred_distances(points: NDArray[np.floating]) -> Matrix:
    """[n, n] U-centred Euclidean distances of points [n, p]: sums of rows and columns are 0, and the diagonal."""
    wide, count = points.astype(np.float64), len(points)
    wide = wide - wide.mean(axis=0)
    squares = (wide**2).sum(axis=1)
    distances = squares[:, None] + squares - 2 * (wide @ wide.T)
    distances = np.sqrt(np.maximum(distances, 0.0, out=distances), out=distances)
    np.fill_diagonal(distances, 0.0)
    sums = distances.sum(axis=0)
    distances += sums.sum() / ((count - 1) * (count - 2)) - (sums[:, None] + sums) / (count - 2)
    np.fill_diagonal(distances, 0.0)
    return np.asarray(distances)


def correlation(what: str, plain: Floats, keyed: Floats, generator: np.random.Generator) -> Correlation:
    """The two "distance correlations" of rows or weights [n, d] before and after the key, `what` being which.

    1 - |Pearson| of all entries; Székely's dCor of a sample of `ENTRIES` entries one by one, as the papers look at
    them, and of `ROWS` whole rows, whose distances an orthogonal key leaves as they are.
    """
    entries = generator.choice(plain.size, min(ENTRIES, plain.size), replace=False)
    rows = generator.choice(len(plain), min(ROWS, len(plain)), replace=False)
    return Correlation.model_validate(
        {
            "what": what,
            "one_minus_pearson": one_minus_pearson(plain, keyed),
            "distance_correlation": distance_correlation(plain.reshape(-1, 1)[entries], keyed.reshape(-1, 1)[entries]),
            "distance_correlation_of_rows": distance_correlation(plain[rows], keyed[rows]),
        }
    )
