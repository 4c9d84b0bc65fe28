"""The page in a real browser, on a laptop and on a phone: what its readers see, kept as pictures.

The pictures lie in build/audit-screenshots/.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from stip_keyservice.audit.document import Report
from stip_keyservice.audit.report import grid
from stip_keyservice.audit.report.pages import PAGE, write
from stip_keyservice.audit.report.sections import SECTIONS

from .browser import LAPTOP, PHONE, Page, browser

PICTURES = Path(__file__).parents[3] / "build" / "audit-screenshots"
SCREENS = {"laptop": LAPTOP, "phone": PHONE}
SMALLEST = 12
"""CSS pixels of the smallest text that is still read on a screen."""

CONTRASTS = """(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const known = new Map();
  const resolve = (text) => { if (!known.has(text)) { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text;
    canvas.fillRect(0, 0, 1, 1); const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    known.set(text, [r, g, b, a / 255]); } return known.get(text); };
  const luminance = ([r, g, b]) => { const f = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    return 0.2126 * f(r) + 0.7152 * f(g) + 0.0722 * f(b); };
  const behind = (element) => { for (let e = element; e; e = e.parentElement) {
    const colour = resolve(getComputedStyle(e).backgroundColor); if (colour[3] === 1) return colour; }
    return [255, 255, 255, 1]; };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const drawn = resolve(element.closest('svg') ? style.fill : style.color);
    const [low, high] = [luminance(drawn), luminance(behind(element))].sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) poor.push([walker.currentNode.data.trim().slice(0, 40), Math.round(ratio * 100) / 100]);
  }
  return JSON.stringify(poor);
})()"""
"""Visible texts whose contrast with what is behind them is below 4.5 to 1 (WCAG 2.2, 1.4.3)."""

SIZES = """(() => {
  const sizes = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    if (element.closest('.heard, title, desc')) continue;
    const svg = element.closest('svg');
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    sizes.push(parseFloat(getComputedStyle(element).fontSize) * scale);
  }
  return [Math.min(...sizes), sizes.length];
})()"""


@pytest.fixture(scope="module")
def path(reports: list[Report], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write(reports, folder)
    return folder / PAGE


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(params=SCREENS)
def screen(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def page(reader: Page, path: Path, screen: str) -> Page:
    reader.media(scheme="light")
    reader.complaints.clear()
    reader.open(path, SCREENS[screen])
    return reader


def test_the_page_opens_without_a_complaint(page: Page) -> None:
    assert page.ask("document.readyState") == "complete"
    assert page.ask("document.compatMode") == "CSS1Compat"
    assert page.complaints == []


def test_the_browser_does_complain_about_pages_that_fetch_or_run(reader: Page, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("<!DOCTYPE html><title>x</title><script>console.error('ran'); throw new Error('ran')</script>")
    reader.complaints.clear()
    reader.open(bad, LAPTOP)
    assert any("ran" in complaint for complaint in reader.complaints)


def test_the_page_is_no_wider_than_its_screen(page: Page, screen: str) -> None:
    width = SCREENS[screen][0]
    assert page.ask("innerWidth") == width
    assert page.ask("document.documentElement.scrollWidth") == width
    wide = page.ask(
        "[...document.body.querySelectorAll('*')].filter((e) => e.checkVisibility() && !e.closest('.heard, thead')"
        f" && e.getBoundingClientRect().right > {width} + 0.5).map((e) => e.outerHTML.slice(0, 120))"
    )
    assert wide == []


def test_no_text_is_too_small_to_read(page: Page) -> None:
    smallest, texts = page.ask(SIZES)
    assert texts > 1000
    assert smallest >= SMALLEST
    assert page.ask("parseFloat(getComputedStyle(document.body).fontSize)") >= 16


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_background(page: Page, scheme: str) -> None:
    page.media(scheme=scheme)  # type: ignore[arg-type]
    page.ask("document.querySelectorAll('details').forEach((each) => { each.open = true })")
    poor = json.loads(page.ask(CONTRASTS))
    assert poor == []
    dark = page.ask("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(255, 255, 255)") == (scheme == "light")


def test_all_parts_are_seen_in_their_order(page: Page) -> None:
    sections = "[...document.querySelectorAll('section')]"
    tops = page.ask(f"{sections}.map((each) => [each.id, each.offsetTop, each.offsetHeight])")
    assert [name for name, _, _ in tops] == [section.name for section in SECTIONS]
    assert [top for _, top, _ in tops] == sorted(top for _, top, _ in tops)
    assert all(height > 100 for _, _, height in tops)


def test_the_matrix_is_laid_out_with_all_its_cells(page: Page, screen: str, reports: list[Report]) -> None:
    boxes = page.ask(
        "[...document.querySelectorAll('#matrix tbody td')].map((each) => each.getBoundingClientRect())"
        ".map((box) => [box.width, box.height])"
    )
    assert len(boxes) == len(reports) * sum(line.measured for line in grid.lines(reports))
    least = 120 if screen == "laptop" else 250
    assert all(width >= least and height >= 24 for width, height in boxes)


def test_on_a_laptop_instances_stand_side_by_side_and_their_names_stay(reader: Page, path: Path) -> None:
    reader.open(path, LAPTOP)
    lefts = reader.ask(
        "[...document.querySelector('#matrix tbody tr:not(.group)').querySelectorAll('td')]"
        ".map((each) => each.getBoundingClientRect().left)"
    )
    assert lefts == sorted(set(lefts))
    reader.ask("scrollTo(0, document.getElementById('matrix').offsetTop + 1200)")
    assert reader.ask("document.querySelector('#matrix thead th').getBoundingClientRect().top") == 0


def test_on_a_phone_every_cell_names_its_instance_and_the_attacker_stays(reader: Page, path: Path) -> None:
    reader.open(path, PHONE)
    named = reader.ask(
        "[...document.querySelectorAll('#matrix td')].every((each) => "
        "getComputedStyle(each, '::before').content === JSON.stringify(each.dataset.label))"
    )
    assert named is True
    reader.ask("scrollTo(0, document.querySelector('#matrix tbody').getBoundingClientRect().top + scrollY + 300)")
    assert reader.ask("document.querySelector('#matrix .group').getBoundingClientRect().top") == 0


def test_on_a_phone_a_card_s_heading_takes_its_whole_width(reader: Page, path: Path) -> None:
    reader.open(path, PHONE)
    reader.ask("document.querySelectorAll('details').forEach((each) => { each.open = true })")
    narrow = reader.ask(
        "[...document.querySelectorAll('.cards tbody th')].filter((each) => each.getBoundingClientRect().width < "
        "each.parentElement.getBoundingClientRect().width - 4).map((each) => each.innerText)"
    )
    assert narrow == []


def test_tapping_not_applicable_shows_the_reason(page: Page) -> None:
    page.ask("document.querySelector('#matrix button').scrollIntoView({block: 'center'})")
    x, y, goal, reason = page.ask(
        "(() => { const each = document.querySelector('#matrix button'), box = each.getBoundingClientRect();"
        " return [box.x + box.width / 2, box.y + box.height / 2, each.getAttribute('popovertarget'), each.title] })()"
    )
    seen = f"document.getElementById('{goal}').checkVisibility()"
    assert page.ask(seen) is False
    page.tap(x, y)
    assert page.ask(seen) is True
    assert reason in page.ask(f"document.getElementById('{goal}').innerText")


def test_on_paper_everything_is_there_and_light(reader: Page, path: Path) -> None:
    reader.media(scheme="dark", medium="print")
    reader.open(path, LAPTOP)
    assert reader.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert reader.ask("[...document.querySelectorAll('details table')].every((each) => each.checkVisibility())") is True
    reader.media()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_of_every_part_are_kept(page: Page, screen: str, scheme: str) -> None:
    page.media(scheme=scheme)  # type: ignore[arg-type]
    for section in SECTIONS:
        page.ask(f"scrollTo(0, document.getElementById('{section.name}').offsetTop)")
        picture = PICTURES / f"{screen}-{scheme}-{section.name}.png"
        page.screenshot(picture)
        assert picture.read_bytes().startswith(b"\x89PNG")
    page.ask("scrollTo(0, 0)")
    page.screenshot(PICTURES / f"{screen}-{scheme}.png")
