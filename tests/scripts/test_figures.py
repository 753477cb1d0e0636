"""The command that draws figures."""

from __future__ import annotations

import json

import pytest
from figures import LISTED, PLOTS, main
from tiny_figures import with_candidates

from lavis_aurora.analysis.drawing import Plot
from lavis_aurora.analysis.examples import CASES


def test_the_command_writes_a_picture_and_its_numbers(retrieval_runs, tmp_path, capsys):
    with_candidates(retrieval_runs["aurora"])
    out = tmp_path / "new" / "cases.png"
    main(["cases", str(retrieval_runs["aurora"]), "--count", "2", "--out", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG")
    numbers = json.loads(out.with_suffix(".json").read_text())
    # The json alone draws the picture again.
    assert len(CASES.draw(numbers).axes) == 2 * 5  # the text and k_test pictures
    assert str(out) in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["cases", str(tmp_path)])
    assert "error: " in end.value.code and "config.yaml" in end.value.code


@pytest.mark.parametrize("out", ["picture", "numbers.json", "picture.xyz"])
def test_a_name_that_is_no_pictures_is_refused_before_any_work(out, capsys):
    with pytest.raises(SystemExit):
        main(["bubbles", "--out", out])
    assert f"--out {out}: the name of a picture ends in .png or .pdf or .svg" in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="^error: cannot write .*bubbles.png "):
        main(["bubbles", "--benchmarks", "flickr30k", "--out", str(tmp_path / "file" / "bubbles.png")])


def test_every_name_of_the_command_has_a_figure(capsys):
    assert len(PLOTS) == len(LISTED) == 14 and all(isinstance(plot, Plot) for plot in LISTED)
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = capsys.readouterr().out
    assert all(f"  {plot.name} " in listed and plot.about in listed for plot in LISTED)
