"""Weights that come with the package: whole, in half precision, from a pretraining run."""

from __future__ import annotations

from pathlib import Path

import make_tiny_weights
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from tiny import tiny_config

from lavis_aurora import AuroraError
from lavis_aurora.models.blip_retrieval_aurora import BlipRetrievalAurora
from lavis_aurora.training.checkpoints import KEYS, write_checkpoint


def _checkpoint(folder: Path, **overrides) -> tuple[Path, torch.nn.Module]:
    """What a run with full tuning leaves, and its model."""
    cfg = tiny_config(**{"tuning": "full", **overrides})
    model = BlipRetrievalAurora.from_config(cfg)
    path = folder / "checkpoint_best.pth"
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).state_dict()
    rest = {**dict.fromkeys(KEYS), "optimizer": optimizer, "epoch": 0, "step": 0, "best_metric": 0.0}
    config = {"model": OmegaConf.to_container(cfg, resolve=True)}
    write_checkpoint({**rest, "model": model.run_state(), "config": config}, path)
    return path, model


def test_stored_weights_load_as_the_type_tiny_and_are_the_runs(tmp_path: Path) -> None:
    path, model = _checkpoint(tmp_path)
    loaded = make_tiny_weights.pretrained_model(path)
    kept = make_tiny_weights.stored_weights(loaded)
    save_file(kept, tmp_path / "x.safetensors")
    fresh = BlipRetrievalAurora.from_config(tiny_config(pretrained=str(tmp_path / "x.safetensors"))).state_dict()
    for name, value in make_tiny_weights.stored_weights(model).items():
        assert value.dtype == torch.float16
        assert torch.equal(fresh[name].half(), value), name


@pytest.mark.slow
def test_a_frozen_vision_encoder_comes_from_where_the_run_had_it(tmp_path: Path) -> None:
    start = tmp_path / "start.pth"
    torch.save(BlipRetrievalAurora.from_config(tiny_config(tuning="full")).state_dict(), start)
    path, model = _checkpoint(tmp_path, pretrained=str(start), freeze_vit=True)
    loaded = make_tiny_weights.pretrained_model(path)
    stored = make_tiny_weights.stored_weights(loaded)
    assert any(name.startswith("visual_encoder") for name in stored)
    assert all(torch.equal(stored[name], value) for name, value in make_tiny_weights.stored_weights(model).items())


def test_shipped_file_holds_what_this_program_writes(tmp_path: Path) -> None:
    path, _ = _checkpoint(tmp_path)
    shipped = load_file(make_tiny_weights.TARGET)
    kept = make_tiny_weights.stored_weights(make_tiny_weights.pretrained_model(path))
    assert {key: value.shape for key, value in shipped.items()} == {key: value.shape for key, value in kept.items()}
    assert {value.dtype for value in shipped.values()} == {torch.float16}


def test_other_runs_are_refused(tmp_path: Path, monkeypatch) -> None:
    path, _ = _checkpoint(tmp_path, tuning="aurora")
    with pytest.raises(AuroraError, match="with tuning aurora, not a pretraining run"):
        make_tiny_weights.pretrained_model(path)
    monkeypatch.setattr("sys.argv", ["make_tiny_weights.py", str(path), "--output", str(tmp_path / "y.safetensors")])
    with pytest.raises(SystemExit, match="error: .*not a pretraining run"):
        make_tiny_weights.main()
    assert not (tmp_path / "y.safetensors").exists()


@pytest.mark.slow
def test_an_older_file_is_replaced_after_the_new_one_has_been_loaded(tmp_path: Path, monkeypatch, caplog) -> None:
    path, _ = _checkpoint(tmp_path)
    output, beside = tmp_path / "x.safetensors", tmp_path / "untested_x.safetensors"
    output.write_bytes(b"old")
    monkeypatch.setattr("sys.argv", ["make_tiny_weights.py", str(path), "--output", str(output)])
    with monkeypatch.context() as patch:
        patch.setattr(make_tiny_weights, "load_model_and_preprocess", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make_tiny_weights.main()
    assert (
        output.read_bytes() == b"old" and f"{output} is not replaced; the new weights are in {beside}" in caplog.text
    )
    make_tiny_weights.main()
    assert load_file(output).keys() == load_file(make_tiny_weights.TARGET).keys() and not beside.exists()


def test_a_checkpoint_whose_packaged_files_have_moved_is_read(tmp_path: Path) -> None:
    moved = {"tokenizer": "/old/lavis_aurora/configs/models/tiny"}
    path, _ = _checkpoint(tmp_path)
    state = torch.load(path, weights_only=True)
    state["config"]["model"].update(moved)
    write_checkpoint(state, path)
    assert make_tiny_weights.pretrained_model(path)
