"""A model of what an enclave's host sees of table lookups: which pages they touch.

The host of an SGX enclave controls its page tables and can see every page that is touched (controlled-channel attacks,
Xu, Cui and Peinado, IEEE S&P 2015). The table is taken to lie in the order of ids from the start of a page on, and a
lookup to touch the pages of its row and no others.
"""

from __future__ import annotations

from stip_keyservice.audit.view import Ids, PageTrace

PAGE_BYTES = 4096


def trace(ids: Ids, row_bytes: int, page_bytes: int = PAGE_BYTES) -> PageTrace:
    """What looking up rows of `row_bytes` of a table for true `ids` [n] shows. Raises `ValueError` below one byte."""
    if row_bytes < 1 or page_bytes < 1:
        raise ValueError(f"row_bytes, page_bytes: {row_bytes}, {page_bytes}; at least 1 byte each")
    return PageTrace([pages_of(int(each), row_bytes, page_bytes) for each in ids], page_bytes, row_bytes)


def pages_of(index: int, row_bytes: int, page_bytes: int) -> tuple[int, ...]:
    """The pages that row `index` lies on, rising."""
    start = index * row_bytes
    return tuple(range(start // page_bytes, (start + row_bytes - 1) // page_bytes + 1))
