"""The page of ``lavis-aurora app`` in a headless Chromium, as a user sees it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from PIL import Image
from tiny import activate, tiny_model

pytest.importorskip("streamlit")
pytest.importorskip("lancedb", reason='pip install "lavis-aurora[search]"', exc_type=ImportError)
pytest.importorskip("playwright.sync_api", reason='pip install "lavis-aurora[test]"')
from playwright import sync_api as browsers

from lavis_aurora import save_adapter
from lavis_aurora.common.paths import package_file
from lavis_aurora.demo.pictures import generate_pictures
from lavis_aurora.search import PictureIndex
from lavis_aurora_cli import command_parser
from lavis_aurora_commands import app_command

ROOT = Path(__file__).parents[1]
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium, or set CHROMIUM")
# A file of this name would run a script, and be bold, where names are read as HTML or Markdown.
EVIL = "<img src=x onerror=document.title='run'> **bold**.jpg"
WAIT = 30_000
# The first page of a server imports LAVIS and loads the models, as other programs run.
FIRST = 180_000
SEARCHES = 20


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``pictures``, indexed, one broken and one of an evil name; ``empty``, indexed; and ``adapter``."""
    folder = tmp_path_factory.mktemp("browser")
    generate_pictures(folder, "clean", {"test": 12})
    (folder / "images/clean/test").rename(folder / "pictures")
    (folder / "pictures/00000.jpg").rename(folder / "pictures" / EVIL)
    (folder / "pictures/broken.jpg").write_text("no picture")
    (folder / "empty").mkdir()
    for name in ("pictures", "empty"):
        PictureIndex(folder / name, model_type="tiny", device="cpu").update()
    weights = package_file("configs/models/tiny/model.safetensors")
    save_adapter(activate(tiny_model(pretrained=weights, mode_approx={"rank": 4})), folder / "adapter")
    return folder


class Server:
    """``lavis-aurora app`` in a process of its own."""

    def __init__(self, *args: object) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        argv = ["app", *map(str, args), "--device=cpu", f"--port={port}"]
        # What the command becomes once it has imported LAVIS to check its arguments, see tests/test_app.py.
        command = app_command(command_parser().parse_args(argv))
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 60
        while True:
            try:
                urlopen(f"{self.url}/_stcore/health", timeout=5).close()
                return
            except (URLError, OSError):
                assert self.process.poll() is None and time.monotonic() < until, "the page did not start"
                time.sleep(0.2)

    def memory(self) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text(encoding="utf-8").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def close(self) -> None:
        self.process.kill()  # it keeps nothing
        self.process.wait(30)


@pytest.fixture(scope="module")
def server(made: Path) -> Iterator[Server]:
    running = Server(made / "pictures", f"--adapter=A={made / 'adapter'}")
    yield running
    running.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[browsers.Browser]:
    with browsers.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # root has no sandbox
        yield launched
        launched.close()


@pytest.fixture
def page(browser: browsers.Browser, server: Server) -> Iterator[browsers.Page]:
    """The page, opened."""
    one = opened(browser, server)
    yield one
    one.close()


def opened(browser: browsers.Browser, server: Server, width: int = 1280) -> browsers.Page:
    one = browser.new_page(viewport={"width": width, "height": 900})
    one.set_default_timeout(WAIT)
    one.goto(server.url)
    one.get_by_role("tab", name="Search").wait_for(timeout=FIRST)
    return one


def settle(page: browsers.Page) -> None:
    """Wait until the page has been drawn."""
    page.wait_for_timeout(300)
    page.locator("[data-testid=stApp][data-test-script-state=notRunning]").wait_for()


def search(page: browsers.Page, words: str) -> None:
    page.get_by_label("Search for").fill(words)
    page.keyboard.press("Enter")


def names(page: browsers.Page, view: int = 0, count: int = 6) -> list[str]:
    """Of the files that are shown by one of the adapters, best first."""
    texts = page.locator("[data-testid=stText]").filter(has_text="ITC ").all_inner_texts()
    return [text.split("\n")[0].partition(". ")[2] for text in texts[view * count :][:count]]


def found(made: Path, words: str, **query: object) -> list[str]:
    index = PictureIndex(made / "pictures", device="cpu")
    return [Path(hit.path).name for hit in index.search(words, top=6, **query)]


def test_words_are_searched_for_and_adapters_switched(page, made):
    search(page, "a red star")
    page.get_by_role("button", name="look closer").nth(11).wait_for()
    settle(page)
    assert names(page) == found(made, "a red star")
    assert page.locator("h3").count() == 2
    pictures = page.locator("[data-testid=stImage] img")
    assert pictures.count() == 12 and all(one.evaluate("e => e.naturalWidth") == 480 for one in pictures.all())
    adapted = names(page, view=1)
    close = page.locator("[data-baseweb=tag] [role=presentation]")
    page.get_by_role("button", name="frozen").or_(close).first.click()
    page.wait_for_function("document.querySelectorAll('h3').length == 1")
    settle(page)
    assert page.locator("h3").inner_text().startswith("A (") and names(page) == adapted


