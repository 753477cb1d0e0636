"""Several training sets in one run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from lavis.common.registry import registry
from runs import assert_same, final, only_run
from tiny import project_yaml

from lavis_aurora.models import blip_retrieval_aurora
from lavis_aurora.models.blip_retrieval_aurora import BlipRetrievalAurora
from lavis_aurora.project import load_config
from lavis_aurora.training.checkpoints import read_checkpoint
from lavis_aurora.training.runner import AuroraRunner
from lavis_aurora.training.tasks.base import runnable_task
from lavis_aurora_cli import train

# LAVIS's two and one of ours; all count their pictures from 0.
SETS = ("coco_retrieval", "flickr30k", "own_retrieval")


def project_of(folder: Path, *names: str, **sections) -> Path:
    """A project on the same pictures under several names; the first has the splits to evaluate."""
    folder.mkdir(exist_ok=True)
    data = folder / "data"
    datasets = {}
    for i, name in enumerate(names):
        own = name.startswith("own")
        files = {split: str(data / f"{split}.json") for split in ("train", "val", "test")}
        annotations = {
            split: None if i and split != "train" else {"storage": file} | ({} if own else {"url": file})
            for split, file in files.items()
        }
        datasets[name] = {"build_info": {"annotations": annotations, "images": {"storage": str(data / "images")}}}
    return project_yaml(folder, datasets=datasets, **sections)


def ids(yaml: Path, task: str = "retrieval_aurora") -> dict[str, list[int]]:
    """The id of each training sample, by set."""
    cfg = load_config(str(yaml))
    datasets = runnable_task(registry.get_task_class(task)).setup_task(cfg).build_datasets(cfg)
    return {name: [sample["image_id"] for sample in splits["train"]] for name, splits in datasets.items()}


@pytest.mark.parametrize("task", ["retrieval_aurora", "retrieval", "image_text_pretrain"])
def test_ids_of_different_sets_are_different(tmp_path, task):
    alone = ids(project_of(tmp_path / "one", "coco_retrieval", captions_each=2), task)
    assert alone == {"coco_retrieval": [i // 2 for i in range(16)]}, "of one set they are LAVIS's"
    found = ids(project_of(tmp_path / "three", *SETS, captions_each=2), task)
    assert list(found) == list(SETS)
    for each in found.values():
        assert [i - each[0] for i in each] == alone["coco_retrieval"]
    assert len(set().union(*found.values())) == 3 * 8
    assert not set(found["coco_retrieval"]) & set(alone["coco_retrieval"]), "nor those of a run with that set alone"


def test_ids_do_not_depend_on_the_order_of_the_sets_or_on_the_others(tmp_path):
    three = ids(project_of(tmp_path, *SETS))
    for others in ((SETS[0], SETS[2]), (SETS[0], SETS[2], SETS[1])):
        for name, each in ids(project_of(tmp_path, *others)).items():
            assert each == three[name]


RUN = {"max_epoch": 2, "resume": "auto", "save_queue": True, "checkpoint_every": 1, "test_splits": []}


def test_unrelated_pictures_are_never_the_same_one(tmp_path, monkeypatch):
    """In the batch, the queue, the teacher's targets and the matching of a run on two sets."""
    forward, draw, rows = BlipRetrievalAurora.forward, blip_retrieval_aurora.sample_hard_negatives, []

    def seen(self, samples):
        output = forward(self, samples)
        # Without the teacher's part a target is 1 / pictures that are the same.
        assert torch.equal(output.sims.sim_i2t_targets.max(dim=1).values, torch.ones(4))
        return output

    def drawn(logits, same, generator):
        rows.extend(same.sum(dim=1).tolist())
        return draw(logits, same, generator)

    monkeypatch.setattr(BlipRetrievalAurora, "forward", seen)
    monkeypatch.setattr(blip_retrieval_aurora, "sample_hard_negatives", drawn)
    model = {"alpha": 0.0, "queue_size": 16}
    train(["--cfg-path", str(project_of(tmp_path, *SETS[:2], model=model, run={**RUN, "max_epoch": 1}))])
    assert rows == [1] * 2 * 16
    queue = read_checkpoint(only_run(tmp_path) / "checkpoint_latest.pth")["queue"]["idx_queue"]
    assert len(set(queue[0].tolist())) == 16


@pytest.mark.slow
def test_a_saved_queue_stays_right_when_the_run_goes_on(tmp_path, monkeypatch):
    original = AuroraRunner._after_step

    def killed(self, epoch, done):
        original(self, epoch, done)
        if (epoch, done) == (1, 2):
            raise KeyboardInterrupt

    for name in ("whole", "killed"):
        yaml = project_of(tmp_path / name, *SETS[:2], run={**RUN, "accum_grad_iters": 2})
        if name == "killed":
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(AuroraRunner, "_after_step", killed)
                train(["--cfg-path", str(yaml)])
        train(["--cfg-path", str(yaml)])
    assert_same(final(tmp_path / "whole"), final(tmp_path / "killed"))


def test_a_batch_that_is_no_number_names_the_sets_of_its_samples(tmp_path):
    run = {"init_lr": 1e12, "min_lr": 1e12, "batch_size_train": 8}
    with pytest.raises(SystemExit):
        train(["--cfg-path", str(project_of(tmp_path, *SETS[:2], run=run))])
    [file] = only_run(tmp_path).glob("not_finite*.json")
    assert set(json.loads(file.read_text())["dataset"]) == {"coco_retrieval train", "flickr30k train"}


def test_ratios_that_would_have_no_effect_are_refused(tmp_path, capsys):
    yaml = project_of(tmp_path, *SETS[:2], run={"train_dataset_ratios": [1, 3]})
    with pytest.raises(SystemExit):
        train(["--cfg-path", str(yaml)])
    assert re.search(r"run.train_dataset_ratios: has no effect .*; leave it out", capsys.readouterr().err)
