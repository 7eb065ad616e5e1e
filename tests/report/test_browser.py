"""The page in a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cenote.report
from tests.report.factory import make_comparison, write_run

CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path; apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright; pip install cenote[test]")
    with playwright.sync_playwright() as p:
        launched = p.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    nasty = [f"<script>window.hacked = 1</script><img src=x onerror='window.hacked=2'>{i}" for i in range(6)]
    write_run(out, make_comparison(12, complete=False), ids=nasty, labelled=True)
    return cenote.report.write(out)


@pytest.fixture(scope="module")
def bags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bags")
    write_run(out, make_comparison(30), grid=None, images=False, labelled=True)
    return cenote.report.write(out)


class Visit:
    """A page with everything that it complained about or asked for."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, scheme: str = "light", **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme, **options)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: self.complaints.append(m.text))
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.page.goto(path.as_uri())

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def column(self, key: str) -> list[str]:
        return self.page.eval_on_selector_all(".board > tbody", f"rows => rows.map(r => r.getAttribute('data-{key}'))")

    def color(self, selector: str, of: str = "backgroundColor") -> str:
        return self.page.eval_on_selector(selector, f"e => getComputedStyle(e).{of}")


def test_it_is_quiet_asks_for_nothing_and_runs_no_foreign_script(browser: Any, report: Path, bags: Path) -> None:
    for path in (report, bags):
        with Visit(browser, path) as v:
            v.page.wait_for_timeout(200)
            assert v.complaints == []
            assert [r for r in v.requests if not r.startswith("data:")] == [path.as_uri()]
            assert v.page.evaluate("window.hacked") is None


def test_the_table_sorts_by_click(browser: Any, report: Path) -> None:
    with Visit(browser, report) as v:
        button = v.page.locator(".board th button[data-key=latency]")
        button.click()
        up = [float(x) for x in v.column("latency")]
        assert up == sorted(up)
        assert button.locator("xpath=..").get_attribute("aria-sort") == "ascending"
        assert v.page.locator(".board th[aria-sort]").count() == 1
        assert "Latency" in v.page.locator("#sorted").inner_text()
        button.click()
        assert [float(x) for x in v.column("latency")] == up[::-1]
        assert button.locator("xpath=..").get_attribute("aria-sort") == "descending"
        v.page.locator(".board th button[data-key=method]").click()
        assert v.column("method") == sorted(v.column("method"))
        v.page.locator(".board th button[data-key=rank]").click()
        assert v.column("rank") == [str(i) for i in range(1, 13)]


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_the_table_sorts_by_keyboard_and_keeps_the_empty_last(key: str, browser: Any, report: Path) -> None:
    with Visit(browser, report) as v:
        v.page.locator(".board th button[data-key=rank]").focus()
        for _ in range(4):
            v.page.keyboard.press("Tab")
        assert v.page.evaluate("document.activeElement.dataset.key") == "p"
        for _ in range(2):
            v.page.keyboard.press(key)
            assert v.column("p")[-1] == ""
            assert v.column("method")[-1] == "mean"
        down = [float(x) for x in v.column("p")[:-1]]
        assert down == sorted(down, reverse=True)
        assert down[0] != down[-1]


def test_details_open_and_move_with_their_method(browser: Any, report: Path) -> None:
    with Visit(browser, report) as v:
        first = v.page.locator(".board > tbody").first
        details = first.locator(".details")
        assert not details.is_visible()
        first.locator(".open").press("Enter")
        assert details.is_visible()
        assert "per seed" in details.inner_text()
        name = first.get_attribute("data-method")
        v.page.locator(".board th button[data-key=metric]").click()
        v.page.locator(".board th button[data-key=metric]").click()
        assert v.column("method")[-1] == name
        assert v.page.locator(".board > tbody").last.locator(".details").is_visible()


def test_pairs_are_read_out_by_pointer_and_arrow_keys(browser: Any, report: Path) -> None:
    with Visit(browser, report) as v:
        names = v.column("method")
        v.page.locator(".pairs td[tabindex='0']").focus()
        v.page.keyboard.press("ArrowRight")
        said = v.page.locator("#pair").inner_text()
        assert said.startswith(f"{names[0]} minus {names[1]}: ")
        assert "adjusted p" in said
        v.page.keyboard.press("ArrowDown")
        v.page.keyboard.press("ArrowDown")
        assert v.page.locator("#pair").inner_text().startswith(f"{names[2]} minus {names[1]}: −")
        assert v.page.locator(".pairs td[tabindex='0']").count() == 1
        v.page.locator(".pairs tbody tr").nth(3).locator("td").nth(0).hover()
        assert v.page.locator("#pair").inner_text().startswith(f"{names[3]} minus {names[0]}: ")


