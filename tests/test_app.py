"""The page of ``lavis-aurora app``, by Streamlit's own AppTest."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import activate, tiny_model

pytest.importorskip("streamlit")
pytest.importorskip("lancedb", reason='pip install "lavis-aurora[search]"', exc_type=ImportError)
from streamlit.testing.v1 import AppTest

from lavis_aurora import AuroraError, save_adapter
from lavis_aurora import app as page
from lavis_aurora.common.paths import package_file
from lavis_aurora.demo.pictures import generate_pictures
from lavis_aurora.search import PictureIndex, views
from lavis_aurora_cli import command_parser
from lavis_aurora_commands import app_command

PAGE = Path(page.__file__)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An index of 12 pictures, one of them named to be read as Markdown, and an adapter."""
    folder = tmp_path_factory.mktemp("app")
    generate_pictures(folder, "clean", {"test": 12})
    shapes = folder / "images/clean/test"
    (shapes / "00000.jpg").rename(shapes / "**bold** [x](javascript:1) <b>.jpg")
    PictureIndex(folder / "images", model_type="tiny", device="cpu").update()
    weights = package_file("configs/models/tiny/model.safetensors")
    save_adapter(activate(tiny_model(pretrained=weights, mode_approx={"rank": 4})), folder / "adapter")
    return folder


@pytest.fixture
def opened(made, monkeypatch):
    """The page over the index, frozen and with an adapter."""

    def run(*argv: object) -> AppTest:
        argv = argv or (made / "images", "--device=cpu", f"--adapter=A={made / 'adapter'}")
        monkeypatch.setattr(sys, "argv", ["app.py", *map(str, argv)])
        return AppTest.from_file(str(PAGE), default_timeout=120).run()

    return run


def shown(at: AppTest) -> list[str]:
    return [one.value for one in at.text]


def test_search_side_by_side(opened, made):
    at = opened()
    assert not at.exception and at.info[0].value == "Give words or a picture."
    at.text_input(key="text").set_value("a red star").run()
    assert not at.exception and not at.error
    assert at.subheader[0].value == page.plain("frozen (no adapter)")
    assert at.subheader[1].value.startswith("A \\(") and "parameters" in at.subheader[1].value
    hits = PictureIndex(made / "images", device="cpu").search("a red star", top=6)
    adapted = [text for text in shown(at) if "ITC" in text]
    assert len(adapted) == 12
    for place, (hit, text) in enumerate(zip(hits, adapted), 1):
        scores = f"ITC {hit.itc:.2f}, ITM {hit.itm:.2f}\nby ITC alone: {hit.itc_rank}."
        assert text == f"{place}. {Path(hit.path).name}\n{scores}"
    assert adapted[:6] != adapted[6:]
    at.multiselect(key="adapters").set_value(["A"]).run()
    assert [text for text in shown(at) if "ITC" in text] == adapted[6:]
    at.slider(key="rerank").set_value(0).run()
    assert not any("ITM" in text for text in shown(at))


def test_a_picture_is_looked_at_and_asked_about(opened, made):
    at = opened()
    at.text_input(key="text").set_value("a red star").run()
    at.session_state["found question"] = "how many shapes are there?"
    at.button(key="frozen 1").click().run()
    assert not at.exception and not at.error
    best = PictureIndex(made / "images", device="cpu").search("a red star", top=1)[0].path
    assert best in shown(at)
    assert at.radio(key="found word").options == ["a", "red", "star"] and at.radio(key="found word").value == 2
    answer = [text for text in shown(at) if text.startswith("frozen: ") and "looks" not in text]
    assert len(answer) == 1 and "(confidence " in answer[0]


def test_what_cannot_be_searched_for_is_said(opened, made, tmp_path):
    at = opened()
    at.text_input(key="text").set_value("!!").run()
    assert not at.exception and "cannot be used" in at.error[0].value
    at = opened(tmp_path / "absent")
    assert not at.exception and "no such folder" in at.error[0].value
    (tmp_path / "empty").mkdir()
    PictureIndex(tmp_path / "empty", model_type="tiny", device="cpu").update()
    at = opened(tmp_path / "empty", "--device=cpu")
    assert not at.exception and any("The index is empty" in one.value for one in at.info)


