"""N: the residual key from the two keyed tables of a model whose head is its embedding.

The enclave of such a model holds E·Kᵀ and E·Γ·Kᵀ, Γ the final norm's weight: least squares between them gives
K·Γ·Kᵀ, whose eigenvectors are K's columns. Their order, and behind RMSNorm their signs, stay open: a reordering of the
residual, that is, a model as good as the plain one.
"""

from __future__ import annotations

import numpy as np
from numpy.polynomial import Polynomial

from stip_keyservice.audit.attacks import Attack
from stip_keyservice.audit.attacks.folded import Doubles, complement, names_of
from stip_keyservice.audit.claims import Claims
from stip_keyservice.audit.knowledge import Grant
from stip_keyservice.audit.view import Floats, NotApplicable, View

EXPLAINED = 0.2
"""Relative residual of the fit up to which the tables are one table. Rounding to bfloat16 leaves 0.005; unrelated
tables leave sqrt(1 - d/V), 0.95 for the bundled model."""


def run(view: View) -> Claims:
    """Fit one table to the other, and take the fit apart."""
    embedding, head = _tables(view)
    if np.array_equal(embedding, head):
        raise NotApplicable("the tables are the same, value for value: no norm is folded between them to tell axes by")
    split = _behind_layer_norm if names_of(view.server).centred else _behind_rms_norm
    axes, gains, residual = split(embedding.astype(np.float64), head.astype(np.float64))
    return Claims(
        residual=axes,
        unordered=True,
        figures={"relative residual of the fit": residual, "axes told apart": _apart(gains, residual, len(head))},
    )


def _tables(view: View) -> tuple[Floats, Floats]:
    """Keyed embedding and head [V, d], row by row the same token, wherever one party holds both."""
    held = view.enclave or {}
    if "embedding" in held and "head" in held:
        return held["embedding"], held["head"]
    if "embedding" in held:
        raise NotApplicable("the enclave holds no head; on a server it lies in a secret order and with no norm folded")
    names = names_of(view.server)
    stored = {name.removeprefix("model."): tensor for name, tensor in view.server.tensors.items()}
    embedding, head = stored.get(f"{names.table}.weight"), stored.get("lm_head.weight")
    if embedding is None or head is None or not embedding.any():
        raise NotApplicable("nobody but the enclave holds both tables")
    return embedding, head


def _behind_rms_norm(embedding: Doubles, head: Doubles) -> tuple[Doubles, Doubles, float]:
    """Columns of K [d, d] in the order of their gains [d], and the residual. E·Kᵀ·A = E·Γ·Kᵀ has A = K·Γ·Kᵀ."""
    fitted = _fitted(embedding, head)
    residual = _unexplained(head - embedding @ fitted, head)
    gains, axes = np.linalg.eigh((fitted + fitted.T) / 2)
    return axes, gains, residual


def _behind_layer_norm(embedding: Doubles, head: Doubles) -> tuple[Doubles, Doubles, float]:
    """The same behind LayerNorm, whose key drops the mean m of E's rows: with U a basis of the rest, K = U·Q·Uᵀ, the
    head is E·Kᵀ·A + m·cᵀ for A = U·Q·(UᵀΓU)·Qᵀ·Uᵀ and c = U·Q·Uᵀ·γ (all in U's coordinates below).

    The fit's residual is (part of m)·cᵀ, which gives c's direction; A's symmetry gives A up to a multiple of c·cᵀ.
    That multiple, c's length s and the mean γ follow from Γ being diagonal where the all-ones axis lies equally in
    each: in the basis of that axis and U, F = [[mean γ, s·cᵀ/√d], [s·c/√d, A]] has (F^k)[0, 0] = tr(F^k)/d for k = 1,
    2, 3. F's eigenvectors are the axes, with their signs.
    """
    width = embedding.shape[1]
    basis = complement(width)
    ours, theirs = embedding @ basis, head @ basis
    fitted = _fitted(ours, theirs)
    left, lengths, right = np.linalg.svd(theirs - ours @ fitted, full_matrices=False)
    c = right[0]
    residual = _unexplained((left * lengths)[:, 1:] @ right[1:], theirs)
    skewed = fitted - np.outer((fitted - fitted.T) @ c, c)
    symmetric = (skewed + skewed.T) / 2
    candidates = [_bordered(symmetric, c, solved, width) for solved in _multiples(symmetric, c, width)]
    gains, vectors = min((np.linalg.eigh(each) for each in candidates), key=_unevenness)
    vectors = vectors * np.sign(vectors[0])
    return basis @ vectors[1:], gains, residual


def _multiples(a: Doubles, c: Doubles, width: int) -> list[tuple[float, float, float]]:
    """Each (t, mean γ, s²) for which F's first three moments are those of a diagonal Γ, A being `a` - t·c·cᵀ."""
    t, d = Polynomial([0.0, 1.0]), float(width)
    ca, caa = float(c @ a @ c), float(c @ a @ a @ c)
    mean = (np.trace(a) - t) / (d - 1)
    squared = (a**2).sum() - 2 * ca * t + t**2
    cubed = np.trace(a @ a @ a) - 3 * caa * t + 3 * ca * t**2 - t**3
    coupling = (squared - (d - 1) * mean**2) / (d - 2)
    third = (1 - 1 / d) * mean**3 + coupling * ((2 - 3 / d) * mean + (1 - 3 / d) * (ca - t)) - cubed / d
    return [(root, float(mean(root)), max(0.0, float(d * coupling(root)))) for root in third.roots().real]


def _bordered(a: Doubles, c: Doubles, solved: tuple[float, float, float], width: int) -> Doubles:
    """F."""
    t, mean, squared = solved
    border = np.sqrt(squared / width) * c
    return np.block([[np.full((1, 1), mean), border[None]], [border[:, None], a - t * np.outer(c, c)]])


def _unevenness(decomposed: tuple[Doubles, Doubles]) -> float:
    """How far the all-ones axis is from lying equally in every eigenvector."""
    return float(np.std(decomposed[1][0] ** 2))


def _fitted(embedding: Doubles, head: Doubles) -> Doubles:
    """A with the least |E·A - H|."""
    return np.asarray(np.linalg.lstsq(embedding, head, rcond=None)[0], np.float64)


def _unexplained(rest: Doubles, head: Doubles) -> float:
    """|rest| over |H|. Raises `NotApplicable` where that is too much for one table."""
    residual = float(np.linalg.norm(rest) / np.linalg.norm(head))
    if residual > EXPLAINED:
        raise NotApplicable("the head is not tied to the embedding: no linear map takes one table to the other")
    return residual


def _apart(gains: Doubles, residual: float, count: int) -> float:
    """Share of axes whose gain is farther from every other than twice what the fit's noise moves it by: A's entries
    are off by residual·|γ|/sqrt(V), and eigenvectors mix by that over the gap."""
    gaps = np.diff(np.sort(gains), prepend=-np.inf, append=np.inf)
    noise = residual * np.sqrt((gains**2).mean() / count)
    return float((np.minimum(gaps[1:], gaps[:-1]) > 2 * noise).mean())


ATTACK = Attack(
    letter="N",
    name="tied table under a dense key",
    source="ours",
    assumes="Both keyed tables of a model whose head is its embedding: they lie in one enclave, or on the server.",
    cost="One least-squares fit and one eigenbasis: a second at width 192, a minute at 4096. No traffic.",
    rows=("enclave",),
    needs=frozenset({Grant.ENCLAVE}),
    run=run,
)
