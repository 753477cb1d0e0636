import os
import socket

import pytest
import torch

from lavis_aurora import AuroraError
from lavis_aurora.common import files
from lavis_aurora.common.files import appended, atomic_write, load_torch, new_folder, read_json, regular, write_text


def test_a_whole_file_takes_the_place_of_the_older_one(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with atomic_write(path, previous=tmp_path / "before") as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert (path.read_text(), (tmp_path / "before").read_text()) == ("new", "old")
    assert len(list(tmp_path.iterdir())) == 2


def test_two_writers_of_one_path_do_not_meet(tmp_path):
    path = tmp_path / "a"
    with atomic_write(path) as first:
        first.write(b"fir")
        first.flush()
        with atomic_write(path) as second:
            second.write(b"second")
            first.write(b"st")
        assert path.read_text() == "second"
    assert path.read_text() == "first" and [*tmp_path.iterdir()] == [path]


def test_two_who_fill_one_folder_do_not_meet(tmp_path):
    with pytest.raises(AuroraError, match="cannot write"), new_folder(tmp_path / "a") as first:
        (first / "x").write_text("first")
        with new_folder(tmp_path / "a") as second:
            (second / "y").write_text("second")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "y"]


def test_what_killed_writers_have_left_goes_and_what_is_written_still_stays(tmp_path, monkeypatch):
    (tmp_path / "a.0.partial").write_text("left")
    (tmp_path / "a.1.partial").mkdir()
    write_text(tmp_path / "a", "new")
    assert len([*tmp_path.iterdir()]) == 3, "they are fresh"
    monkeypatch.setattr(files, "STALE", 0.0)
    with atomic_write(tmp_path / "a") as first:
        write_text(tmp_path / "a", "newer")
        assert len([*tmp_path.iterdir()]) == 2, "the first one's is locked"
        first.write(b"newest")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "newest")]


def test_what_a_link_of_an_unfinished_files_name_leads_to_is_left_alone(tmp_path, monkeypatch):
    """In a folder from a stranger there may be one, or a pipe that nobody writes to."""
    (tmp_path / "precious").write_text("old")
    (tmp_path / "a.0.partial").symlink_to(tmp_path / "precious")
    os.mkfifo(tmp_path / "a.1.partial")
    monkeypatch.setattr(files, "STALE", 0.0)
    write_text(tmp_path / "a", "new")
    assert ((tmp_path / "precious").read_text(), (tmp_path / "a").read_text()) == ("old", "new")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "precious"}


ERRORS = [
    OSError(28, "No space left"),
    KeyboardInterrupt(),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    torch.OutOfMemoryError("CUDA out of memory"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_interrupted_write_leaves_the_older_one_alone(tmp_path, error):
    """Only what the system says of the file is one of the file."""
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(AuroraError if isinstance(error, OSError) else type(error)), atomic_write(path) as file:
        file.write(b"ne")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert path.read_text() == "old"


def test_torchs_error_after_the_systems_is_the_systems(tmp_path):
    """Its zip writer, refused a write, ends with a RuntimeError about positions."""
    with pytest.raises(AuroraError, match=r"cannot write .*a \(No space left\); free some space"):
        with atomic_write(tmp_path / "a"):
            try:
                raise OSError(28, "No space left")
            finally:
                raise RuntimeError("unexpected pos 832 vs 726")


@pytest.mark.parametrize("older", [False, True], ids=["zip", "older format"])
def test_what_torch_saved_is_read(tmp_path, older):
    torch.save({"a": torch.ones(3), "b": [1]}, tmp_path / "a", _use_new_zipfile_serialization=not older)
    state = load_torch(tmp_path / "a")
    assert torch.equal(state["a"], torch.ones(3)) and state["b"] == [1]


def test_no_room_for_a_file_is_no_damage(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    torch.save({}, tmp_path / "a")
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(MemoryError, match="you tried to allocate 8 bytes"):
        load_torch(tmp_path / "a")


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


def test_json_with_a_byte_order_mark_is_refused_with_the_remedy(tmp_path):
    """LAVIS opens the same files by itself, and would not take it."""
    (tmp_path / "a.json").write_text("[]", encoding="utf-8-sig")
    with pytest.raises(AuroraError, match="a.json is not readable json .it begins with a byte order mark; save it"):
        read_json(tmp_path / "a.json")


def test_json_of_another_encoding_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "a.json").write_text('["Möbel"]', encoding="latin-1")
    with pytest.raises(AuroraError, match="a.json is not readable json .*; save it as UTF-8"):
        read_json(tmp_path / "a.json")
