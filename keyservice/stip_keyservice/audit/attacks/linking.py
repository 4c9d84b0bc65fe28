"""E: one instance's residual key over another's, from their server parts alone, and what a user there gives away here.

It is alignment (D) with the other instance's server part as the base: nobody needs a public model. What a user of the
other instance labels there, mapped by that key, is a dictionary of rows here.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from stip_keyservice.audit.attacks import Attack
from stip_keyservice.audit.attacks.alignment import align, read_rows, server_vocabulary
from stip_keyservice.audit.attacks.folded import fold
from stip_keyservice.audit.attacks.stolen import tabulate
from stip_keyservice.audit.claims import NO_GUESS, Claims
from stip_keyservice.audit.knowledge import Grant
from stip_keyservice.audit.view import Entry, Ids, NotApplicable, Sibling, View


def run(view: View) -> Claims:
    """Align the two server parts; read victims' rows with the sibling's labelled ones."""
    if view.sibling is None:
        raise NotApplicable("no other instance of the model")
    ours, theirs = fold(view.server), fold(view.sibling.server)
    found = align(ours, theirs, view.generator("linking"))
    table = tabulate(replace(view, server=view.sibling.server), view.sibling.labelled)
    known = np.flatnonzero(table.known)
    longest = max(map(len, view.victims))
    entry = Entry(table.rows[known], None if table.positions is None else table.shifts(longest), 0.0)
    return Claims(
        tokens=[known[guesses] for guesses in read_rows(view, entry, found.key)],
        vocabulary=_labelled_order(server_vocabulary(ours, theirs, found.key), view.sibling),
        residual=found.key,
        relative=True,
        figures={"cosine of matched rows": found.fit, "tokens in the dictionary": float(len(known))},
    )


def _labelled_order(order: Ids | None, sibling: Sibling) -> Ids | None:
    """[V] true ids of ours, where `order` gives the sibling's id for each of ours and its user labels those. None
    where no server sees ids."""
    labels = [(each.seen.ids, each.ids) for each in sibling.labelled if each.seen.ids is not None]
    if order is None or not labels:
        return None
    true = np.full(len(order), NO_GUESS, np.int64)
    for permuted, ids in labels:
        true[permuted] = ids
    return true[order]


ATTACK = Attack(
    letter="E",
    name="linking two instances",
    source="ours",
    assumes="The server parts of two instances of one model, and a user of the other one.",
    cost="As alignment to a public base; then as many labelled tokens as the dictionary is to have.",
    rows=("sibling",),
    needs=frozenset({Grant.SIBLING}),
    run=run,
)
