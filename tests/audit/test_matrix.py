"""Each attacker gets what its row of the matrix says and no more, and each cell is a figure or a reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from stip_keyservice.audit import matrix
from stip_keyservice.audit.attacks import Attack
from stip_keyservice.audit.claims import Claims
from stip_keyservice.audit.document import Cell
from stip_keyservice.audit.knowledge import KNOWLEDGE, Grant
from stip_keyservice.audit.material import Material
from stip_keyservice.audit.network import Network
from stip_keyservice.audit.scoring import ClaimInvalid, Judge
from stip_keyservice.audit.view import Entry, NotApplicable, View
from stip_protocol.errors import ConfigurationError


@pytest.fixture(scope="module")
def everything(ground: Any) -> Callable[[str], Material]:
    """Material of a preset with whatever any attacker may get."""

    @cache
    def of(preset: str) -> Material:
        material: Material = ground.material(preset)
        helped = ground.labelled(preset, ground.helped[:4])
        return replace(material, accomplice=helped, base=ground.plain, twin=ground.twin(preset))

    return of


def beyond(view: View) -> set[str]:
    """What a view grants beside the operator's own."""
    return {
        name for name in ("base", "accomplice", "sibling", "enclave", "pages") if getattr(view, name) is not None
    } | {"table" if view.entry.drift == 0 else "relative" if np.isfinite(view.entry.drift) else "unrelated"}


def nearest_sorted(view: View) -> Claims:
    """A small attack of the test's own: the token whose sorted row is nearest to the sorted row that was seen."""
    table = np.sort(view.entry.rows, axis=1)
    squares = (table**2).sum(axis=1)
    tokens = []
    for seen in view.victims:
        rows = np.sort(view.rows(seen), axis=1)
        tokens.append((squares - 2 * rows @ table.T).argmin(axis=1)[:, None])
    return Claims(tokens=tokens, figures={"drift": min(view.entry.drift, 9.0)})


def attack(run: Any, rows: tuple[str, ...] = ("server", "table"), needs: frozenset[Grant] = frozenset()) -> Attack:
    return Attack("Z", "nearest sorted row", "test", "a table", "nothing", rows, needs, run)


def cells(ground: Any, attacks: list[Attack], rows: list[str], preset: str = "paper") -> list[Cell]:
    material = ground.material(preset)
    return list(matrix.cells(matrix.views(material, rows), attacks, Judge(material)))


# Views.

GRANTED = {
    "server": {"unrelated"},
    "drifted": {"relative"},
    "table": {"table"},
    "base": {"base", "table"},
    "accomplice": {"accomplice", "unrelated"},
    "sibling": {"sibling", "unrelated"},
    "enclave": {"enclave", "unrelated"},
    "host": {"pages", "unrelated"},
}


def test_every_grant_of_every_row_gives_something() -> None:
    assert KNOWLEDGE.keys() == GRANTED.keys()


@pytest.mark.parametrize("row", GRANTED)
def test_an_attacker_holds_what_its_row_grants_and_no_more(everything: Callable[[str], Material], row: str) -> None:
    view = matrix.views(everything("hardened"), [row])[row]
    assert isinstance(view, View)
    assert beyond(view) == GRANTED[row]


def test_no_view_has_the_truth_of_a_victim(everything: Callable[[str], Material]) -> None:
    material = everything("hardened")
    for view in matrix.views(material).values():
        assert isinstance(view, View)
        assert all(seen is victim.seen for seen, victim in zip(view.victims, material.victims, strict=True))
        held = [getattr(view, field.name) for field in fields(view)]
        assert not any(each is secret for each in held for secret in (material.truth, material.victims, material))


def test_the_server_of_a_hardened_instance_is_given_no_table(everything: Callable[[str], Material]) -> None:
    material = everything("hardened")
    view = matrix.views(material, ["server"])["server"]
    assert isinstance(view, View)
    assert view.entry.rows is not material.truth.entry.rows
    assert abs(np.corrcoef(view.entry.rows.ravel(), material.truth.entry.rows.ravel())[0, 1]) < 0.01