def test_items_are_chosen_by_click_and_arrow_keys(browser: Any, report: Path) -> None:
    with Visit(browser, report) as v:
        panels = v.page.locator(".sample")
        assert [panels.nth(i).is_visible() for i in range(3)] == [True, False, False]
        v.page.locator("#tab-0").focus()
        v.page.keyboard.press("ArrowRight")
        assert [panels.nth(i).is_visible() for i in range(3)] == [False, True, False]
        assert v.page.locator("[role=tab][aria-selected=true]").get_attribute("id") == "tab-1"
        v.page.locator("#tab-2").click()
        assert [panels.nth(i).is_visible() for i in range(3)] == [False, False, True]
        image = panels.nth(2).locator(".photo img").first
        assert image.evaluate("e => e.naturalWidth") == 14
        panels.nth(2).locator(".bare-switch").check()
        assert image.evaluate("e => getComputedStyle(e).opacity") == "0"


@pytest.mark.parametrize("width", [320, 390, 700, 945, 1000, 1125])
def test_it_fits_the_screen(width: int, browser: Any, report: Path, bags: Path) -> None:
    for path in (report, bags):
        with Visit(browser, path, width) as v:
            v.page.eval_on_selector_all(".open, details > summary", "buttons => buttons.forEach(b => b.click())")
            assert v.page.evaluate("document.documentElement.scrollWidth") <= width
            assert v.complaints == []


def test_the_phone_shows_the_small_plot_and_can_sort(browser: Any, report: Path) -> None:
    with Visit(browser, report, 390) as v:
        assert v.page.locator("svg.plot.narrow").is_visible()
        assert not v.page.locator("svg.plot.wide").is_visible()
        v.page.locator(".board th button[data-key=parameters]").click()
        sizes = [int(x) for x in v.column("parameters")]
        assert sizes == sorted(sizes)


def test_dark_mode_by_the_system_and_by_the_button(browser: Any, report: Path) -> None:
    def brightness(color: str) -> float:
        return sum(float(x) for x in color.split("(")[1].rstrip(")").split(",")[:3]) / 3

    with Visit(browser, report) as v:
        light = brightness(v.color("body"))
        assert light > 200 > 100 > brightness(v.color("body", "color"))
        v.page.locator(".theme").click()
        assert brightness(v.color("body")) < 60
        assert brightness(v.color("body", "color")) > 200
        v.page.reload()
        assert brightness(v.color("body")) < 60
        v.page.emulate_media(media="print")
        assert brightness(v.color("body")) == 255
        assert brightness(v.color("body", "color")) < 100
    with Visit(browser, report, scheme="dark") as v:
        assert brightness(v.color("body")) < 60
        assert v.page.locator(".theme").inner_text() == "Light mode"
        v.page.locator(".theme").click()
        assert brightness(v.color("body")) == light


def luminance(channels: list[float]) -> float:
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground(scheme: str, browser: Any, report: Path) -> None:
    # the browser itself mixes the colours: a canvas gives back plain numbers whatever way they were written
    reader = """([ink, ground]) => {
        const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
        const read = (color) => {
            canvas.fillStyle = color;
            canvas.fillRect(0, 0, 1, 1);
            return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((c) => c / 255);
        };
        return [read(ink), read(ground)];
    }"""
    with Visit(browser, report, scheme=scheme) as v:
        for ink, ground in (
            ("h1", "body"),
            (".kicker", "body"),
            (".contents a", "body"),
            (".about", "section"),
            (".summary", "section"),
            (".board th button", "section"),
            (".tag.win", ".tag.win"),
            (".best .summary", ".best"),
            (".banner", ".banner"),
            (".pairs td.up", ".pairs td.up"),
            (".pairs td.down", ".pairs td.down"),
            (".pairs td:not(.up, .down, .self)[data-p]", ".pairs td:not(.up, .down, .self)[data-p]"),
            (".yes", "section"),
            (".look figcaption", "section"),
        ):
            a, b = v.page.evaluate(reader, [v.color(ink, "color"), v.color(ground)])
            high, low = sorted((luminance(a), luminance(b)), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, ink)


def test_without_scripts_everything_can_be_read(browser: Any, report: Path) -> None:
    with Visit(browser, report, java_script_enabled=False) as v:
        assert all(panel.is_visible() for panel in v.page.locator(".sample").all())
        assert all(row.is_visible() for row in v.page.locator(".details").all())
        assert not v.page.locator(".theme").is_visible()
