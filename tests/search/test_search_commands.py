"""The commands index, search and answer."""

from __future__ import annotations

import json
import warnings
import webbrowser

import pytest
from matplotlib.axes import Axes
from PIL import Image

from lavis_aurora.search import PictureIndex
from lavis_aurora_cli import main

MODEL = ("--model-type", "tiny", "--device", "cpu")


@pytest.fixture
def run(capsys):
    """Run a command; what it printed."""

    def ran(*argv: object) -> str:
        main([str(word) for word in argv])
        return capsys.readouterr().out

    return ran


@pytest.fixture
def failing(capsys):
    def ran(*argv: object) -> str:
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in argv])
        assert caught.value.code == 1
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    return ran


def test_index_and_search(run, failing, gallery, tmp_path, monkeypatch):
    pytest.importorskip("lancedb", exc_type=ImportError)
    out = run("index", gallery, *MODEL)
    assert f"{gallery}/.aurora_index: 26 pictures and clips (26 new, 0 changed" in out
    assert "1 files cannot be read and are left out:\n  broken.jpg: cannot identify" in out
    told = json.loads(run("index", gallery, "--json"))
    assert told["unchanged"] == told["entries"] == 26 and list(told["broken"]) == ["broken.jpg"]

    expected = PictureIndex(gallery).search("a red star", minus="a circle", top=3, rerank=2)
    words = ("search", gallery, "a red star", "--minus", "a circle", "--top", 3, "--rerank", 2)
    assert [hit["path"] for hit in json.loads(run(*words, "--json"))] == [hit.path for hit in expected]
    head, *rows = run(*words, "--sheet", tmp_path / "hits.png").splitlines()
    assert head.split() == ["score", "ITM", "ITC", "by", "ITC", "file"] and rows[-1] == str(tmp_path / "hits.png")
    assert [row.split()[-1] for row in rows[:3]] == [hit.path for hit in expected]
    assert rows[0].split()[:3] == ["1.", f"{expected[0].score:.3f}", f"{expected[0].itm:.3f}"]
    assert len(rows[2].split()) == len(rows[0].split()) - 1  # not reranked: no ITM
    with Image.open(tmp_path / "hits.png") as sheet:
        assert sheet.width > sheet.height > 100

    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) or True)
    assert run("search", gallery, "--image", gallery / "clips/0.mp4", "--open").splitlines()[-1] in opened[0]
    said = run("search", gallery, "a star", "--where", "kind = 'video'")
    hint = "in --where, kind is 'picture' or 'clip', and path begins below the folder: 'holiday/1.jpg'"
    assert said.strip() == f"nothing was found; {hint}"
    assert "no such folder" in failing("search", tmp_path / "absent", "a star")
    assert "has no index; make it by" in failing("search", tmp_path, "a star", *MODEL)
    assert "nothing to search for" in failing("search", gallery)
    assert "--sheet: hits.jpg is to be a PNG" in failing("search", gallery, "a star", "--sheet", "hits.jpg")


def test_names_of_any_kind_are_shown_on_a_line_and_drawn(run, failing, tmp_path, monkeypatch):
    pytest.importorskip("lancedb", exc_type=ImportError)
    folder, names = tmp_path / "odd", ("two\nlines \x1b[2J.jpg", "\u65e5\u672c.jpg", "it's.jpg")
    folder.mkdir()
    (tmp_path / "empty").mkdir()
    for name in names:
        Image.new("RGB", (3000, 2000), "red").save(folder / name)
    (folder / "bro\nken.jpg").write_text("no picture")
    told = run("index", folder, *MODEL)
    assert told.splitlines()[-1] == "  bro\\nken.jpg: cannot identify image file: it is no picture, or damaged"
    drawn = []
    imshow = Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda axis, x: drawn.append(x.size) or imshow(axis, x))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of signs that the font has not
        _, *rows, sheet = run("search", folder, "a star", "--sheet", tmp_path / "hits.png").splitlines()
    assert len(rows) == 3 and "two\\nlines \\x1b[2J.jpg" in "".join(rows) and sheet == str(tmp_path / "hits.png")
    assert drawn == [(480, 320)] * 3  # not the whole of large photographs
    run("index", tmp_path / "empty", *MODEL)
    assert run("search", tmp_path / "empty", "a star").endswith("is empty\n")


def test_an_index_whose_folder_is_gone_or_whose_adapter_is_misspelt(run, failing, gallery, tmp_path):
    pytest.importorskip("lancedb", exc_type=ImportError)
    run("index", gallery, "--out", tmp_path / "index", *MODEL)
    assert "/nope is no adapter folder" in failing("search", tmp_path / "index", "a star", "--adapter", "/nope")
    gallery.rename(tmp_path / "moved")
    said = failing("search", tmp_path / "index", "a star")
    assert f"is of {gallery}, which is not there" in said
    assert f"lavis-aurora index FOLDER --out {tmp_path / 'index'}" in said
    run("index", tmp_path / "moved", "--out", tmp_path / "index")
    assert str(tmp_path / "moved") in run("search", tmp_path / "index", "a star")


def test_answer(run, failing, gallery, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = gallery / "shapes/00000.jpg"
    one, two = run("answer", "--image", image, "how many shapes?", "is there a star?", *MODEL).splitlines()
    assert one.endswith("  how many shapes?") and two.endswith("  is there a star?")
    [told, _] = json.loads(run("answer", "--image", image, "how many shapes?", "is there a star?", "--json", *MODEL))
    assert one == f"{told['answer']}  ({told['confidence']:.2f})  how many shapes?"

    [told] = json.loads(run("answer", "--image", image, "how many shapes?", "--json", *MODEL))
    (gallery / "q.json").write_text(json.dumps([{"image": "shapes/00000.jpg", "question": "how many shapes?"}]))
    (tmp_path / "choice.json").write_text('["one", "two", "three"]')
    assert run("answer", gallery / "q.json", *MODEL) == "answers.json: 1 answers\n"
    [given] = json.loads((tmp_path / "answers.json").read_text())
    assert given == {"question_id": 0, "answer": told["answer"], "confidence": told["confidence"]}
    run("answer", gallery / "q.json", "--answers", "choice.json", "--out", "ranked.csv", *MODEL)
    assert (tmp_path / "ranked.csv").read_text().splitlines()[1].split(",")[-2] in ("one", "two", "three")
    assert "answers.json is there already" in failing("answer", gallery / "q.json", *MODEL)
    assert "one file of questions" in failing("answer", "how many?", "who?", *MODEL)
    assert "no such file of questions: who?; to ask about" in failing("answer", "who?", *MODEL)
    for content in ("[]", '{"one": 1}', '["one", 2]', '"one"'):
        (tmp_path / "choice.json").write_text(content)
        said = failing("answer", gallery / "q.json", "--answers", "choice.json", "--out", "b.json", *MODEL)
        assert "choice.json holds" in said and 'it must be a list of answers, as ["yes", "no"]' in said
    (gallery / "q.json").write_text('[{"image": "absent.jpg", "question": "who?"}]')
    said = failing("answer", gallery / "q.json", "--out", "b.json", *MODEL)
    assert "b.json: no picture can be read (" in said and "absent.jpg (No such file or directory)" in said
    assert not [*tmp_path.glob("b.json*")]
    assert "--out: is for a file" in failing("answer", "--image", image, "who?", "--out", "a.csv", *MODEL)
    assert "cannot read" in failing("answer", "--image", gallery / "broken.jpg", "who?", *MODEL)
