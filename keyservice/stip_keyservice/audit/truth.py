"""What is right about one instance: its true keys and tables. No attack sees this module.

Everything here comes from the sealed secrets and the source, in the convention of `stip_protocol.keys`: a keyed row
is K·x, and position i of the server's vocabulary is the true id `π.index[i]`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from stip_keyservice.audit.network import Network
from stip_keyservice.audit.view import Entry, Floats, Ids
from stip_keyservice.home import Home
from stip_keyservice.protect.equivalence.opening import OpenedInstance, open_instance
from stip_keyservice.protect.equivalence.protected_model import InstanceFiles
from stip_keyservice.protect.plan import EMBEDDING, HEAD, HEAD_BIAS, POSITIONS, Plan
from stip_protocol.errors import ArchitectureUnsupported
from stip_protocol.keys import Key, vocabulary_key
from stip_protocol.manifest import Manifest


@dataclass(frozen=True, repr=False)
class Truth:
    """Holds keys: never log, pickle or keep it longer than an audit."""

    manifest: Manifest
    plain: Network
    """The source."""
    server: Network
    entry: Entry
    """Plain tables, exact: what enters the first layer of the source."""
    keyed: Entry
    """The same, keyed, by true id."""
    residual: NDArray[np.float64]
    """[d, d] K of the residual."""
    vocabulary: Ids | None = None
    """[V] true id of each permuted id; None where no server sees the vocabulary."""
    head: Floats | None = field(default=None)
    """[V, d] keyed head by true id, where the enclave holds it."""
    head_bias: Floats | None = None


def read(directory: Path, model: Path, home: Home) -> Truth:
    """The truth about the instance in `directory`, made from the checkpoint folder `model`.

    Raises as `open_instance`, and `ArchitectureUnsupported` where the residual's key is none of one matrix.
    """
    return of(open_instance(directory, model, home))


def of(opened: OpenedInstance) -> Truth:
    """The truth about an instance that is open. Raises `ArchitectureUnsupported` as `read`."""
    planned, manifest = opened.planned, opened.manifest
    key = planned.keys[planned.architecture.entry]
    if not isinstance(key, Key):
        raise ArchitectureUnsupported("audit: a residual of heads")
    residual = key.apply(np.eye(planned.residual_width))
    order = None
    if opened.files.vocabulary_seed is not None:
        order = vocabulary_key(opened.files.vocabulary_seed, manifest.vocabulary).index.astype(np.int64)
    entry, server = _plain_entry(opened), Network(opened.files.directory / "server")
    holds_tables = any(output.name == EMBEDDING for output in planned.enclave)
    if holds_tables:
        keyed = Entry(_tensor(opened.files, EMBEDDING), _optional(opened.files, planned, POSITIONS), 0.0)
    else:
        assert order is not None
        keyed = Entry(server.embedding[np.argsort(order)], None, 0.0)
    return Truth(
        manifest,
        Network(opened.source.directory),
        server,
        entry,
        keyed,
        residual,
        order,
        _optional(opened.files, planned, HEAD),
        _optional(opened.files, planned, HEAD_BIAS),
    )


def _plain_entry(opened: OpenedInstance) -> Entry:
    tables = {}
    for table in opened.planned.architecture.tables:
        place = opened.planned.stored[table.tensor]
        count = place.stop - place.start - table.start
        first = place.start + table.start
        rows = opened.source.rows(place.name, first, first + count).float()
        tables[table.name] = (rows * table.scale).numpy()
    return Entry(tables[EMBEDDING], tables.get(POSITIONS), 0.0)


def _optional(files: InstanceFiles, planned: Plan, name: str) -> Floats | None:
    return _tensor(files, name) if any(output.name == name for output in planned.enclave) else None


def _tensor(files: InstanceFiles, name: str) -> Floats:
    rows: Floats = torch.cat([block for _, block in files.blocks(name)]).float().numpy()
    return rows
