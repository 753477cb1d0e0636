"""What the retrieval task leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import project_yaml

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
