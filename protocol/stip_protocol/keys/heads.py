"""Keys on attention heads: a key inside each head, and permutations of whole heads.

With grouped queries (Ainslie et al., arXiv 2305.13245) every key-value head serves `group` query heads, so
one block key is shared by a key-value head and its group, key-value heads move with their groups, and query
heads move within a group. A full-width permutation, as printed in the paper, is right for one head only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from stip_protocol.keys.algebra import Key, Permutation, Term


class Blocks(Key):
    """Block s of the result is `blocks[s]` applied to block `order.index[s]` of the input. Blocks are equal in size."""

    def __init__(self, order: Permutation, blocks: Sequence[Key]) -> None:
        if len(blocks) != order.size or len({block.size for block in blocks}) != 1:
            raise ValueError("blocks: one of equal size for each place")
        self._order = order
        self._blocks = tuple(blocks)
        self._width = blocks[0].size
        self.size = order.size * self._width

    def terms(self, start: int, stop: int) -> Iterator[Term]:
        for place in range(start // self._width, -(-stop // self._width)):
            first = place * self._width
            here = slice(max(start, first) - first, min(stop, first + self._width) - first)
            shift = int(self._order.index[place]) * self._width
            offset = first + here.start - start
            for term in self._blocks[place].terms(here.start, here.stop):
                yield Term(
                    slice(offset + term.out.start, offset + term.out.stop),
                    slice(shift + term.source.start, shift + term.source.stop)
                    if isinstance(term.source, slice)
                    else term.source + shift,
                    term.weight,
                )

    @property
    def inverse(self) -> Key:
        back = self._order.inverse
        return Blocks(back, [self._blocks[place].inverse for place in back.index])

    @property
    def dual(self) -> Key:
        return Blocks(self._order, [block.dual for block in self._blocks])

    @property
    def permutation_part(self) -> Key:
        return Blocks(self._order, [block.permutation_part for block in self._blocks])

    @property
    def exact(self) -> bool:
        return all(block.exact for block in self._blocks)

    @property
    def identity(self) -> bool:
        return self._order.identity and all(block.identity for block in self._blocks)


class HeadsKey:
    """The key of a heads space, seen from its two widths: `narrow` (key-value heads) and `wide` (query heads)."""

    def __init__(self, kv_order: Permutation, query_orders: Sequence[Permutation], blocks: Sequence[Key]) -> None:
        """Each place j of the result holds the input's key-value head `kv_order.index[j]` under `blocks[j]`, and
        its group of query heads in the order `query_orders[j]`, under the same block key."""
        kv_heads, group = kv_order.size, query_orders[0].size
        if len(query_orders) != kv_heads or any(order.size != group for order in query_orders):
            raise ValueError("query orders: one of equal size for each key-value head")
        order = np.concatenate([kv_order.index[j] * group + query_orders[j].index for j in range(kv_heads)])
        self.narrow: Key = Blocks(kv_order, blocks)
        self.wide: Key = Blocks(Permutation(order), [blocks[j] for j in range(kv_heads) for _ in range(group)])

    def __repr__(self) -> str:
        return f"HeadsKey(narrow={self.narrow.size}, wide={self.wide.size})"
