"""The pages: whole, the same for the same findings, and nothing in them runs or comes from elsewhere."""

from __future__ import annotations

import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from stip_keyservice.audit.document import Cell, Point, Report
from stip_keyservice.audit.report import catalogue
from stip_keyservice.audit.report.comparison import CLAIMS
from stip_keyservice.audit.report.html import VOID
from stip_keyservice.audit.report.pages import MARKDOWN, PAGE, write
from stip_protocol.errors import ConfigurationError

from .conftest import interval, made_up, tokens

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> \"' | `code` [a](javascript:b) & *"


class Elements(HTMLParser):
    """What a page consists of; fails where elements do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def values(self, attribute: str) -> list[str]:
        return [value for _, attributes in self.found if (value := attributes.get(attribute)) is not None]


@pytest.fixture(scope="module")
def written(reports: list[Report], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "deep" / "folder"
    write(reports, folder)
    return folder


@pytest.fixture(scope="module")
def elements(written: Path) -> Elements:
    return Elements((written / PAGE).read_text())


def test_the_same_reports_give_the_same_bytes(reports: list[Report], written: Path, tmp_path: Path) -> None:
    write([Report.from_json(report.to_json()) for report in reports], tmp_path)
    for name in (PAGE, MARKDOWN):
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes()


def test_the_page_is_below_a_megabyte(written: Path) -> None:
    assert (written / PAGE).stat().st_size < 1_000_000


def test_nothing_on_the_page_runs_or_comes_from_elsewhere(written: Path, elements: Elements) -> None:
    names = {tag for tag, _ in elements.found}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert not elements.values("src")
    assert not elements.values("style")
    assert all(link.startswith("#") for link in elements.values("href"))
    assert not any(name.startswith("on") for _, attributes in elements.found for name in attributes)
    page = (written / PAGE).read_text()
    assert "url(" not in page
    assert "@import" not in page
    assert any("default-src 'none'" in policy for policy in elements.values("content"))


def test_every_link_and_every_reference_has_its_goal(elements: Elements) -> None:
    ids = elements.values("id")
    assert len(ids) == len(set(ids))
    goals = [link.removeprefix("#") for link in elements.values("href")]
    goals += elements.values("popovertarget")
    goals += [each for value in elements.values("aria-labelledby") for each in value.split()]
    assert set(goals) <= set(ids)


def test_hostile_text_is_shown_and_never_markup(tmp_path: Path) -> None:
    report = made_up("paper", HOSTILE)
    cells = (
        Cell(attack="B", knowledge="table", not_applicable=HOSTILE[:90]),
        Cell(attack="C", knowledge="table", metrics=tokens(0.5), figures={HOSTILE: 1.0}),
    )
    write([report.model_copy(update={"cells": cells}), made_up("paper")], tmp_path)
    elements = Elements((tmp_path / PAGE).read_text())
    assert not {"script", "img"} & {tag for tag, _ in elements.found}
    assert any(HOSTILE in text for text in elements.text)
    said = (tmp_path / MARKDOWN).read_text()
    assert "<script" not in said.replace("\\<script", "")
    assert "[a](" not in said.replace("\\[a\\](", "")


def test_numbers_in_names_are_sorted_by_value_however_they_are_written(tmp_path: Path) -> None:
    names = [f"rows matched {number}" for number in ("2", "10", "1²", "٣", "9" * 5000)]
    cell = Cell(attack="F", knowledge="base", metrics=tokens(0.5), figures=dict.fromkeys(names, 0.5))
    write([made_up("hardened").model_copy(update={"cells": (cell,)})], tmp_path)
    line = re.search(r"F: ArrowMatch.*", (tmp_path / MARKDOWN).read_text())
    assert line is not None
    assert line[0].index("matched 2 ") < line[0].index("matched 10 ") < line[0].index("matched 999")


def test_an_instance_of_which_nobody_said_what_the_model_is_has_whole_sentences(tmp_path: Path) -> None:
    write([made_up("paper", ""), made_up("paper", "")], tmp_path)
    page, said = ((tmp_path / name).read_text() for name in (PAGE, MARKDOWN))
    assert "<h3>paper (1) " in page
    assert ">Model: 5 layers" in page
    assert "\nModel, " in said
    assert "paper, (" not in page + said


def test_every_measured_cell_stands_in_the_matrix_with_interval_and_guess(tmp_path: Path) -> None:
    cells = (
        Cell(attack="C", knowledge="table", metrics=tokens(0.62)),
        Cell(attack="B", knowledge="table", not_applicable="for a reason of its own"),
    )
    write([made_up("hardened").model_copy(update={"cells": cells}), made_up("paper")], tmp_path)
    page = (tmp_path / PAGE).read_text().replace("\N{NO-BREAK SPACE}", " ")
    line = re.search(r'<tr><th scope="row"><a href="#attack-C">.*?</tr>', page.split('id="matrix"')[1])
    assert line is not None
    assert "62.0 %" in line[0]
    assert "59.8 to 64.2 %" in line[0]
    assert "guess 18.0 %" in line[0]
    assert page.count("for a reason of its own") >= 3  # on hover, when tapped, and in the list


def test_what_was_not_run_is_not_called_not_applicable(tmp_path: Path) -> None:
    part = made_up("hardened").model_copy(update={"cells": (Cell(attack="C", knowledge="table", metrics=tokens(0.5)),)})
    whole = made_up("paper")
    write([part, whole], tmp_path)
    matrix = (tmp_path / PAGE).read_text().split('id="matrix"')[1].split("</table>")[0]
    assert "not run" in matrix
    write([whole], tmp_path)
    assert "not run" not in (tmp_path / PAGE).read_text()


def test_nothing_that_is_not_applicable_has_a_figure(elements: Elements, written: Path) -> None:
    page = (written / PAGE).read_text().replace("\N{NO-BREAK SPACE}", " ")
    linking = re.findall(r'<tr><th scope="row"><a href="#attack-O">.*?</tr>', page)
    assert len(linking) == 1
    cell = re.search(r'<td data-label="throughput">.*?</td>', linking[0])
    assert cell is not None
    assert "not applicable" in cell[0]
    assert "0 %" not in cell[0]


def test_all_papers_claims_stand_beside_ours(written: Path) -> None:
    for text in ((written / PAGE).read_text(), (written / MARKDOWN).read_text().replace("\\", "")):
        for claim in CLAIMS:
            assert claim.source.split(",")[0] in text
        assert all(figure in text for figure in ("0.062", "0.017", "538", "919–1028", "11640–13963", "Fig. 9b"))
        assert "Not comparable in scale" in text


def test_a_claim_without_a_measurement_says_so(tmp_path: Path) -> None:
    write([made_up("paper").model_copy(update={"cells": (), "correlations": ()})], tmp_path)
    assert (tmp_path / PAGE).read_text().count("not measured") >= len(CLAIMS)


def test_all_limits_all_attacks_and_all_controls_are_there(elements: Elements) -> None:
    assert len(catalogue.LIMITS) == 8
    assert set(catalogue.LIMITS) <= set(elements.text)
    assert {f"attack-{letter}" for letter in "ABCDEFGHIJKLMNO"} <= set(elements.values("id"))
    assert {control.name for control in catalogue.CONTROLS} <= set(elements.text)


def test_both_pages_name_the_digest_of_each_report(reports: list[Report], written: Path) -> None:
    for report in reports:
        digest = hashlib.sha256(report.to_json()).hexdigest()
        assert digest == report.summary().report_sha256
        assert digest in (written / PAGE).read_text()
        assert digest in (written / MARKDOWN).read_text()
    assert "--seed 0" in (written / PAGE).read_text()


def test_instances_of_one_preset_are_told_apart(tmp_path: Path) -> None:
    write([made_up("paper"), made_up("paper", "a fine-tune"), made_up("paper", "a fine-tune")], tmp_path)
    page = (tmp_path / PAGE).read_text()
    for label in ("paper, bundled model", "paper, a fine-tune (1)", "paper, a fine-tune (2)"):
        assert f"<h3>{label} " in page


def test_a_table_names_its_columns_and_rows(elements: Elements) -> None:
    scopes = [attributes.get("scope") for tag, attributes in elements.found if tag == "th"]
    assert set(scopes) == {"col", "row", "rowgroup"}
    tables = [tag for tag, _ in elements.found if tag in ("table", "caption")]
    assert tables.count("table") == tables.count("caption")


def test_every_plot_says_in_words_what_it_shows(elements: Elements) -> None:
    plots = [attributes for tag, attributes in elements.found if tag == "svg" and attributes.get("class") == "plot"]
    assert len(plots) >= 6
    assert all(plot.get("role") == "img" and plot.get("aria-labelledby") for plot in plots)
    assert any("C table 100" in text for text in elements.text)


def test_markdown_tables_have_as_many_cells_in_every_line(written: Path) -> None:
    count = 0
    for line in (written / MARKDOWN).read_text().splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert cells == count or not count or not cells
        count = cells
    assert "| table | C " in (written / MARKDOWN).read_text()


def test_no_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no leakage\.json was given"):
        write([], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_one_price_is_no_curve_and_stands_among_all_figures(tmp_path: Path) -> None:
    point = Point(curve="layers of the cache", x=1, measured=interval(0.37))
    cell = Cell(attack="H", knowledge="base", metrics=tokens(0.4), points=(point,))
    write([made_up("hardened").model_copy(update={"cells": (cell,)})], tmp_path)
    page = (tmp_path / PAGE).read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert "What more effort buys" not in page
    assert "tokens at 1 layers of the cache" in page
    assert "37.0 %" in page
