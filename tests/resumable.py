"""Projects of runs that are stopped and resumed, and damage to what they left, for tests."""

from __future__ import annotations

import os
import signal
import zipfile
from pathlib import Path

import pytest
from tiny import project_yaml

from lavis_aurora.training import loop

RUN = {"max_epoch": 2, "batch_size_train": 2, "resume": "auto", "save_queue": True, "checkpoint_every": 1}
# Random crops, random context, dropout of paths, negatives from the queue: whatever draws random numbers.
MODEL = {"context": {"form": "random"}, "vit_drop_path_rate": 0.1, "queue_size": 16}
ONE_LAYER = Path(__file__).with_name("one_layer_bert.json")
CROPS = {"coco_retrieval": {"vis_processor": {"train": {"name": "blip_image_train", "image_size": 48}}}}


def image_project(folder: Path, **run) -> Path:
    folder.mkdir(exist_ok=True)
    shallow = {**MODEL, "vit": {"depth": 1}, "med_config_path": str(ONE_LAYER)}
    return project_yaml(folder, model=shallow, datasets=CROPS, run={**RUN, **run})


def damage_in_data(path: Path) -> None:
    """A bit of a tensor: torch reads it without a word."""
    with zipfile.ZipFile(path) as archive:
        largest = archive.read(max(archive.infolist(), key=lambda part: part.file_size))
    content = path.read_bytes()
    place = content.index(largest) + len(largest) // 2
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])


def stop_in(monkeypatch, step: int) -> None:
    """Send this process SIGTERM within the given step, counted over the whole run."""
    original, steps = loop._update, iter(range(10**6))

    def update(*args):
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(loop, "_update", update)


def few_by_default(names, kept):
    """``names``, of which those that are not ``kept`` are slow."""
    return [name if name in kept else pytest.param(name, marks=pytest.mark.slow) for name in names]
