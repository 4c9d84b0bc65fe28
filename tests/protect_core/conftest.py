"""Fixtures over the fixed models of every family."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.protect_core.families import presets
from tests.protect_core.fixed import FIXED
from tests.protect_core.models import Models, Plain, parse


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The products here are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def models() -> Models:
    return Models()


@pytest.fixture
def plain(request: pytest.FixtureRequest, models: Models) -> Plain:
    """Each of the fixed models in float64; with `preset`, under each preset that is not refused for it."""
    return models.fixed(request.param)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "plain" not in metafunc.fixturenames:
        return
    if "preset" not in metafunc.fixturenames:
        metafunc.parametrize("plain", list(FIXED), indirect=True)
        return
    pairs = [(name, preset) for name, config in FIXED.items() for preset in presets(parse(config).to_dict())]
    metafunc.parametrize(("plain", "preset"), pairs, indirect=["plain"], ids=[", ".join(pair) for pair in pairs])


@pytest.fixture(scope="session")
def fixed() -> dict[str, dict[str, Any]]:
    return FIXED
