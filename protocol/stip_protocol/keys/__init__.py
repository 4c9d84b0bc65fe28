"""The key algebra: invertible linear maps on the spaces of a Transformer, and the streams they are drawn from.

One convention holds everywhere. Vectors are **columns**: a space keyed by K carries x' = K·x. A matrix W,
seen as [out, in], that reads a space keyed by K_r and writes one keyed by K_w becomes

    W' = K_w · W · K_r⁻¹        b' = K_w · b

so `out` takes K, and `in` takes K⁻ᵀ, because each row of W·K_r⁻¹ is K_r⁻ᵀ applied to a row of W (a
covector). In code: `w' = reads.dual.apply(writes.apply(w).T).T`. An index (a vocabulary, a gate) takes the
permutation part only. This is the column form of the paper's W' = π_rᵀ·W·π_w (arXiv 2312.00025, §5.1), which
writes row vectors x·π; π = Kᵀ.

The π_c of the paper is `vocabulary_key`: `logits' = π(logits)`, that is `logits'[i] = logits[π.index[i]]`: a
position i of the server's row is the true id `π.index[i]`, and the true id t is at `π.inverse.index[t]`.

NumPy only: an enclave expands the vocabulary permutation with it. Importing this module needs NumPy, so
`gateway` and `client` do not.
"""

from stip_protocol.keys.algebra import (
    Centred,
    Identity,
    Key,
    Monomial,
    Orthogonal,
    Permutation,
    RotaryPairs,
    Term,
)
from stip_protocol.keys.draw import (
    SCALE_BOUND,
    VOCABULARY_LABEL,
    draw_centred_orthogonal,
    draw_monomial,
    draw_orthogonal,
    draw_pair_scalars,
    draw_pair_scales,
    draw_pair_signs,
    draw_permutation,
    draw_positive_monomial,
    draw_signed_permutation,
    vocabulary_key,
)
from stip_protocol.keys.heads import Blocks, HeadsKey
from stip_protocol.keys.stream import KeyStream, derive

__all__ = [
    "SCALE_BOUND",
    "VOCABULARY_LABEL",
    "Blocks",
    "Centred",
    "HeadsKey",
    "Identity",
    "Key",
    "KeyStream",
    "Monomial",
    "Orthogonal",
    "Permutation",
    "RotaryPairs",
    "Term",
    "derive",
    "draw_centred_orthogonal",
    "draw_monomial",
    "draw_orthogonal",
    "draw_pair_scalars",
    "draw_pair_scales",
    "draw_pair_signs",
    "draw_permutation",
    "draw_positive_monomial",
    "draw_signed_permutation",
    "vocabulary_key",
]
