"""The first step of the demo's pretraining."""

from __future__ import annotations

from itertools import islice

import pretrain_tiny_vision
import pytest
import torch

from lavis_aurora.demo.scenes import Scene, Shape, domain_of, iter_scenes
from lavis_aurora.models.loading import load_model_and_preprocess

WORDS = {"shape": ["circle", "star"], "color": ["red", "blue", "green"], "size": ["small", "large"]}


def test_classes_stand_at_the_cells_of_their_shapes() -> None:
    scene = Scene((Shape(4, "large", "blue", "star"), Shape(0, "small", "red", "circle")), "white")
    [classes] = pretrain_tiny_vision.classes_of([scene], WORDS)
    assert classes[4].tolist() == [2, 2, 2] and classes[0].tolist() == [1, 1, 1]
    assert classes.count_nonzero() == 6


def test_perfect_readings_have_no_loss_and_all_shapes() -> None:
    """Tokens that hold the truth one-hot, read by weights that copy it."""
    scenes = list(islice(iter_scenes("clean", "train", 0), 5))
    domain = domain_of("clean")
    words = {"shape": [*domain.shapes], "color": [*domain.colors], "size": [*domain.sizes]}
    classes = pretrain_tiny_vision.classes_of(scenes, words)
    sizes, cells = [len(words[name]) + 1 for name in ("shape", "color", "size")], pretrain_tiny_vision.CELLS
    hot = torch.cat([torch.nn.functional.one_hot(classes[..., i], size) for i, size in enumerate(sizes)], -1).float()
    backgrounds = torch.tensor([[*domain.backgrounds].index(scene.background) for scene in scenes])
    whole = torch.cat([hot.flatten(1), torch.nn.functional.one_hot(backgrounds, 4)], -1)
    width = whole.shape[1] + cells
    tokens = torch.zeros(len(scenes), 1 + cells, width)
    tokens[:, 0, : whole.shape[1]] = whole
    tokens[:, 1:, : sum(sizes)] = hot
    tokens[:, 1:, -cells:] = torch.eye(cells)
    naming = pretrain_tiny_vision.Naming(width, sizes, 4)
    with torch.no_grad():
        for parameter in naming.parameters():
            parameter.zero_()
        first = 0
        for i, size in enumerate(sizes):
            for k in range(size):
                naming.of_patch[i].weight[k, first + k] = 100
                for cell in range(cells):
                    naming.of_all[i].weight[cell * size + k, cell * sum(sizes) + first + k] = 100
            first += size
        naming.place.weight[:, -cells:] = 100 * torch.eye(cells)
        naming.background.weight[:, whole.shape[1] - 4 : whole.shape[1]] = 100 * torch.eye(4)
    loss, right = naming(tokens, classes, backgrounds)
    assert loss.item() == pytest.approx(0, abs=1e-6) and right.tolist() == [1, 1]


def test_it_writes_a_start_for_pretraining(tmp_path, monkeypatch, capsys) -> None:
    path = tmp_path / "new" / "vision.pth"
    arguments = ["--steps", "6", "--pictures", "70", "--output", str(path)]
    monkeypatch.setattr("sys.argv", ["pretrain_tiny_vision.py", *arguments])
    pretrain_tiny_vision.main()
    assert f"by [CLS]; {path}" in capsys.readouterr().out
    model, _, _ = load_model_and_preprocess("blip_retrieval_aurora", "tiny", pretrained=path)
    written = torch.load(path, weights_only=True)
    assert torch.equal(model.state_dict()["visual_encoder.cls_token"], written["visual_encoder.cls_token"])
