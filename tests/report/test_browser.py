"""The pages in a real browser: nothing is fetched, nothing breaks, and they fit a phone and a dark room."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scmodelforge.evaluation.shown_cells import write_cells
from scmodelforge.report.benchmark_page import write_benchmark_report
from scmodelforge.report.comparison import compare
from scmodelforge.report.run_page import write_report
from tests.report.examples import ATTACK, cells, hostile_results, results_file, run_folder

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the dev extra (playwright)")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(
            f"needs a browser on the PATH ({', '.join(BROWSERS)}); on Debian: apt-get install chromium"
        )
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each kind, and one in which every name attacks."""
    folder = tmp_path_factory.mktemp("pages")
    long = "a_class_with_a_name_that_is_longer_than_the_screen_of_a_phone_and_has_no_space_in_it"
    run = run_folder(folder / "run", {"notes": [long]}, data={"paths": [long]})
    write_cells(cells(300, tuple(f"{long}{i}" for i in range(14))), run / "validation_cells.h5ad")
    results_file(run / "benchmark.json")
    hostile = run_folder(folder / ("hostile" + "x" * 60), {"notes": [ATTACK], "versions": {ATTACK: ATTACK}})
    write_cells(cells(40, ("B", ATTACK)), hostile / "validation_cells.h5ad")
    hostile_results(hostile / "benchmark.json")
    return {
        "run": write_report(run),
        "benchmark": write_benchmark_report(results_file(folder / "metrics.json", model=long)),
        "comparison": compare([run, hostile, run], folder / "comparison.html"),
        "hostile": write_report(hostile),
    }


class Visit:
    """A page in a window, and all that it asked for or complained of."""

    def __init__(self, browser: Any, path: Path, width: int = 1180, scheme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        for box in self.page.query_selector_all("details"):
            box.evaluate("box => box.open = true")


@pytest.mark.parametrize("kind", ["run", "benchmark", "comparison", "hostile"])
def test_a_page_loads_alone_and_fits(browser: Any, pages: dict[str, Path], kind: str) -> None:
    for width in (360, 1180):
        visit = Visit(browser, pages[kind], width)
        assert visit.requests == [pages[kind].as_uri()]
        assert visit.complaints == []
        assert visit.page.evaluate("document.documentElement.scrollWidth") == width, "no sideways scroll"
        assert visit.page.evaluate("window.attacked") is None
        assert visit.page.query_selector_all("img") == []
        for picture in visit.page.query_selector_all("svg, .strip div"):
            box = picture.bounding_box()
            assert box["width"] > 60, "charts have room"
            assert box["height"] > 10
        small = visit.page.evaluate(
            "Math.min(...[...document.querySelectorAll('.axis text')].map(t => t.getBoundingClientRect().height))"
        )
        assert small == float("inf") or small > 8, "text of charts stays readable"
        visit.page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(browser: Any, pages: dict[str, Path], scheme: str) -> None:
    """Contrast of at least 4.5 to 1 (WCAG AA) for text and for the labels of charts."""
    page = Visit(browser, pages["run"], scheme=scheme).page
    colours = """selector => {
        const element = document.querySelector(selector), style = getComputedStyle(element);
        let behind = element, ground = 'rgba(0, 0, 0, 0)';
        while (behind && ground === 'rgba(0, 0, 0, 0)') {
            ground = getComputedStyle(behind).backgroundColor;
            behind = behind.parentElement;
        }
        return [element instanceof SVGElement ? style.fill : style.color, ground];
    }"""
    for selector in (
        "body",
        ".lede",
        ".kind",
        ".quiet",
        ".headlines .note",
        ".axis text",
        ".legend li",
        "nav a",
    ):
        text, ground = (_luminance(colour) for colour in page.evaluate(colours, selector))
        contrast = (max(text, ground) + 0.05) / (min(text, ground) + 0.05)
        assert contrast >= 4.5, (selector, contrast)
        assert (text > ground) == (scheme == "dark"), selector
    page.close()


def test_a_command_is_copied_and_a_class_picked_out(browser: Any, pages: dict[str, Path]) -> None:
    visit = Visit(browser, pages["run"])
    page = visit.page
    page.click("button.copy")
    # Not wait_for_function: it evaluates a string each time it asks again, which the page's policy forbids.
    page.wait_for_selector("button.copy:text-matches('^(Copied|Selected)$')")
    assert (
        page.evaluate("getSelection().toString()").strip() == "scmodelforge train --config 'my config.yaml'"
    )
    page.hover("figure.umap li[data-class='3']")
    chosen = page.eval_on_selector_all(
        "figure.umap:first-child path.on", "paths => paths.map(path => path.dataset.class)"
    )
    assert set(chosen) == {"3"}
    assert visit.complaints == []
    page.close()


def test_headings_and_tables_are_told_to_those_who_cannot_see(browser: Any, pages: dict[str, Path]) -> None:
    page = Visit(browser, pages["run"]).page
    levels = page.eval_on_selector_all("h1, h2, h3", "found => found.map(heading => +heading.tagName[1])")
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels)), "none is skipped"
    assert page.eval_on_selector_all("svg", "found => found.every(svg => svg.getAttribute('aria-label'))")
    assert page.eval_on_selector_all("th", "found => found.every(th => th.scope)")
    assert page.eval_on_selector_all("table", "found => found.every(table => table.caption)")
    page.close()


def _luminance(colour: str) -> float:
    """Relative luminance of "rgb(r, g, b)", as WCAG 2 defines it."""
    parts = [float(part) / 255 for part in colour.partition("(")[2].rstrip(")").split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
