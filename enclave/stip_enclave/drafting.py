"""Guessing the next ids from what stands in the sequence already: prompt lookup decoding.

The ids that followed an earlier occurrence of the sequence's own end are guessed to follow again (Saxena, "Prompt
Lookup Decoding", 2023, github.com/apoorvumang/prompt-lookup-decoding; copied spans as drafts before it in Yang et
al., arXiv 2304.04487). It needs no second model and nothing that the enclave does not hold. A guess costs rows of a
step and never a token: what is not confirmed is dropped (`decode`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LONGEST = 4
"""Ids of the longest suffix looked for. What follows four equal ids in a row hardly gets more certain with a fifth,
and a longer suffix occurs less often."""
SHORTEST = 2
"""One id alone recurs in any text, and what follows it rarely does: drafts that fail are rows computed in vain."""


def propose(history: NDArray[np.uint32], most: int) -> NDArray[np.uint32]:
    """Guessed ids [0 or `most`] to follow `history` [n]: those behind the most recent earlier occurrence of its
    longest suffix of 4, 3 or 2 ids.

    Where that occurrence reaches into the end itself, the guess repeats what lies between, as in a loop: the copy
    reads what it has written (LZ77, Ziv and Lempel 1977). A pass over the ids for each of the four: O(n).
    """
    size = history.size
    if size <= SHORTEST or most < 1:
        return history[:0]
    found = -1
    # occurs[i]: the suffix of this length stands at i too. One id at first; each round puts one before it.
    occurs = history[:-1] == history[-1]
    for length in range(SHORTEST, min(LONGEST, size - 1) + 1):
        occurs = occurs[1:] & (history[: size - length] == history[size - length])
        last = occurs.tobytes().rfind(b"\x01")
        if last < 0:
            break
        found = last + length
    return history[:0] if found < 0 else np.resize(history[found:], most)
