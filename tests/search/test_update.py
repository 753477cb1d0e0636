"""An index follows its folder: what is new or changed is worked on, and nothing else."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lavis_aurora import AuroraError
from lavis_aurora.search import files as files_module
from lavis_aurora.search import update as update_module
from lavis_aurora.search.files import look_through
from lavis_aurora.search.store import Store

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def worked_on(model, monkeypatch):
    """How many pictures and clips went through the model."""
    seen: list[int] = []
    features = model.model.image_features

    def image_features(samples):
        seen.append(len(next(iter(samples.values()))))
        return features(samples)

    monkeypatch.setattr(model.model, "image_features", image_features)

    def count() -> int:
        total = sum(seen)
        seen.clear()
        return total

    return count


def contents(index) -> dict[str, np.ndarray]:
    """Features of all entries by path."""
    found = index._store.nearest(np.zeros(64, np.float32), 1000)
    return {entry.path: entry.feature for entry in found}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.allclose(a[path], b[path], atol=1e-5) for path in a)


def fresh(open_index, gallery, tmp_path) -> dict[str, np.ndarray]:
    """What an index that is made anew holds."""
    shutil.rmtree(tmp_path / "fresh", ignore_errors=True)
    index = open_index(gallery, tmp_path / "fresh")
    index.update()
    return contents(index)


def test_only_what_is_new_or_changed_is_worked_on(open_index, gallery, tmp_path, worked_on):
    index = open_index()
    done = index.update()
    assert (done.new, done.unchanged, worked_on(), len(index)) == (26, 0, 26, 26)
    assert list(done.broken) == ["broken.jpg"] and "cannot identify image file" in done.broken["broken.jpg"]
    done = index.update()
    assert (done.changes, done.unchanged, worked_on()) == (0, 26, 0) and list(done.broken) == ["broken.jpg"]

    shapes = gallery / "shapes"
    shutil.copy(shapes / "00000.jpg", gallery / "copy of a picture.jpg")  # its content is known
    shutil.copy(shapes / "00001.jpg", shapes / "00002.jpg")  # as that of 00001 is
    os.utime(shapes / "00003.jpg")
    (shapes / "00004.jpg").rename(gallery / 'it\'s "moved" ü.jpg')
    (shapes / "00005.jpg").unlink()
    (shapes / "00006.jpg").write_bytes((shapes / "00006.jpg").read_bytes() + b" ")
    done = open_index().update()
    assert (done.new, done.changed, done.moved, done.removed, worked_on()) == (0, 1, 4, 2, 1)
    assert done.unchanged == 26 - 5 and len(index) == 26 - 1 + 1
    assert same(contents(index), fresh(open_index, gallery, tmp_path))


def test_a_file_of_the_same_size_and_time_as_before_is_trusted_any_other_is_read(open_index, gallery, worked_on):
    index, path = open_index(), gallery / "shapes/00000.jpg"
    index.update()
    worked_on()
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-40:-30] = bytes(10)
    path.write_bytes(content)
    assert path.stat().st_size == before.st_size
    assert index.update().changed == 1 and worked_on() == 1


@pytest.mark.parametrize("files", [1, 1000])
def test_files_that_swap_names_keep_their_features(open_index, gallery, tmp_path, worked_on, monkeypatch, files):
    monkeypatch.setattr(update_module, "WRITE_FILES", files)
    index, shapes = open_index(), gallery / "shapes"
    index.update()
    worked_on()
    (shapes / "00000.jpg").rename(shapes / "x")
    (shapes / "00009.jpg").rename(shapes / "00000.jpg")
    (shapes / "x").rename(shapes / "00009.jpg")
    done = index.update()
    assert (done.moved, done.changed, worked_on()) == (2, 0, 0)
    assert same(contents(index), fresh(open_index, gallery, tmp_path))


def test_broken_files_are_tried_again_when_they_change_or_when_asked(open_index, gallery, monkeypatch):
    index, path = open_index(), gallery / "shapes/00000.jpg"
    index.update()
    read = []
    reader = index.model.read
    monkeypatch.setattr(index.model, "read", lambda file: read.append(Path(file).name) or reader(file))
    index.update()
    assert read == []
    assert list(index.update(retry_broken=True).broken) == ["broken.jpg"] and read == ["broken.jpg"]
    shutil.copy(gallery / "shapes/00001.jpg", gallery / "broken.jpg")
    whole = path.read_bytes()
    path.write_bytes(whole[:500])
    done = index.update()
    assert list(done.broken) == ["shapes/00000.jpg"] == list(index.broken()) and done.moved == 1
    assert "shapes/00000.jpg" not in contents(index) and "broken.jpg" in contents(index)
    path.write_bytes(whole)
    assert index.update().broken == {} == index.broken()


def test_what_cannot_be_read_at_all_is_tried_the_next_time(open_index, monkeypatch):
    def refuse(path):
        raise OSError(5, "Input/output error")

    index = open_index()
    with monkeypatch.context() as patch:
        patch.setattr(update_module, "digest_of", refuse)
        assert set(index.update().broken.values()) == {"Input/output error"} and len(index) == 0
    assert index.update().new == 26


class Killed(BaseException):
    pass


@pytest.mark.parametrize("writes", range(4))
def test_killed_anywhere_it_goes_on(open_index, gallery, tmp_path, worked_on, monkeypatch, writes):
    monkeypatch.setattr(update_module, "WRITE_FILES", 4)
    monkeypatch.setattr(update_module, "IMAGE_CHUNK", 4)
    put, calls = Store.put, []

    def dying(self, entries):
        calls.append(1)
        if len(calls) > writes:
            raise Killed
        put(self, entries)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", dying)
        with pytest.raises(Killed):
            open_index().update()
    index = open_index()
    before = len(index)
    assert 4 * writes <= before < 26
    worked_on()
    assert index.update().new == worked_on() == 26 - before
    assert same(contents(index), fresh(open_index, gallery, tmp_path))


@pytest.mark.slow
def test_killed_by_the_system_it_goes_on(open_index, gallery, tmp_path):
    code = (
        "import sys, time; from lavis_aurora.search import PictureIndex, update; update.WRITE_FILES = 2; "
        "index = PictureIndex(sys.argv[1], model_type='tiny'); read = index.model.read; "
        "index.model.read = lambda path: time.sleep(0.2) or read(path); update.READERS = 1; "
        "print(flush=True); index.update()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen([sys.executable, "-c", code, gallery], stdout=subprocess.PIPE, env=environment) as other:
        other.stdout.readline()
        end = time.monotonic() + 60
        while time.monotonic() < end and len(open_index()) < 4:
            time.sleep(0.1)
        other.send_signal(signal.SIGKILL)
    index = open_index()
    before = len(index)
    assert 4 <= before < 26
    assert index.update().new == 26 - before
    assert same(contents(index), fresh(open_index, gallery, tmp_path))


def test_a_disk_that_is_not_there_empties_nothing(open_index, gallery, monkeypatch):
    index = open_index()
    index.update()
    scandir = os.scandir

    def refuse(folder):
        if Path(folder).name == "clips":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    with monkeypatch.context() as patch:
        patch.setattr(files_module.os, "scandir", refuse)
        done = index.update()
    assert done.removed == 0 and done.broken["clips"] == "Permission denied" and len(index) == 26
    for path in gallery.iterdir():
        if path.name != ".aurora_index":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(AuroraError, match="holds no picture or clip, and its index .* has 26; is its disk there"):
        index.update()
    assert len(index) == 26


def test_what_a_tree_holds(tmp_path):
    for name in ("a.JPG", "b/c.webm", "b/notes.txt", ".hidden/d.jpg", "b/.e.png", "index/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "b/back").symlink_to(tmp_path)
    (tmp_path / "link.png").symlink_to(tmp_path / "a.JPG")
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe.png")
    os.close(os.open(os.fsencode(tmp_path) + b"/\xff.png", os.O_CREAT))
    tree = look_through(tmp_path, [tmp_path / "index"])
    assert sorted(tree.files) == ["a.JPG", "b/c.webm", "link.png"]
    assert tree.unreadable["nowhere.png"] == "No such file or directory"
    assert "its name is not in UTF-8; rename it" in tree.unreadable.values() and len(tree.unreadable) == 2
    with pytest.raises(AuroraError, match="name a folder of pictures"):
        look_through(tmp_path / "absent")
