"""What the retrieval task leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import project_yaml, write_pictures

from lavis_aurora_cli import evaluate

DIRECTIONS = ("image_to_text", "text_to_image")


def _evaluated(tmp_path: Path, *options: str, captions_each: int = 1) -> dict:
    """The result file of an evaluation, parsed."""
    yaml = project_yaml(tmp_path, captions_each=captions_each)
    before = set((tmp_path / "output").glob("*"))
    evaluate(["--cfg-path", str(yaml), *(["--options", *options] if options else [])])
    [folder] = set((tmp_path / "output").glob("*")) - before
    text = (folder / "result" / "test_epoch_0.json").read_text()
    assert len(text.splitlines()) < 20, "a line for each part, not for each number"
    return json.loads(text)


def test_a_result_holds_ranks_and_the_best_candidates_of_every_query(tmp_path: Path) -> None:
    result = _evaluated(tmp_path, captions_each=2)
    assert (result["images"], result["texts"]) == (8, 16)
    assert 32 <= result["pairs"] <= 8 * 4 + 16 * 4
    assert set(result["seconds"]) == {"encoding", "reranking", "all"}
    for direction, queries, targets in (
        ("image_to_text", 8, [{2 * i, 2 * i + 1} for i in range(8)]),
        ("text_to_image", 16, [{i // 2} for i in range(16)]),
    ):
        ranks, best = result["ranks"][direction], result["candidates"][direction]
        assert len(ranks) == len(best["ids"]) == len(best["scores"]) == queries
        for rank, ids, scores, right in zip(ranks, best["ids"], best["scores"], targets):
            assert len(set(ids)) == 4 and scores == sorted(scores, reverse=True)
            if rank < 4:
                assert ids[rank] in right and not right & set(ids[:rank])
            else:
                assert not right & set(ids)


@pytest.mark.parametrize("option", ["token_budget_gb=0", "token_budget_gb=0.00004"])
def test_a_small_budget_changes_no_rank(tmp_path: Path, option: str) -> None:
    assert _evaluated(tmp_path, f"run.{option}")["ranks"] == _evaluated(tmp_path)["ranks"]


def test_bfloat16_and_itc_alone(tmp_path: Path) -> None:
    half = _evaluated(tmp_path, "run.eval_bf16=true", "run.token_dtype=bfloat16")
    alone = _evaluated(tmp_path, "run.k_test=0")
    assert alone["pairs"] == 0 and half["pairs"] > 0
    for direction in DIRECTIONS:
        assert alone["ranks"][direction] == alone["ranks"][f"{direction}_itc"]
        assert sorted(alone["candidates"][direction]["ids"][0]) == list(range(8))
        assert len(half["ranks"][direction]) == 8


def _share_captions(tmp_path: Path, text: str, images: int) -> None:
    """The first images of the test get the caption ``text`` too."""
    path = write_pictures(tmp_path / "data", 8)["test"]
    entries = json.loads(path.read_text())
    for entry in entries[:images]:
        entry["caption"].append(text)
    path.write_text(json.dumps(entries))


def test_a_text_that_equals_a_right_one_is_right(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Of one caption for all images, any is right; wrong ones that score alike would come first otherwise."""
    path = write_pictures(tmp_path / "data", 8)["test"]
    entries = [{**entry, "caption": ["A red circle."]} for entry in json.loads(path.read_text())]
    path.write_text(json.dumps(entries))
    result = _evaluated(tmp_path)
    assert result["shared_texts"] == 8
    for direction in DIRECTIONS:
        assert result["metrics"][f"{direction}_chance_r1"] == result["metrics"][f"{direction}_r1"] == 100
        assert result["metrics"][f"{direction}_lavis_r1"] <= 25
    out = capsys.readouterr().out
    assert "8 texts are those of other images too" in out and "image-to-text, as LAVIS counts" in out


def test_lavis_own_figures_are_beside_those_of_shared_captions(tmp_path: Path) -> None:
    _share_captions(tmp_path, "a red circle", 5)
    metrics = _evaluated(tmp_path)["metrics"]
    yaml = project_yaml(tmp_path)
    before = set((tmp_path / "output").glob("*"))
    evaluate(["--cfg-path", str(yaml), "--options", "run.task=retrieval"])
    [folder] = set((tmp_path / "output").glob("*")) - before
    theirs = json.loads((folder / "summary.json").read_text())["metrics"]["test"]
    for k in (1, 5, 10):
        assert metrics[f"image_to_text_lavis_r{k}"] == pytest.approx(theirs[f"txt_r{k}"])
        assert metrics[f"text_to_image_lavis_r{k}"] == pytest.approx(theirs[f"img_r{k}"])


def test_without_shared_captions_nothing_is_beside(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    result = _evaluated(tmp_path, captions_each=2)
    assert result["shared_texts"] == 0 and not any("lavis" in key for key in result["metrics"])
    assert "LAVIS" not in capsys.readouterr().out.split("score = ")[1]
