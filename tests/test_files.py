import os
import socket

import pytest

from lavis_aurora import AuroraError
from lavis_aurora.files import appended, read_json, regular, write_text, written_whole


def test_a_whole_file_takes_the_place_of_the_older_one(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with written_whole(path, previous=tmp_path / "before") as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert (path.read_text(), (tmp_path / "before").read_text()) == ("new", "old")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("No space left"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_older_one_alone(tmp_path, error):
    path = tmp_path / "a"
    path.write_text("old")
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else AuroraError
    with pytest.raises(expected), written_whole(path) as file:
        file.write(b"ne")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert path.read_text() == "old"


def test_what_could_not_be_appended_whole_is_taken_back(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("first\n")
    with pytest.raises(AuroraError, match="cannot write .*log.txt .No space left.*free some space"), appended(path):
        with path.open("a") as file:
            file.write("sec")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "first\n"
    with appended(path), path.open("a") as file:
        file.write("second\n")
    assert path.read_text() == "first\nsecond\n"


def test_a_folder_that_is_gone_is_said(tmp_path):
    with pytest.raises(AuroraError, match="its folder is not there, or no longer"):
        write_text(tmp_path / "gone" / "a.json", "{}")


@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a folder", "a device"])
def test_only_files_are_read(tmp_path, monkeypatch, kind):
    """Opening a pipe waits for a writer that never comes; a device may have no end."""
    monkeypatch.chdir(tmp_path)
    path = "odd"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        socket.socket(socket.AF_UNIX).bind(path)
    elif kind == "a folder":
        os.mkdir(path)
    else:
        path = "/dev/zero"
    with pytest.raises(OSError, match=f"it is {kind}, not a file"):
        regular(path)
    with pytest.raises(AuroraError, match=f"run.x: {path} is not readable json .it is {kind}"):
        read_json(path, "run.x")


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_json_nested_too_deep_is_not_readable(tmp_path, opening):
    path = tmp_path / "a.json"
    path.write_text(opening * 1_000_000)
    with pytest.raises(AuroraError, match="a.json is not readable json"):
        read_json(path)
