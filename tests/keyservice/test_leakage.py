"""The policy's leakage maxima: what they refuse, what they let through, and which ones do not load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stip_keyservice.service.leakage import LeakagePolicy, worst
from stip_keyservice.service.policy import Policy
from stip_protocol.errors import Action, LeakageRefused, PolicyInvalid
from stip_protocol.leakage import Leakage, LeakageCell

from .conftest import MEASUREMENT, cell, no_cell

PRODUCTION = f"""
serial = 1
[[instances]]
manifest = "{"cd" * 32}"
[evidence]
mode = "production"
measurements = ["{MEASUREMENT.hex()}"]
"""
RULE: dict[str, Any] = {"knowledge": ["server"], "metric": "token_top1", "at_most": 0.2}


def audit(*cells: LeakageCell) -> Leakage:
    return Leakage(report_sha256="ab" * 32, seed=1, cells=cells)


def hold(measured: Leakage | None, *maxima: dict[str, Any], preset: str = "hardened", required: bool = False) -> None:
    LeakagePolicy.model_validate({"required": required, "maxima": list(maxima)}).require(measured, preset)


HOLDS: dict[str, tuple[dict[str, Any], tuple[LeakageCell, ...]]] = {
    "an upper end below": (RULE, (cell("server", "A", token_top1=0.1),)),
    "an upper end that just reaches it": (RULE, (cell("server", "A", token_top1=0.2),)),
    "nothing but attacks that are not applicable": (RULE, (no_cell("server", "D"), no_cell("server", "N"))),
    "an attack that is not applicable beside one below": (
        RULE,
        (no_cell("server", "D"), cell("server", "A", token_top1=0.1)),
    ),
    "an attack without the metric beside one below": (
        RULE,
        (cell("server", "E", residual_cosine=1.0), cell("server", "A", token_top1=0.1)),
    ),
    "another metric that is above": (RULE, (cell("server", "A", token_top1=0.1, token_top10=0.9),)),
    "another row that is above": (RULE, (cell("server", "A", token_top1=0.1), cell("table", "A", token_top1=1.0))),
    "an attack above that the rule does not name": (
        RULE | {"attacks": ["A"]},
        (cell("server", "A", token_top1=0.1), cell("server", "C", token_top1=1.0)),
    ),
    "every row below": (
        RULE | {"knowledge": ["server", "drifted"]},
        (cell("server", "A", token_top1=0.1), cell("drifted", "A", token_top1=0.2)),
    ),
    "a named attack that is not applicable": (RULE | {"attacks": ["D"]}, (no_cell("server", "D"),)),
}


@pytest.mark.parametrize(("rule", "cells"), HOLDS.values(), ids=HOLDS)
def test_a_maximum_holds_with(rule: dict[str, Any], cells: tuple[LeakageCell, ...]) -> None:
    hold(audit(*cells), rule)


REFUSES: dict[str, tuple[dict[str, Any], tuple[LeakageCell, ...], str]] = {
    "an upper end above": (RULE, (cell("server", "A", token_top1=0.41),), "attack A with server reaches 0.41"),
    "an upper end above though the figure is below": (
        RULE,
        (cell("server", "A", token_top1=0.21),),
        "reaches 0.21, the upper end",
    ),
    "the worst of several attacks": (
        RULE,
        (cell("server", "A", token_top1=0.1), cell("server", "C", token_top1=0.9), cell("server", "I", token_top1=0.5)),
        "attack C with server reaches 0.9",
    ),
    "one row of several above": (
        RULE | {"knowledge": ["server", "table"]},
        (cell("server", "A", token_top1=0.1), cell("table", "B", token_top1=1.0)),
        "attack B with table reaches 1.0",
    ),
    "an audit of nothing": (RULE, (), "server was not audited"),
    "an audit without its row": (RULE, (cell("table", "A", token_top1=0.0),), "server was not audited"),
    "an audit without one of its rows": (
        RULE | {"knowledge": ["server", "drifted"]},
        (cell("server", "A", token_top1=0.0),),
        "drifted was not audited",
    ),
    "an audit without a named attack": (
        RULE | {"attacks": ["A", "B"]},
        (cell("server", "A", token_top1=0.0), cell("table", "B", token_top1=0.0)),
        "attack B with server was not audited",
    ),
    "an audit that measured something else": (
        RULE | {"metric": "rouge_l"},
        (cell("server", "A", token_top1=0.0),),
        "no attack with server measured rouge_l",
    ),
    "one that measured something else beside what is not applicable": (
        RULE,
        (cell("server", "E", residual_cosine=0.0), no_cell("server", "D")),
        "no attack with server measured token_top1",
    ),
    "a metric measured only by attacks that the rule does not name": (
        RULE | {"attacks": ["E"]},
        (cell("server", "A", token_top1=0.0), cell("server", "E", residual_cosine=0.0)),
        "no attack with server measured token_top1",
    ),
    "a second cell of the same place that is above": (
        RULE,
        (cell("server", "A", token_top1=0.1), cell("server", "A", token_top1=0.9)),
        "reaches 0.9",
    ),
}


@pytest.mark.parametrize(("rule", "cells", "said"), REFUSES.values(), ids=REFUSES)
def test_a_maximum_refuses(rule: dict[str, Any], cells: tuple[LeakageCell, ...], said: str) -> None:
    with pytest.raises(LeakageRefused) as caught:
        hold(audit(*cells), rule)
    assert said in caught.value.message
    assert f"{rule['metric']} at most 0.2 with server" in caught.value.message
    assert caught.value.action is Action.FIX_CONFIGURATION


def test_the_refusal_names_the_first_rule_that_is_broken() -> None:
    measured = audit(cell("server", "A", token_top1=0.1, token_top10=0.5), cell("table", "B", token_top1=1.0))
    ten = {"knowledge": ["server"], "metric": "token_top10", "at_most": 0.4, "attacks": ["A"], "presets": ["hardened"]}
    with pytest.raises(LeakageRefused) as caught:
        hold(measured, RULE, ten, RULE | {"knowledge": ["table"]})
    assert caught.value.message == (
        "leakage.maxima, rule 2 (token_top10 at most 0.4 with server; attacks A; presets hardened): "
        "attack A with server reaches 0.5, the upper end of its 95 % interval"
    )


def test_an_instance_that_was_not_audited_is_refused_by_required_and_by_every_maximum_that_concerns_it() -> None:
    for required, maxima in ((True, []), (False, [RULE]), (True, [RULE | {"presets": ["paper"]}])):
        with pytest.raises(LeakageRefused, match="not audited"):
            hold(None, *maxima, required=required)


def test_a_maximum_for_other_presets_does_not_concern_an_instance() -> None:
    strict = RULE | {"presets": ["hardened"], "at_most": 0}
    leaky = audit(cell("server", "A", token_top1=1.0))
    for measured in (None, leaky):
        hold(measured, strict, preset="paper")
        with pytest.raises(LeakageRefused):
            hold(measured, strict, preset="hardened")


@given(upper=st.floats(0, 1), most=st.floats(0, 1))
def test_a_maximum_refuses_exactly_the_upper_ends_above_it(upper: float, most: float) -> None:
    measured, rule = audit(cell("server", "A", token_top1=upper)), RULE | {"at_most": most}
    if upper <= most:
        hold(measured, rule)
    else:
        with pytest.raises(LeakageRefused):
            hold(measured, rule)


def test_the_worst_of_a_row_is_its_largest_upper_end_or_nothing() -> None:
    rows = worst(
        audit(
            cell("server", "A", token_top1=0.1, token_top10=0.3),
            cell("server", "E", residual_cosine=0.2),
            no_cell("base", "D"),
            cell("table", "B", token_top1=1.0),
            no_cell("table", "N"),
        )
    )
    found = {row: None if it is None else (it.upper, it.metric, it.attack) for row, it in rows.items()}
    assert found == {"server": (0.3, "token_top10", "A"), "base": None, "table": (1.0, "token_top1", "B")}


@pytest.mark.parametrize(
    "table",
    [
        "[leakage]",
        "[leakage]\nrequired = false",
        "[leakage]\nrequired = 1",
        "[leakage]\nrequire = true",
        "[leakage]\nrequired = true\nmaxima = 1",
        *(
            "[[leakage.maxima]]\n" + rule
            for rule in (
                'metric = "token_top1"\nat_most = 0.2',
                'knowledge = ["server"]\nat_most = 0.2',
                'knowledge = ["server"]\nmetric = "token_top1"',
                'knowledge = []\nmetric = "token_top1"\nat_most = 0.2',
                'knowledge = "server"\nmetric = "token_top1"\nat_most = 0.2',
                'knowledge = ["The server"]\nmetric = "token_top1"\nat_most = 0.2',
                'knowledge = ["server"]\nmetric = "token_top2"\nat_most = 0.2',
                'knowledge = ["server"]\nmetric = "token_top1"\nat_most = 1.1',
                'knowledge = ["server"]\nmetric = "token_top1"\nat_most = -0.1',
                'knowledge = ["server"]\nmetric = "token_top1"\nat_most = nan',
                'knowledge = ["server"]\nmetric = "token_top1"\nat_most = true',
                'knowledge = ["server"]\nmetric = "token_top1"\nat_most = "0.2"',
                'knowledge = ["server"]\nmetric = "token_top1"\nat_most = 0.2\nattacks = []',
                'knowledge = ["server"]\nmetric = "token_top1"\nat_most = 0.2\nattacks = ["arrow"]',
                'knowledge = ["server"]\nmetric = "token_top1"\nat_most = 0.2\npresets = []',
                'knowledge = ["server"]\nmetric = "token_top1"\nat_most = 0.2\npresets = ["hard"]',
                'knowledge = ["server"]\nmetric = "token_top1"\nat_most = 0.2\nat_least = 0.1',
            )
        ),
    ],
)
def test_refuses_to_load_a_policy_with(tmp_path: Path, table: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(PRODUCTION + table)
    with pytest.raises(PolicyInvalid, match=r"policy\.toml: leakage"):
        Policy.load(path)


def test_more_maxima_than_the_limit_are_refused() -> None:
    with pytest.raises(ValidationError, match="at most 128"):
        hold(None, *[RULE] * 129)


def test_a_policy_without_maxima_refuses_nobody(
    tmp_path: Path,
) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(PRODUCTION)
    policy = Policy.load(path)
    policy.require_measured(None, "paper")
    policy.require_measured(audit(cell("server", "A", token_top1=1.0)), "paper")


def test_every_part_of_the_maxima_is_in_the_digest(tmp_path: Path) -> None:
    def digest(table: str) -> bytes:
        path = tmp_path / "policy.toml"
        path.write_text(PRODUCTION + table)
        return Policy.load(path).digest()

    rule = '[[leakage.maxima]]\nknowledge = ["server"]\nmetric = "token_top1"\nat_most = 0.2\n'
    tables = [
        "",
        "[leakage]\nrequired = true\n",
        rule,
        "[leakage]\nrequired = true\n" + rule,
        rule.replace("0.2", "0.3"),
        rule.replace("server", "table"),
        rule.replace("top1", "top10"),
        rule + 'attacks = ["A"]\n',
        rule + 'presets = ["paper"]\n',
    ]
    assert len({digest(table) for table in tables}) == len(tables)
    assert digest(rule) == digest("# reviewed\n" + rule)
