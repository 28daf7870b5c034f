"""The pages in a real browser: drawn at once, readable on a screen and on a phone, light and dark, and moved by the mouse."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tbrm.reporting.comparison import read_groups
from tbrm.reporting.comparison_page import write_comparison
from tbrm.reporting.page import write_report
from tests.tbrm.reporting.browser import CHROMIUM, Browser, browser
from tests.tbrm.reporting.made_run import ATTACK, make_run, write_samples
from tests.tbrm.reporting.made_run import sample as response

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")

ACCURACY = "[data-figure=accuracy]"
EVIL = "<img src=x onerror=alert(1)>"
LIGHT = {"blue": "#0072b2", "orange": "#d55e00", "green": "#009e73"}
DARK = {"blue": "#58b2e8", "orange": "#f08a4b", "green": "#2fc49a"}
PIXELS = """(colour => [...document.querySelectorAll("[data-figure]")].map(figure => {
    const canvas = figure.querySelector("canvas"), {width, height} = canvas;
    const {data} = canvas.getContext("2d").getImageData(0, 0, width, height);
    let found = 0;
    for (let i = 0; i < data.length; i += 4)
        found += data[i] === colour[0] && data[i + 1] === colour[1] && data[i + 2] === colour[2] && data[i + 3] === 255;
    return found;
}))"""
"""How many pixels of each plot have exactly that colour."""
UNREADABLE = """(() => {
    const light = colour => colour.match(/[\\d.]+/g).map(Number), shown = [];
    const luminance = ([r, g, b]) => [r, g, b].map(c => c / 255).map(c => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
    for (const element of document.querySelectorAll("main *")) {
        if (![...element.childNodes].some(node => node.nodeType === 3 && node.data.trim()) || !element.offsetParent) continue;
        const style = getComputedStyle(element);
        let behind = element;
        while (light(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
        const colours = [style.color, getComputedStyle(behind).backgroundColor];
        const [a, b] = colours.map(c => luminance(light(c))).sort((a, b) => b - a);
        const contrast = (a + .05) / (b + .05), size = parseFloat(style.fontSize);
        if (contrast < 4.5 || size < 12) shown.push([element.textContent.trim(), size, contrast]);
    }
    return shown;
})()"""
"""Texts that are smaller than 12 pixels or hardly stand out from what is behind them."""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    runs = [make_run(folder / f"tbrm-{seed}", after=0.5 + 0.1 * seed, seed=seed) for seed in (0, 2)]
    runs += [
        make_run(folder / name, after=after, objective={"name": name}) for name, after in ((EVIL, 0.4), ("tba", 0.3))
    ]
    write_samples(runs[2], 4, [response(i, correct=i == 0, response=ATTACK) for i in range(20)])
    return {
        "compare": write_comparison(read_groups(runs), folder / "compare.html"),
        "report": write_report(runs[2]),
    }


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def pixels(tab: Browser, colour: str) -> list[int]:
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    found: list[int] = tab.ask(f"{PIXELS}({rgb})")
    return found


def hover(tab: Browser, share: float) -> str:
    """What the accuracy's plot says where the mouse is, at that share of its width."""
    left, top, width, height = tab.place(f"{ACCURACY} .u-over")
    tab.mouse("mouseMoved", left + share * width, top + height / 2)
    return " ".join(tab.ask(f"document.querySelector('{ACCURACY} .tip').innerText").split())


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("name", ["compare", "report"])
def test_pages_are_readable(tab: Browser, pages: dict[str, Path], name: str, width: int, dark: bool) -> None:
    tab.open(pages[name], width, dark=dark)
    assert tab.ask("document.documentElement.scrollWidth") <= width, "nothing is beside the screen"
    assert tab.ask(UNREADABLE) == []
    colours = list((DARK if dark else LIGHT).values())[: 3 if name == "compare" else 1]
    for colour in colours:
        assert pixels(tab, colour)[0] > 100, "a line of the accuracy"
    assert min(pixels(tab, colours[-1])) > 20, "in every plot the one on top, for these runs differ in nothing else"
    widths = tab.ask(
        "[...document.querySelectorAll('[data-figure]')].map(e => [e.clientWidth, e.firstChild.clientWidth])"
    )
    assert all(own == drawn > 250 for own, drawn in widths)


@pytest.mark.parametrize("name", ["compare", "report"])
def test_pages_ask_for_nothing_and_run_nothing_of_others(tab: Browser, pages: dict[str, Path], name: str) -> None:
    tab.open(pages[name], 1400)
    assert EVIL in hover(tab, 0.9) or name == "report"
    tab.ask("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    assert [each["request"]["url"] for each in tab.happened("Network.requestWillBeSent")] == [pages[name].as_uri()]
    for trouble in ("Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening"):
        assert tab.happened(trouble) == []
    assert tab.ask("document.querySelectorAll('img').length") == 0
    assert ATTACK in tab.ask("document.body.innerText")


def test_a_script_that_slips_in_is_stopped(tab: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    """So that the tests above would see one."""
    page = tmp_path / "page.html"
    page.write_text(
        pages["report"].read_text().replace("<main>", "<main><script>alert(1)</script><img src=x onerror=alert(1)>")
    )
    tab.open(page, 1400)
    tab.ask("1")
    refused = [each["entry"]["text"] for each in tab.happened("Log.entryAdded")]
    assert any("script" in text for text in refused) and any("img-src" in text for text in refused)
    assert tab.happened("Page.javascriptDialogOpening") == []


def test_the_mouse_is_told_the_figures_against_what_was_chosen(tab: Browser, pages: dict[str, Path]) -> None:
    tab.open(pages["compare"], 1400)
    assert hover(tab, 0.9) == (f"step 4 tbrm (2 seeds) 60% 50% to 70% {EVIL} 40% 34.2% to 74.2% tba 30% 34.2% to 74.2%")
    assert hover(tab, 0.1).startswith("step 0 tbrm (2 seeds) 20% ")
    for axis, name in (
        ("responses", "responses 80"),
        ("tokens", "tokens generated 10,000"),
        ("seconds", "minutes of training 6.667"),
    ):
        tab.click(f"[data-axis={axis}]")
        assert tab.ask(f"document.querySelector('[data-axis={axis}]').ariaPressed") == "true"
        assert hover(tab, 0.9).startswith(f"{name} tbrm")


def test_dragging_zooms_into_all_plots_and_a_double_click_shows_all_again(tab: Browser, pages: dict[str, Path]) -> None:
    tab.open(pages["compare"], 1400)
    whole = pixels(tab, LIGHT["green"])
    left, top, width, _ = tab.place(f"{ACCURACY} .u-over")
    tab.mouse("mousePressed", left + 0.7 * width, top + 9, button="left", clickCount=1)
    tab.mouse("mouseMoved", left + 0.95 * width, top + 9, button="left")
    tab.mouse("mouseReleased", left + 0.95 * width, top + 9, button="left", clickCount=1)
    assert not tab.ask("document.querySelector('[data-whole]').hidden")
    zoomed = pixels(tab, LIGHT["green"])
    assert sum(a != b for a, b in zip(whole, zoomed, strict=True)) >= 10
    tab.click(f"{ACCURACY} .u-over", count=2)
    assert tab.ask("document.querySelector('[data-whole]').hidden") and pixels(tab, LIGHT["green"]) == whole


def test_a_group_can_be_hidden_and_colours_follow_the_screen(tab: Browser, pages: dict[str, Path]) -> None:
    tab.open(pages["compare"], 1400)
    tab.click("[data-group='1']")
    assert sum(pixels(tab, LIGHT["orange"])) == 0 < sum(pixels(tab, LIGHT["green"]))
    assert EVIL not in hover(tab, 0.9)
    tab.emulate(dark=True)
    assert sum(pixels(tab, LIGHT["green"])) == 0 < sum(pixels(tab, DARK["green"]))
    tab.click("[data-group='1']")
    assert sum(pixels(tab, DARK["orange"])) > 0


def test_phases_of_a_step_are_on_top_of_each_other(tab: Browser, pages: dict[str, Path]) -> None:
    """40 seconds of rollout in blue, and on it 60 of update."""
    tab.open(pages["report"], 1400)
    rollout, update = pixels(tab, LIGHT["blue"])[-1], pixels(tab, LIGHT["orange"])[-1]
    assert 1.3 < update / rollout < 1.7
    assert re.search("Seconds per step by phase rollout update", " ".join(tab.ask("document.body.innerText").split()))
