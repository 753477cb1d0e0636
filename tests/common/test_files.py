import pytest

from lavis_aurora import AuroraError
from lavis_aurora.common.files import written_whole


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