def test_the_demo_alone_shows_what_tuning_changed(opened, tmp_path, monkeypatch):
    monkeypatch.setenv("AURORA_DATA", str(tmp_path))
    monkeypatch.setattr(views, "DEMO_PICTURES", 20)
    at = opened("--device=cpu")
    assert not at.exception and not at.error
    captions = [row["caption"][0] for row in json.loads((tmp_path / "demo_app/shifted_test.json").read_text())]
    assert at.text_input(key="text").value == captions[page.FIRST_CAPTION]
    places = [text for text in shown(at) if "the picture with this caption" in text]
    assert len(places) == 2 and places[1].endswith("place 1")
    assert sum(text.split("\n")[0] == f"1. 00003.jpg {page.MARK}" for text in shown(at)) >= 1
    at.button(key="another").click().run()
    assert not at.exception and at.text_input(key="text").value == captions[page.FIRST_CAPTION + 1]
    assert [one.value.split(" ")[0] for one in at.subheader] == ["frozen", "tuned"]


def test_uploads_are_bounded_and_must_be_pictures(monkeypatch):
    class Upload(io.BytesIO):
        name = "x.png"

    errors = []
    monkeypatch.setattr(page.st, "error", errors.append)
    picture = Upload()
    Image.new("RGB", (40, 30)).save(picture, "PNG")
    found = page.uploaded(picture)
    assert found is not None and found.getvalue() == picture.getvalue() and errors == []
    assert page.uploaded(None) is None
    for content in (b"", b"no picture", picture.getvalue()[:50]):
        assert page.uploaded(Upload(content)) is None
        assert "cannot be used as a picture" in errors.pop()
    monkeypatch.setattr(page, "LARGEST", 1000)
    assert page.uploaded(picture) is None and "more than 1,000 pixels" in errors.pop().replace("\\", "")


def test_text_is_shown_as_it_is():
    assert page.plain("**a** <b> [x](y) $z$") == r"\*\*a\*\* \<b\> \[x\]\(y\) \$z\$"
    assert "\x1b" not in page.plain("\x1b[2J")


def test_attention_lies_over_the_picture():
    picture = Image.new("RGB", (30, 20), "white")
    grid = np.zeros((2, 3), np.float32)
    grid[0, 2] = 1
    over = np.asarray(page.overlay(picture, grid), int).sum(axis=2)
    assert over.shape == (20, 30) and over[2, 27] > over[17, 2] + 50


def test_the_command_is_bound_to_this_machine(tmp_path):
    args = command_parser().parse_args(["app", "INDEX", "--adapter", "A=x"])
    command = app_command(args)
    assert command[1:4] == ["-m", "streamlit", "run"] and Path(command[4]) == PAGE
    assert "--server.address=127.0.0.1" in command and "--server.maxUploadSize=20" in command
    assert command[command.index("--") + 1 :] == ["INDEX", "--device=auto", "--adapter=A=x"]
    assert page.parse_args(command[command.index("--") + 1 :]).adapter == ["A=x"]
    assert "--server.address=0.0.0.0" in app_command(command_parser().parse_args(["app", "--host", "0.0.0.0"]))
    shutil.rmtree(tmp_path)


def test_the_command_becomes_the_server(made, monkeypatch):
    served = []
    monkeypatch.setattr(os, "execv", lambda *command: served.append(command))
    argv = ["app", str(made / "images"), f"--adapter=A={made / 'adapter'}"]
    args = command_parser().parse_args(argv)
    args.action(args)
    assert served == [(sys.executable, app_command(args))]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["absent"], "absent: no such folder"),
        (["--adapter=A=absent"], "absent is no adapter folder"),
        (["--adapter=frozen=absent"], "frozen is the name of another one"),
    ],
)
def test_what_cannot_be_shown_is_refused_before_it_is_served(argv, message, monkeypatch):
    monkeypatch.setattr(os, "execv", lambda *command: pytest.fail("it is served"))
    args = command_parser().parse_args(["app", *argv])
    with pytest.raises(AuroraError, match=message):
        args.action(args)
