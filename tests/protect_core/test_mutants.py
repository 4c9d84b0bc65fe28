"""Leaving out one key at one place shows in the logits: each incidence of each family under each preset counts."""

from __future__ import annotations

import torch

from stip_keyservice.protect.architecture import After, Architecture, Role
from stip_keyservice.protect.plan import Incidence
from tests.protect_core.models import Plain


def invisible(architecture: Architecture, incidence: Incidence) -> bool:
    """Whether softmax cannot see a key: that of a bias on keys, where no positions turn them and no norm follows.

    A query q scores position j with q·(k_j + b) = q·k_j + q·b. The second term is the same for every j, and
    softmax(s + c) = softmax(s): any b gives the same attention.
    """
    linear = next((linear for linear in architecture.linears if linear.name == incidence.part), None)
    if linear is None or linear.bias is None or linear.bias.tensor != incidence.tensor:
        return False
    normed = {norm.space for norm in architecture.norms}
    on_keys = linear.writes.role is Role.DUAL and linear.writes.space not in normed
    return on_keys and linear.after is After.NOTHING


def test_leaving_out_a_key_anywhere_breaks_the_model(plain: Plain) -> None:
    """The identity in place of the key at one (tensor, part, space) incidence shows, for each incidence but those
    that softmax cannot see: there the logits must stay."""
    ids = plain.ids(length=10, rows=2)
    expected = plain.logits(ids)
    for preset in plain.presets:
        protected = plain.protect(preset)
        model, incidences = protected.model(), protected.plan.incidences
        assert len(incidences) == len(set(incidences)) > 0
        for incidence in incidences:
            got = plain.protect(preset, mutate=incidence).logits(ids, model)
            error = (got - expected).abs().max() / expected.std()
            if invisible(protected.plan.architecture, incidence):
                assert error < 1e-9, (preset, incidence)
            else:
                assert error > 1e-3, (preset, incidence)


def test_experts_and_rows_are_among_what_takes_other_names(plain: Plain) -> None:
    """Experts take each other's names under every preset, and the rows of the embedding where the server has it."""
    for preset in plain.presets:
        plan = plain.protect(preset).plan
        named = {incidence.space for incidence in plan.incidences if incidence.side == "names"}
        expected = {experts.space for experts in plan.architecture.experts}
        assert named == expected | ({"vocabulary"} if preset == "throughput" else set())


def test_logits_depend_on_which_experts_are_chosen(plain: Plain) -> None:
    """The prompts of these tests reach every expert of every layer, so that none of them could be wrong unseen."""
    protected = plain.protect("paper")
    ids = plain.ids(length=10, rows=2)
    expected = plain.logits(ids)
    for experts in protected.plan.architecture.experts:
        for number in range(len(experts.members)):
            spoiled = dict(protected.server)
            for name in experts.members[number]:
                spoiled[name] = torch.zeros_like(spoiled[name])
            got = type(protected)(protected.plan, spoiled, protected.enclave).logits(ids)
            assert (got - expected).abs().max() > 1e-3 * expected.std()