def test_a_drifted_table_is_off_by_a_tenth_and_the_same_each_time(ground: Any) -> None:
    true = ground.truth("paper").entry.rows
    first, again = (ground.view("paper", "drifted").entry for _ in range(2))
    assert (first.rows - true).std() / true.std() == pytest.approx(0.1, rel=0.02)
    assert first.drift == 0.1
    assert (first.rows == again.rows).all()


def test_a_broken_enclave_holds_the_keyed_tables_by_true_id(ground: Any, everything: Callable[[str], Material]) -> None:
    known = ground.truth("hardened")
    view = matrix.views(everything("hardened"), ["enclave"])["enclave"]
    assert isinstance(view, View)
    assert view.enclave is not None
    assert view.enclave.keys() == {"embedding", "head"}
    np.testing.assert_allclose(view.enclave["embedding"], known.entry.rows @ known.residual.T, atol=1e-5)


def test_a_host_sees_the_pages_of_each_row_that_is_looked_up(
    ground: Any, everything: Callable[[str], Material]
) -> None:
    view = matrix.views(everything("hardened"), ["host"])["host"]
    assert isinstance(view, View)
    assert view.pages is not None
    assert view.pages[0].row_bytes == 192 * 4
    text = ground.victims[0][:-1]
    assert [pages[0] for pages in view.pages[0].pages] == (text * 768 // 4096).tolist()


@pytest.mark.parametrize("row", ["enclave", "host"])
def test_an_enclave_without_tables_is_no_attackers_aim(ground: Any, row: str) -> None:
    reason = matrix.views(ground.material("throughput"), [row])[row]
    assert isinstance(reason, NotApplicable)
    assert "holds no tables under throughput" in str(reason)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("base", "no public base was named"),
        ("accomplice", "no user helps"),
        ("sibling", "no second instance"),
    ],
)
def test_who_is_not_there_is_said(ground: Any, row: str, words: str) -> None:
    reason = matrix.views(ground.material("paper"), [row])[row]
    assert isinstance(reason, NotApplicable)
    assert words in str(reason)


def test_a_second_instance_without_a_user_there_is_no_sibling(ground: Any) -> None:
    material = ground.material("paper", "sibling")
    lonely = replace(material, twin=replace(material.twin, labelled=[]))
    reason = matrix.views(lonely, ["sibling"])["sibling"]
    assert isinstance(reason, NotApplicable)
    assert "no user of the second instance" in str(reason)


# Bases.


def llama(folder: Path, **changed: Any) -> Network:
    shape = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2}
    config = LlamaConfig(**(shape | {"num_hidden_layers": 1} | changed))
    cast(Any, LlamaForCausalLM)(config).save_pretrained(folder)
    return Network(folder)


def test_how_far_a_base_is_off_is_known_to_its_holder(tmp_path: Path) -> None:
    base = llama(tmp_path)
    noise = np.random.default_rng(1).normal(0, 0.05 * base.embedding.std(), base.embedding.shape)
    tuned = Entry((base.embedding + noise).astype(np.float32), None, 0.0)
    entry = matrix.base_entry(base, tuned)
    assert entry.drift == pytest.approx(0.05, rel=0.1)
    assert (entry.rows == base.embedding).all()
    assert matrix.base_entry(base, Entry(base.embedding, None, 0.0)).drift == 0.0


def test_learned_positions_of_a_base_are_part_of_its_table(tmp_path: Path) -> None:
    torch.manual_seed(2)
    shape = GPT2Config(vocab_size=31, n_embd=16, n_layer=1, n_head=2, n_positions=12)
    model = cast(Any, GPT2LMHeadModel)(shape)
    model.save_pretrained(tmp_path)
    words, positions = (each.weight.detach().numpy() for each in (model.transformer.wte, model.transformer.wpe))
    entry = matrix.base_entry(Network(tmp_path), Entry(words, positions, 0.0))
    assert entry.drift == 0.0
    np.testing.assert_allclose(entry.at(7), words + positions[7], atol=1e-6)


