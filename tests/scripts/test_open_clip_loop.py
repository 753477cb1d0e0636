"""The plain loop over OpenCLIP: adapted, trained, saved, loaded and merged, with OpenCLIP's own loading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

open_clip = pytest.importorskip("open_clip")
import open_clip_loop  # noqa: E402


@pytest.mark.parametrize("targets", ["open_clip", "open_clip/all_linear"])
def test_what_is_tuned_saved_loaded_and_merged_finds_the_same(tmp_path: Path, capsys, targets: str) -> None:
    small = ["--pictures", "8", "--epochs", "2", "--tiny-epochs", "1", "--batch-size", "4", "--rank", "4"]
    open_clip_loop.main([str(tmp_path), "--targets", targets, *small])
    lines = capsys.readouterr().out.splitlines()
    recalls = dict(line.split(": ", 1) for line in lines if line.startswith(("before", "after", "loaded", "merged")))
    assert len(recalls) == 4 and recalls["after"] == recalls["loaded"] == recalls["merged"]
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()

    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("demo/tiny.pt", "merged.pt"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layer = r"attn.in_proj_weight" if targets == "open_clip" else ("weight", "in_proj_weight")
    assert set(before) == set(after) and changed and all(name.endswith(layer) for name in changed)
    assert {name.partition(".")[0] for name in changed} == {"visual", "transformer"}


def test_own_pairs_are_read_as_lavis_reads_them(tmp_path: Path) -> None:
    made = open_clip_loop.generate_pictures(tmp_path, "shifted", {"train": 2, "test": 2})
    for path in made.values():
        pairs = open_clip_loop.Pairs(path, tmp_path / "images", lambda image: image.size, lambda text: [text])
        rows = json.loads(path.read_text())
        captions = [row["caption"] if path is made["train"] else row["caption"][0] for row in rows]
        assert [pairs[i] for i in range(len(pairs))] == [((64, 64), caption) for caption in captions]


def test_recall_counts_both_directions() -> None:
    """Of three pictures the last finds its text second, and of three texts the second its picture."""

    class Scores(torch.nn.Module):
        def forward(self, images, texts):
            return images, texts, None

    wanted = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.9], [0.0, 1.5, 1.0]])
    found = open_clip_loop.recall(Scores(), list(zip(wanted, torch.eye(3))))
    assert found == "image-to-text R@1 66.7 R@5 100.0, text-to-image R@1 66.7 R@5 100.0"


def test_a_model_that_tells_nothing_apart_finds_nothing() -> None:
    class Same(torch.nn.Module):
        def forward(self, images, tokens):
            return images * 0, tokens * 0

    found = open_clip_loop.recall(Same(), [(torch.ones(3), torch.ones(3))] * 6)
    assert found == "image-to-text R@1 0.0 R@5 0.0, text-to-image R@1 0.0 R@5 0.0"


def test_fewer_pairs_than_a_batch_are_one(capsys) -> None:
    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(3))

        def forward(self, images, tokens):
            return images @ self.weight, tokens, torch.tensor(1.0)

    model = Linear()
    open_clip_loop.train(model, list(zip(torch.eye(3), torch.eye(3))), epochs=1, batch=64, lr=0.1)
    assert "epoch 0: loss" in capsys.readouterr().out and not torch.equal(model.weight, torch.eye(3))


@pytest.mark.parametrize("given", [["--train", "a.json"], ["--model", "ViT-B-32"]])
def test_half_of_what_belongs_together_is_refused(tmp_path: Path, capsys, given: list[str]) -> None:
    with pytest.raises(SystemExit):
        open_clip_loop.main([str(tmp_path), *given])
    assert "together" in capsys.readouterr().err
