"""TOML as it comes from files: one way in which it is wrong, whatever the library raises."""

from __future__ import annotations

import tomllib
from typing import Any

DOTS_LIMIT = 1024
"""Dots in one line: `tomllib` takes time and memory in the square of a dotted key's parts, for 256 KiB of them more
than a machine has."""


def read(data: bytes) -> dict[str, Any]:
    """The tables in `data`. Raises ValueError saying what is wrong, in words that quote no value.

    The library raises more than its own error: for bytes that are not UTF-8, for integers of more digits than Python
    converts (`sys.set_int_max_str_digits`), and for nesting beyond Python's stack.
    """
    if any(line.count(b".") > DOTS_LIMIT for line in data.split(b"\n")):
        raise ValueError(f"not TOML that is read: a line of more than {DOTS_LIMIT} dots")
    try:
        return tomllib.loads(data.decode())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"not TOML: {error}") from None
    except UnicodeDecodeError:
        raise ValueError("not TOML: not UTF-8") from None
    except RecursionError:
        raise ValueError("not TOML: nested too deep") from None
    except ValueError:
        raise ValueError("not TOML: an integer with too many digits") from None
