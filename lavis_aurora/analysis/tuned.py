"""The model and the data of a run, built again as the run had them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from lavis.common.registry import registry
from PIL import Image
from torch import nn

from lavis_aurora.analysis.results import tuned_model
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.files import regular
from lavis_aurora.data.annotations import build_checked
from lavis_aurora.data.frames import read_frames, uniform_indices
from lavis_aurora.data.samples import CheckedDataset
from lavis_aurora.project import AuroraConfig, load_config
from lavis_aurora.training.checkpoints import BEST, read_checkpoint, read_latest

VIDEOS = (".mp4", ".avi", ".mkv", ".webm", ".mov")


def load_run_config(run: str | Path) -> AuroraConfig:
    """The checked configuration of a run's folder."""
    return load_config(str(Path(run) / "config.yaml"))


def untrained_model(run: str | Path) -> nn.Module:
    """The model of a run as it was before training, on the CPU, in eval mode.

    Raises:
        AuroraError: it started from random weights, which no file holds.
    """
    cfg = load_run_config(run)
    inner = tuned_model(cfg.config).config
    if inner.get("pretrained") is None and not inner.get("load_finetuned"):
        raise AuroraError(f"{run}: its backbone had random weights, which are lost; name a run of a pretrained one")
    return registry.get_model_class(cfg.model_cfg.arch).from_config(cfg.model_cfg).eval()


def load_trained(model: nn.Module, run: str | Path) -> None:
    """Load what a run trained, of its best epoch if it chose one, into its model.

    Raises:
        AuroraError: the folder holds no checkpoint.
    """
    best = Path(run) / BEST
    if best.is_file():
        found = read_checkpoint(best), best
    else:
        found = read_latest(Path(run))
    if found is None:
        raise AuroraError(f"{run}: holds no checkpoint; name the folder of a run that trained")
    model.load_run_state(found[0]["model"], str(found[1]))


def split_data(run: str | Path, split: str) -> CheckedDataset:
    """The dataset of a run's split; the first one that has it.

    Raises:
        AuroraError: no dataset of the run has such a split.
    """
    known: list[str] = []
    for name, config in load_run_config(run).datasets_cfg.items():
        splits = build_checked(name, config)
        if split in splits:
            return splits[split]
        known += list(splits)
    raise AuroraError(f"{run}: no split {split!r}; its data have {', '.join(known)}")


def read_visual(path: str | Path) -> np.ndarray:
    """A picture, or the middle frame of a video: (height, width, 3), uint8.

    Raises:
        AuroraError: it cannot be read.
    """
    try:
        if Path(path).suffix.lower() in VIDEOS:
            [frame] = read_frames(str(path), partial(uniform_indices, count=1))
            return frame.permute(1, 2, 0).numpy()
        with Image.open(regular(path)) as picture:
            return np.asarray(picture.convert("RGB"))
    except Exception as error:  # PIL has errors of its own
        raise AuroraError(f"{path}: cannot be shown ({error})") from error
