"""Keys come from the key stream only: every draw works with all other generators broken, and no module calls one."""

from __future__ import annotations

import ast
import os
import random
import re
import secrets
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from stip_protocol import keys
from stip_protocol.keys import Key, KeyStream, draw_orthogonal, draw_permutation, vocabulary_key

ROOT = bytes(range(32))
REPOSITORY = Path(__file__).parents[2]
RANDOM = re.compile(r"rand|seed|rng|[Gg]enerator|nomial|dropout|rrelu|poisson|bernoulli|(?<!de)normal")
OF_TORCH = [name for name in dir(torch) if RANDOM.search(name)]
METHODS = {name for name in dir(torch.Tensor) if RANDOM.search(name)} | {
    "cauchy_",
    "exponential_",
    "geometric_",
    "manual_seed",
    "uniform_",
}
"""Of tensors and generators: random whatever they are called on."""


class Poisoned(Exception):
    """A generator other than the key stream was called."""


def refuse(*_: Any, **__: Any) -> NoReturn:
    raise Poisoned


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every generator of Python, NumPy, torch and the system raises."""
    with monkeypatch.context() as patch:
        for module in (random, np.random, secrets):
            for name, value in list(vars(module).items()):
                if callable(value) and not name.startswith("_"):
                    patch.setattr(module, name, refuse)
        for name in OF_TORCH:
            patch.setattr(torch, name, refuse)
        for name in METHODS & set(dir(torch.Tensor)):
            patch.setattr(torch.Tensor, name, refuse)
        for module, name in ((os, "urandom"), (uuid, "uuid4")):
            patch.setattr(module, name, refuse)
        yield


DRAWS: dict[str, Callable[[KeyStream, int], Key]] = {
    name: getattr(keys, name) for name in keys.__all__ if name.startswith("draw_")
} | {"vocabulary_key": lambda stream, size: vocabulary_key(stream.bytes(32), size)}
WHOLE = {name: draw(KeyStream(ROOT, name), 12).matrix() for name, draw in DRAWS.items()}
"""Every draw there is, with the other generators as they are."""


def test_every_kind_of_draw_is_known_here() -> None:
    assert len(DRAWS) >= 10


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_calls_no_other_generator(name: str) -> None:
    assert np.array_equal(DRAWS[name](KeyStream(ROOT, name), 12).matrix(), WHOLE[name])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "call",
    [
        lambda: random.random(),
        lambda: random.Random(1),
        lambda: secrets.token_bytes(4),
        lambda: os.urandom(4),
        lambda: uuid.uuid4(),
        lambda: np.random.rand(2),
        lambda: np.random.default_rng(1),
        lambda: np.random.Generator(np.random.PCG64(1)),
        lambda: torch.rand(2),
        lambda: torch.randperm(2),
        lambda: torch.Generator(),
        lambda: torch.zeros(2).normal_(),
        lambda: torch.manual_seed(1),
    ],
)
def test_the_poison_is_in_every_generator(call: Callable[[], object]) -> None:
    with pytest.raises(Poisoned):
        call()


@pytest.mark.parametrize("name", DRAWS)
def test_another_root_or_label_gives_another_key(name: str) -> None:
    size = 48  # so many signs or places that none agree by chance
    drawn = [DRAWS[name](KeyStream(root, label), size).matrix() for root in (ROOT, bytes(32)) for label in ("a", "b")]
    assert not any(np.array_equal(drawn[i], drawn[j]) for i in range(4) for j in range(i))


def test_draws_of_one_stream_go_on_and_do_not_repeat() -> None:
    stream = KeyStream(ROOT, "one after another")
    assert not np.array_equal(draw_permutation(stream, 48).index, draw_permutation(stream, 48).index)
    assert not np.array_equal(draw_orthogonal(stream, 4).matrix(), draw_orthogonal(stream, 4).matrix())


RANDOM_MODULES = ("numpy.random", "random", "secrets", "torch.distributions", "torch.nn.init", "uuid")


def is_random(path: str) -> bool:
    return (
        path in ("os.urandom", "os.getrandom")
        or any(path == module or path.startswith(f"{module}.") for module in RANDOM_MODULES)
        or (path.startswith("torch.") and RANDOM.search(path) is not None)
    )


class Uses(ast.NodeVisitor):
    """The generators that a module names, by their full paths; methods of METHODS with a dot before them."""

    def __init__(self, source: str) -> None:
        self.found: set[str] = set()
        self._bound: dict[str, str] = {}
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    first = alias.name.partition(".")[0]
                    self._bound[alias.asname or first] = alias.name if alias.asname else first
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    path = f"{node.module}.{alias.name}"
                    self._bound[alias.asname or alias.name] = path
                    self._note(path if alias.name != "*" else node.module)
        self.visit(tree)

    def _note(self, path: str) -> None:
        if is_random(path):
            self.found.add(path)

    def _path(self, node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            return self._bound.get(node.id)
        if isinstance(node, ast.Attribute) and (owner := self._path(node.value)):
            return f"{owner}.{node.attr}"
        return None

    def visit_Name(self, node: ast.Name) -> None:
        self._note(self._bound.get(node.id, ""))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        path = self._path(node)
        if path is not None and is_random(path):
            self.found.add(path)
        elif node.attr in METHODS:
            self.found.add(f".{node.attr}")
        if path is None:
            self.visit(node.value)


PROTECT = "keyservice/stip_keyservice/protect"
ALLOWED: Mapping[str, Mapping[str, set[str]]] = {
    f"{PROTECT}/equivalence/certificate.py": {
        "salt of what the certificate commits to": {"secrets.token_hex"},
    },
    f"{PROTECT}/equivalence/inputs.py": {
        "seeded sample inputs": {"torch.randint", "torch.Generator", ".manual_seed"},
    },
    f"{PROTECT}/equivalence/tables.py": {
        "seeded directions in which rows of two tables are compared": {
            "torch.randn",
            "torch.Generator",
            ".manual_seed",
        },
    },
    f"{PROTECT}/equivalence/weights.py": {
        "seeded jitter within the rounding": {"torch.rand", "torch.Generator", ".manual_seed"},
    },
    f"{PROTECT}/instance.py": {
        "the root secret, which all keys come from": {"secrets.token_bytes"},
        "the public name of the instance": {"secrets.token_hex"},
    },
}
"""By file and reason, every generator that the modules which draw or apply keys may name."""


def test_no_module_that_draws_or_applies_keys_calls_another_generator() -> None:
    """A new entry in ALLOWED needs a reason that has nothing to do with keys; one that nothing needs must go."""
    folders = [REPOSITORY / "protocol/stip_protocol/keys", REPOSITORY / PROTECT]
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    assert len(files) > 15
    found = {str(file.relative_to(REPOSITORY)): Uses(file.read_text()).found for file in files}
    allowed = {name: set().union(*reasons.values()) for name, reasons in ALLOWED.items()}
    assert {name: uses for name, uses in found.items() if uses} == allowed


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import numpy as np\nx = np.random.default_rng(1).normal()", "numpy.random.default_rng"),
        ("import numpy.random as r\nr.rand()", "numpy.random.rand"),
        ("import numpy\ng = numpy.random", "numpy.random"),
        ("from numpy import random\nrandom.rand()", "numpy.random.rand"),
        ("from numpy.random import default_rng as make", "numpy.random.default_rng"),
        ("def f():\n    from random import shuffle\n    shuffle([])", "random.shuffle"),
        ("import random\nr = random", "random"),
        ("from random import *", "random"),
        ("import torch\ntorch.randn(3)", "torch.randn"),
        ("import torch as t\nf = t.randperm", "torch.randperm"),
        ("from torch import rand as r", "torch.rand"),
        ("import torch\ntorch.empty(3).normal_()", ".normal_"),
        ("import torch\ntorch.nn.init.orthogonal_(w)", "torch.nn.init.orthogonal_"),
        ("from torch.nn import init\ninit.orthogonal_(w)", "torch.nn.init.orthogonal_"),
        ("import torch\ntorch.cuda.manual_seed_all(1)", "torch.cuda.manual_seed_all"),
        ("import torch\ntorch.nn.functional.dropout(x)", "torch.nn.functional.dropout"),
        ("import os\nos.urandom(32)", "os.urandom"),
        ("import secrets\nsecrets.token_bytes(32)", "secrets.token_bytes"),
    ],
)
def test_a_call_of_another_generator_is_found_however_it_is_spelt(source: str, found: str) -> None:
    assert found in Uses(source).found


def test_the_key_stream_is_not_taken_for_another_generator() -> None:
    source = "import torch\nfrom stip_protocol.keys import KeyStream\nKeyStream(b'', 'a').normals(3)\ntorch.zeros(3)"
    assert Uses(source).found == set()
