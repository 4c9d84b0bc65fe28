"""The matrix: every attacker with every attack, measured or with the reason why it means nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from stip_keyservice.audit.attacks import Attack
from stip_keyservice.audit.document import Cell
from stip_keyservice.audit.knowledge import KNOWLEDGE, Grant, Knowledge
from stip_keyservice.audit.material import Material
from stip_keyservice.audit.network import Network
from stip_keyservice.audit.pagetrace import trace
from stip_keyservice.audit.scoring import Judge
from stip_keyservice.audit.truth import Truth
from stip_keyservice.audit.view import Accomplice, Entry, Floats, Ids, NotApplicable, Seen, Sibling, View
from stip_protocol.errors import ConfigurationError

DRIFT = 0.1
"""Of a drifted table, as `Grant.DRIFTED` says."""
DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}

Views = Mapping[str, View | NotApplicable]
"""By name of a row: what its attacker holds, or why there is no such attacker."""
Progress = Callable[[str, str], None]
"""Told (attack's letter, row) before each cell."""


def views(material: Material, rows: Sequence[str] = tuple(KNOWLEDGE)) -> Views:
    """What each attacker holds. Raises `ConfigurationError` for a base of another form than the instance's source."""
    truth, surrogate = material.truth, material.surrogate
    operator = View(
        preset=truth.manifest.preset,
        server=truth.server,
        victims=[victim.seen for victim in material.victims],
        public_text=material.public_text,
        vocabulary=truth.manifest.vocabulary,
        seed=material.seed,
        entry=Entry(surrogate.embedding, None, float("inf")),
        surrogate=surrogate,
    )
    return {row: _granted(operator, material, KNOWLEDGE[row]) for row in rows}


def _granted(view: View, material: Material, row: Knowledge) -> View | NotApplicable:
    try:
        for grant in sorted(row.grants):
            view = _GRANT[grant](view, material)
    except NotApplicable as reason:
        return reason
    return view


def _drifted(view: View, material: Material) -> View:
    generator, entry = view.generator("drift"), material.truth.entry

    def moved(table: Floats) -> Floats:
        noise = generator.normal(0, DRIFT * table.std(), table.shape)
        return (table + noise).astype(np.float32)

    positions = None if entry.positions is None else moved(entry.positions)
    return replace(view, entry=Entry(moved(entry.rows), positions, DRIFT))


def _table(view: View, material: Material) -> View:
    return replace(view, entry=material.truth.entry)


def _base(view: View, material: Material) -> View:
    if material.base is None:
        raise NotApplicable("no public base was named")
    return replace(view, base=material.base, entry=base_entry(material.base, material.truth.entry))


def base_entry(base: Network, true: Entry) -> Entry:
    """The table of a public base, as a relative of the `true` one: how far fine-tuning moves a table is known.

    Raises `ConfigurationError` where it has another shape.
    """
    model = base.model
    with torch.inference_mode():
        rows = model.get_input_embeddings()(torch.arange(model.config.vocab_size)).float().numpy()  # scaled, if it is
    if rows.shape != true.rows.shape:
        raise ConfigurationError.because("base embedding", rows.shape, f"{true.rows.shape}, as the instance's source")
    positions = None
    if true.positions is not None:
        positions = base.rows(np.zeros(len(true.positions), np.int64)) - rows[0]
    off = float(np.sqrt(np.mean((rows - true.rows).astype(np.float64) ** 2)) / true.rows.std())
    return Entry(rows, positions, off)


def _accomplice(view: View, material: Material) -> View:
    if not material.accomplice:
        raise NotApplicable("no user helps in this traffic")
    return replace(view, accomplice=Accomplice(material.accomplice, decoder(material.truth)))


def decoder(truth: Truth) -> Callable[[Seen], Ids]:
    """What a user's enclave makes of a server's answers, greedily and honestly.

    Under `throughput` the answers are the ids behind the asked positions, as far as they were fed.
    """

    def from_hidden(seen: Seen) -> Ids:
        assert seen.hidden is not None
        assert truth.head is not None
        logits = seen.hidden @ truth.head.T
        return np.asarray((logits if truth.head_bias is None else logits + truth.head_bias).argmax(axis=1), np.int64)

    def from_top(seen: Seen) -> Ids:
        assert seen.top is not None
        assert truth.vocabulary is not None
        return truth.vocabulary[seen.top.indices[:, 0]]

    def from_ids(seen: Seen) -> Ids:
        assert seen.ids is not None
        assert truth.vocabulary is not None
        behind = seen.asked + 1
        return truth.vocabulary[seen.ids[behind[behind < len(seen.ids)]]]

    return {"hidden": from_hidden, "top": from_top, "ids": from_ids}[truth.manifest.output]


def _sibling(view: View, material: Material) -> View:
    if material.twin is None:
        raise NotApplicable("there is no second instance of this model")
    if not material.twin.labelled:
        raise NotApplicable("no user of the second instance helps")
    return replace(view, sibling=Sibling(material.twin.truth.server, material.twin.labelled))


def _enclave(view: View, material: Material) -> View:
    truth = material.truth
    _require_tables(truth, "whoever breaks it has the vocabulary permutation, and with it every text")
    held = {"embedding": truth.keyed.rows, "positions": truth.keyed.positions, "head": truth.head}
    return replace(view, enclave={name: table for name, table in held.items() if table is not None})


def _host(view: View, material: Material) -> View:
    manifest = material.truth.manifest
    _require_tables(material.truth, "its host sees no lookups by id")
    row_bytes = manifest.width * DTYPE_BYTES[manifest.dtype]
    return replace(view, pages=[trace(victim.ids, row_bytes) for victim in material.victims])


def _require_tables(truth: Truth, otherwise: str) -> None:
    """Raise `NotApplicable` where the server does the lookups."""
    if truth.manifest.output == "ids":
        raise NotApplicable(f"the enclave holds no tables under {truth.manifest.preset}: {otherwise}")


_GRANT: Mapping[Grant, Callable[[View, Material], View]] = {
    Grant.TABLE: _table,
    Grant.DRIFTED: _drifted,
    Grant.BASE: _base,
    Grant.ACCOMPLICE: _accomplice,
    Grant.SIBLING: _sibling,
    Grant.ENCLAVE: _enclave,
    Grant.HOST: _host,
}
_NEEDS = {
    Grant.TABLE: "the embedding table",
    Grant.DRIFTED: "a relative of the embedding table",
    Grant.BASE: "the public checkpoint that the model derives from",
    Grant.ACCOMPLICE: "a user of the same instance who helps",
    Grant.SIBLING: "the server part of another instance of the model, and a user there",
    Grant.ENCLAVE: "what lies in a broken enclave",
    Grant.HOST: "the enclave's host",
}


def cells(views: Views, attacks: Sequence[Attack], judge: Judge, progress: Progress | None = None) -> Iterator[Cell]:
    """A cell for each view and attack, in this order, when it is done.

    What an attack raises beside `NotApplicable` is a fault, and is raised on with a note saying where.
    """
    for row, view in views.items():
        for attack in attacks:
            if progress is not None:
                progress(attack.letter, row)
            try:
                yield _measured(view, attack, KNOWLEDGE[row], judge)
            except NotApplicable as reason:
                yield Cell(attack=attack.letter, knowledge=row, not_applicable=str(reason))
            except Exception as fault:
                fault.add_note(f"in attack {attack.letter} ({attack.name}) with knowledge {row}")
                raise


def _measured(view: View | NotApplicable, attack: Attack, row: Knowledge, judge: Judge) -> Cell:
    if lacking := sorted(attack.needs - row.grants):
        raise NotApplicable(f"needs {' and '.join(_NEEDS[grant] for grant in lacking)}")
    if row.name not in attack.rows:
        raise NotApplicable("uses nothing of what this attacker has beyond the operator: see the rows where it is run")
    if isinstance(view, NotApplicable):
        raise NotApplicable(str(view))
    scores = judge.score(attack.run(view))
    return Cell(
        attack=attack.letter,
        knowledge=row.name,
        metrics=scores.metrics,
        points=scores.points,
        figures=scores.figures,
    )
