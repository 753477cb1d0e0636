"""A folder of demo pictures, clips and a broken file, and its index by the tiny model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_video import write_clip

from lavis_aurora.demo.pictures import generate_pictures
from lavis_aurora.search.answering import ARCH as ANSWERS
from lavis_aurora.search.index import ARCH, PictureIndex
from lavis_aurora.search.model import ModelSource, SearchModel

TINY = ModelSource(model_type="tiny")


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """24 pictures in ``shapes``, two clips in ``clips``, and a broken picture."""
    folder = tmp_path_factory.mktemp("made")
    generate_pictures(folder, "clean", {"test": 24})
    (folder / "images/clean/test").rename(folder / "shapes")
    shutil.rmtree(folder / "images")
    for seed in range(2):
        write_clip(folder / "clips" / f"{seed}.mp4", frames=6, seed=seed)
    (folder / "broken.jpg").write_text("no picture")
    return folder


@pytest.fixture
def gallery(made, tmp_path) -> Path:
    """The same, to be changed."""
    shutil.copytree(made, tmp_path / "gallery")
    return tmp_path / "gallery"


@pytest.fixture(scope="session")
def model() -> SearchModel:
    return SearchModel(ARCH, TINY, "cpu")


@pytest.fixture(scope="session")
def answering() -> SearchModel:
    return SearchModel(ANSWERS, TINY, "cpu")


@pytest.fixture(scope="session")
def indexed(made, tmp_path_factory) -> PictureIndex:
    """Of :func:`made`, outside it."""
    pytest.importorskip("lancedb", reason='pip install "lavis-aurora[search]"', exc_type=ImportError)
    index = PictureIndex(made, tmp_path_factory.mktemp("index") / "of_made", model_type="tiny", device="cpu")
    index.update()
    return index


@pytest.fixture
def open_index(gallery, model, monkeypatch):
    """The index of ``gallery``, opened anew, always with the same loaded model where none is named."""
    pytest.importorskip("lancedb", reason='pip install "lavis-aurora[search]"', exc_type=ImportError)

    def opened(folder: Path = gallery, index: Path | None = None) -> PictureIndex:
        with monkeypatch.context() as patch:
            patch.setattr("lavis_aurora.search.index.SearchModel", lambda *args: model)
            return PictureIndex(folder, index, device="cpu")

    return opened
