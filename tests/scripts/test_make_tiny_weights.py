"""Weights that come with the package: whole, in half precision, from a pretraining run of either demo."""

from __future__ import annotations

from pathlib import Path

import make_tiny_weights
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from tiny import tiny_config
from tiny_vqa import vqa_config

from lavis_aurora import AuroraError
from lavis_aurora.common.paths import package_file
from lavis_aurora.models.blip_retrieval_aurora import BlipRetrievalAurora
from lavis_aurora.models.blip_vqa_aurora import BlipVqaAurora
from lavis_aurora.training.checkpoints import write_checkpoint

KINDS = {"retrieval": (BlipRetrievalAurora, tiny_config), "vqa": (BlipVqaAurora, vqa_config)}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def _checkpoint(folder: Path, kind: str, **overrides) -> tuple[Path, torch.nn.Module]:
    """What a run with full tuning leaves, and its model."""
    cls, defaults = KINDS[kind]
    cfg = defaults(**{"tuning": "full", **overrides})
    model = cls.from_config(cfg)
    path = folder / "checkpoint_best.pth"
    rest = {
        "optimizer": {"state": {}, "param_groups": [{"params": [0], "lr": 0.1}]},
        **{"scaler": None, "epoch": 0, "step": 1, "best_metric": 0.0, "best_epoch": None},
    }
    config = {"model": OmegaConf.to_container(cfg, resolve=True)}
    write_checkpoint({**rest, "model": model.run_state(), "config": config}, path)
    return path, model


def test_stored_weights_load_as_the_type_tiny_and_are_the_runs(tmp_path: Path, kind: str) -> None:
    path, model = _checkpoint(tmp_path, kind)
    _, loaded = make_tiny_weights.pretrained_model(path)
    kept = make_tiny_weights.stored_weights(loaded)
    save_file(kept, tmp_path / "x.safetensors")
    cls, config = KINDS[kind]
    fresh = cls.from_config(config(pretrained=str(tmp_path / "x.safetensors"))).state_dict()
    for name, value in make_tiny_weights.stored_weights(model).items():
        assert value.dtype == torch.float16
        assert torch.equal(fresh[name].half(), value), name


def test_a_frozen_vision_encoder_comes_from_where_the_run_had_it(tmp_path: Path, kind: str) -> None:
    cls, config = KINDS[kind]
    start = tmp_path / "start.pth"
    torch.save(cls.from_config(config(tuning="full")).state_dict(), start)
    path, model = _checkpoint(tmp_path, kind, pretrained=str(start), freeze_vit=True)
    _, loaded = make_tiny_weights.pretrained_model(path)
    stored = make_tiny_weights.stored_weights(loaded)
    assert any(name.startswith("visual_encoder") for name in stored)
    assert all(torch.equal(stored[name], value) for name, value in make_tiny_weights.stored_weights(model).items())


def test_shipped_file_holds_what_this_program_writes(kind: str, tmp_path: Path) -> None:
    path, _ = _checkpoint(tmp_path, kind)
    arch, model = make_tiny_weights.pretrained_model(path)
    name, _ = make_tiny_weights.TARGETS[arch]
    shipped = load_file(package_file(f"configs/models/tiny/{name}"))
    kept = make_tiny_weights.stored_weights(model)
    assert {key: value.shape for key, value in shipped.items()} == {key: value.shape for key, value in kept.items()}
    assert {value.dtype for value in shipped.values()} == {torch.float16}


def test_other_runs_are_refused(tmp_path: Path, kind: str, monkeypatch) -> None:
    path, _ = _checkpoint(tmp_path, kind, tuning="aurora")
    with pytest.raises(AuroraError, match="with tuning aurora, not a pretraining run"):
        make_tiny_weights.pretrained_model(path)
    monkeypatch.setattr("sys.argv", ["make_tiny_weights.py", str(path), "--output", str(tmp_path / "y.safetensors")])
    with pytest.raises(SystemExit, match="error: .*not a pretraining run"):
        make_tiny_weights.main()
    assert not (tmp_path / "y.safetensors").exists()