def test_a_base_of_another_shape_is_refused(tmp_path: Path, ground: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"base embedding.*\(31, 16\)"):
        matrix.views(replace(ground.material("paper"), base=llama(tmp_path)), ["base"])


# Cells.


def test_an_attack_is_measured_with_each_knowledge_that_helps_it(ground: Any) -> None:
    alone, known = cells(ground, [attack(nearest_sorted)], ["server", "table"])
    assert (alone.knowledge, known.knowledge) == ("server", "table")
    assert known.metrics[0].name == "token_top1"
    assert known.metrics[0].measured.value == 1.0
    assert known.figures == {"drift": 0.0}
    prior = alone.metrics[0].prior
    assert prior is not None
    assert alone.metrics[0].measured.value < prior.low


def test_a_dense_key_keeps_sorted_rows_at_the_prior(ground: Any) -> None:
    (known,) = cells(ground, [attack(nearest_sorted)], ["table"], "hardened")
    prior = known.metrics[0].prior
    assert prior is not None
    assert known.metrics[0].measured.low <= prior.high


def test_an_attack_that_lacks_what_it_needs_is_not_run(ground: Any) -> None:
    def never(view: View) -> Claims:
        raise AssertionError("it was run")

    needy = attack(never, ("base",), frozenset({Grant.BASE, Grant.HOST}))
    found = cells(ground, [needy, attack(never, ("table",))], ["server", "base"])
    assert [cell.not_applicable for cell in found] == [
        "needs the public checkpoint that the model derives from and the enclave's host",
        "uses nothing of what this attacker has beyond the operator: see the rows where it is run",
        "needs the enclave's host",
        "uses nothing of what this attacker has beyond the operator: see the rows where it is run",
    ]
    assert not any(cell.metrics for cell in found)


def test_a_row_without_an_attacker_says_so_for_the_attacks_that_would_run_there(ground: Any) -> None:
    (cell,) = cells(ground, [attack(nearest_sorted, ("base",), frozenset({Grant.BASE}))], ["base"])
    assert cell.not_applicable == "no public base was named"


def test_an_attack_says_itself_what_makes_it_meaningless(ground: Any) -> None:
    def refusing(view: View) -> Claims:
        raise NotApplicable(f"nothing to do under {view.preset}")

    (cell,) = cells(ground, [attack(refusing)], ["server"])
    assert cell.not_applicable == "nothing to do under paper"
    assert cell.metrics == ()


def test_what_goes_wrong_in_an_attack_is_raised_with_where_it_was(ground: Any) -> None:
    def broken(view: View) -> Claims:
        raise ZeroDivisionError("in an attack")

    with pytest.raises(ZeroDivisionError, match="in an attack") as caught:
        cells(ground, [attack(broken)], ["table"])
    assert caught.value.__notes__ == ["in attack Z (nearest sorted row) with knowledge table"]


def test_an_attack_that_claims_nothing_is_a_fault(ground: Any) -> None:
    with pytest.raises(ClaimInvalid):
        cells(ground, [attack(lambda view: Claims())], ["server"])


def test_cells_come_row_by_row_and_progress_is_told_before_each(ground: Any) -> None:
    material, told = ground.material("paper"), list[tuple[str, str]]()
    rows, attacks = ["server", "table"], [attack(nearest_sorted, ("table",)), attack(nearest_sorted, ("base",))]
    found = matrix.cells(
        matrix.views(material, rows), attacks, Judge(material), lambda letter, row: told.append((letter, row))
    )
    assert told == []
    assert (
        [(cell.attack, cell.knowledge) for cell in found]
        == told
        == [
            ("Z", "server"),
            ("Z", "server"),
            ("Z", "table"),
            ("Z", "table"),
        ]
    )


def test_the_same_material_and_seed_give_the_same_cells(ground: Any) -> None:
    first, again = (cells(ground, [attack(nearest_sorted, ("drifted",))], ["drifted"]) for _ in range(2))
    assert first == again