@pytest.mark.slow
def test_a_picture_is_looked_at_and_asked_about(page):
    search(page, "a red star")
    page.get_by_role("button", name="look closer").first.click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Ask about it").fill("how many shapes are there?")
    page.keyboard.press("Enter")
    dialog.get_by_text("frozen: ").filter(has_text="confidence").wait_for()
    settle(page)  # the dialog is drawn again with the answer
    dialog.get_by_role("radio").nth(2).wait_for(state="attached")
    assert dialog.get_by_role("radio").count() == 3
    maps = dialog.locator("[data-testid=stImage] img").nth(1)
    before = maps.get_attribute("src")
    dialog.get_by_text("red", exact=True).click()
    dialog.get_by_text("frozen: bright is where “red” looks").wait_for()
    settle(page)
    assert maps.get_attribute("src") != before


@pytest.mark.slow
def test_by_keyboard_alone(page, made):
    """Tab reaches what is needed, Enter and Escape act."""

    def reach(role: str, name: str) -> None:
        at = "(e => /INPUT|BUTTON/.test(e.tagName) ? `${e.ariaLabel} ${e.innerText}` : '')(document.activeElement)"
        for _ in range(40):
            page.keyboard.press("Tab")
            if name in page.evaluate(at):
                return
        raise AssertionError(f"Tab does not reach {role} {name}")

    settle(page)
    reach("field", "Search for")
    page.keyboard.type("a blue circle")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="look closer").nth(11).wait_for()
    settle(page)
    assert names(page) == found(made, "a blue circle")
    reach("button", "look closer")
    page.keyboard.press("Enter")
    page.get_by_role("dialog").wait_for()
    reach("field", "Ask about it")
    page.keyboard.type("what color is the circle?")
    page.keyboard.press("Enter")
    page.get_by_text("frozen: ").filter(has_text="confidence").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="detached")


@pytest.mark.slow
def test_names_are_shown_as_they_are_and_broken_files_listed(page):
    settle(page)
    page.get_by_text("Files that cannot be read, left out: 1").click()
    page.get_by_text("broken.jpg: ").wait_for()
    search(page, "a shape")
    page.get_by_text("Options").click()
    slider = page.get_by_role("slider").first
    slider.focus()
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    page.get_by_role("button", name="look closer").nth(23).wait_for()
    settle(page)
    assert EVIL in names(page, count=12) and page.title() == "Aurora"
    assert page.locator("img[src=x]").count() == 0 and page.locator("strong").count() == 0
    search(page, "<img src=x onerror=document.title='run'> a star")
    settle(page)
    assert page.locator("img[src=x]").count() == 0 and page.title() == "Aurora"


@pytest.mark.slow
def test_uploads_are_searched_with_and_bounded(page, made, tmp_path):
    settle(page)
    field = page.locator("[data-testid=stFileUploader] input").first
    field.set_input_files(made / "pictures/00003.jpg")
    page.get_by_role("button", name="look closer").nth(11).wait_for()
    settle(page)
    assert names(page)[0] == "00003.jpg"
    (tmp_path / "no.jpg").write_text("no picture")
    field.set_input_files(tmp_path / "no.jpg")
    page.get_by_text("no.jpg cannot be used as a picture").wait_for()
    (tmp_path / "large.jpg").write_bytes(bytes(21_000_000 + 2**20))
    field.set_input_files(tmp_path / "large.jpg")
    page.get_by_text("File must be 20.0MB or smaller").or_(page.get_by_text("must be 20")).first.wait_for()
    Image.new("1", (10_000, 5_001)).save(tmp_path / "wide.png")  # a small file of too many pixels
    field.set_input_files(tmp_path / "wide.png")
    page.get_by_text("has more than 50,000,000 pixels").wait_for()


@pytest.mark.slow
def test_a_narrow_window(browser, server):
    page = opened(browser, server, width=360)
    search(page, "a red star")
    page.get_by_role("button", name="look closer").nth(11).wait_for()
    settle(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    boxes = [one.bounding_box() for one in page.get_by_role("button", name="look closer").all()]
    assert len({round(box["x"]) for box in boxes}) == 1 and all(box["x"] + box["width"] <= 360 for box in boxes)
    page.close()


@pytest.mark.slow
def test_an_empty_index(browser, made):
    running = Server(made / "empty")
    try:
        page = opened(browser, running)
        page.get_by_text("The index is empty").wait_for()
        page.get_by_role("tab", name="Ask about a picture of your own").click()
        page.locator("[data-testid=stFileUploader] input").first.set_input_files(made / "pictures/00003.jpg")
        page.get_by_label("Ask about it").fill("what color is it?")
        page.keyboard.press("Enter")
        page.get_by_text("frozen: ").filter(has_text="confidence").wait_for()
        page.close()
    finally:
        running.close()


@pytest.mark.slow
def test_searches_side_by_side_are_not_mixed_and_memory_does_not_grow(browser, server, made):
    words = [
        f"a {size} {color} {shape}"
        for color in ("red", "blue", "pink", "cyan", "brown")
        for size in ("big", "small")
        for shape in ("star", "ring")
    ]
    assert len(words) == SEARCHES
    expected = [found(made, one) for one in words]
    assert len({tuple(one) for one in expected}) > SEARCHES // 2
    pages = [opened(browser, server) for _ in words]

    def all_search(shift: int) -> int:
        asked = words[shift:] + words[:shift]
        for page, one in zip(pages, asked):
            search(page, one)
        for page, right in zip(pages, expected[shift:] + expected[:shift]):
            page.get_by_role("button", name="look closer").nth(11).wait_for()
            settle(page)
            assert names(page) == right
        return server.memory()

    try:
        first = all_search(0)
        assert max(all_search(shift) for shift in (1, 2)) < first + 100e6
    finally:
        for page in pages:
            page.close()
