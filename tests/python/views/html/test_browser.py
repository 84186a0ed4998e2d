"""The page in Chromium: it fits the window, reads well in light and dark, runs nothing and asks for nothing."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import html_pages

sync_api = pytest.importorskip("playwright.sync_api")

CHROMIUM = shutil.which("chromium")
WIDTHS = (1280, 400)
SCHEMES = ("light", "dark")
MIN_CONTRAST = 4.5  # WCAG 2.2, level AA

pytestmark = [
    pytest.mark.chromium,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]

PAGES: dict[str, Callable[[], str]] = {
    "plain": lambda: html_pages.page("adapter", [f"model.layers.{i}.mlp.up_proj" for i in range(4)]),
    "hostile": lambda: html_pages.page("\"><script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'>"),
    "long": lambda: html_pages.page("unbroken" * 40),
    "wide": lambda: html_pages.page("wide", [f"layers.{i}.mlp.part{j}.gate" for i in range(3) for j in range(40)]),
    "experts": lambda: html_pages.page("moe", html_pages.experts(layers=6, experts=130)),
    "deep": lambda: html_pages.page("deep", [f"model.layers.{i}.mlp.up_proj" for i in range(100)]),
}

# The contrast of every visible text with what lies behind it, as WCAG defines it; returns those that are too low.
LOW_CONTRAST = """least => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const rgba = color => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const luminance = color => {
    const [r, g, b] = [...rgba(color)].slice(0, 3).map(v => v / 255).map(
      v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if (rgba(color)[3] === 255) return color;
    }
    throw new Error('nothing opaque behind a text');
  };
  let seen = 0;
  const low = [];
  for (const element of document.body.querySelectorAll('*')) {
    const texts = [...element.childNodes].filter(node => node.nodeType === 3 && node.data.trim());
    if (!texts.length || element.tagName === 'title' || !element.getClientRects().length) continue;
    seen += 1;
    const style = getComputedStyle(element);
    const text = luminance(element instanceof SVGElement ? style.fill : style.color);
    const ground = luminance(behind(element));
    const contrast = (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
    if (contrast < least) low.push([texts[0].data.trim(), contrast]);
  }
  return {seen, low};
}"""

# Texts that reach out of their drawing, heat-map cells that do not hold their text, and what lies beside the window.
OUTSIDE = """() => {
  const found = [];
  for (const svg of document.querySelectorAll('svg')) {
    const frame = svg.getBoundingClientRect();
    for (const text of svg.querySelectorAll('text')) {
      const box = text.getBoundingClientRect();
      const beside = box.left < frame.left - 1 || box.right > frame.right + 1;
      if (beside || box.top < frame.top - 1 || box.bottom > frame.bottom + 1) found.push(text.textContent);
    }
  }
  for (const cell of document.querySelectorAll('.heat tbody *'))
    if (cell.scrollWidth > cell.clientWidth + 1 && getComputedStyle(cell).overflow === 'visible')
      found.push(cell.title);
  return found;
}"""


@dataclass
class Opened:
    """A page in the browser, and what happened while it was loaded."""

    page: Any
    requests: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("pages")
    paths = {name: directory / f"{name}.html" for name in PAGES}
    for name, path in paths.items():
        path.write_text(PAGES[name](), encoding="utf-8")
    return paths


@pytest.fixture(params=PAGES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[(width, scheme) for width in WIDTHS for scheme in SCHEMES], ids=lambda p: f"{p[0]}-{p[1]}")
def opened(request: pytest.FixtureRequest, browser: Any, files: dict[str, Path], name: str) -> Iterator[Opened]:
    width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened = Opened(page)
    page.on("request", lambda made: opened.requests.append(made.url))
    page.on("console", lambda message: opened.messages.append(message.text))
    page.on("pageerror", lambda error: opened.messages.append(str(error)))
    page.goto(files[name].as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    yield opened
    page.close()


def test_the_page_fits_the_window_and_is_quiet(opened: Opened, files: dict[str, Path], name: str) -> None:
    page = opened.page
    scroll, client = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert scroll <= client
    assert page.evaluate(OUTSIDE) == []
    assert opened.requests == [files[name].as_uri()]
    assert opened.messages == []
    assert page.evaluate("window.pwned === undefined && document.scripts.length + document.images.length === 0")


def test_every_text_stands_out_from_its_ground(opened: Opened) -> None:
    result = opened.page.evaluate(LOW_CONTRAST, MIN_CONTRAST)
    assert result["seen"] > 100
    assert result["low"] == []


@pytest.mark.parametrize("name", ["plain"])
def test_the_scheme_is_the_readers(opened: Opened, request: pytest.FixtureRequest) -> None:
    ground = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = "dark" in request.node.name
    assert ground == ("rgb(16, 18, 22)" if dark else "rgb(245, 246, 248)")


@pytest.mark.parametrize("name", ["wide"])
def test_a_wide_map_scrolls_within_itself(opened: Opened) -> None:
    scrolls = opened.page.evaluate(
        "[...document.querySelectorAll('.scroll')].filter(e => e.querySelector('.heat'))"
        ".map(e => e.scrollWidth > e.clientWidth)"
    )
    assert scrolls
    assert all(scrolls)
