"""Samples of videos: the same for any number of workers; others in place of broken ones, all of them counted."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from distributed import run_processes
from lavis.datasets.datasets.base_dataset import BaseDataset, ConcatDataset
from lavis.datasets.datasets.vqa_datasets import VQADataset
from tiny_video import BREAKS, break_clip, video_overrides, write_videos
from torch.utils.data import DataLoader

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.data.annotations import build_checked
from lavis_aurora.data.samples import BROKEN, TRIES, CheckedDataset, ResamplingDataset, report_undecodable
from lavis_aurora.project import load_config
from lavis_aurora.training.order import SeededDataset, seeded

ROOT = Path(__file__).resolve().parents[2]
COUNT = 6


def videos(paths: dict[str, Path], *options: str) -> dict:
    """The datasets of msrvtt_ret.yaml over these files, 4 frames each in training."""
    small = ["model.image_size=48", "datasets.msrvtt_retrieval.vis_processor.train.n_frms=4", *options]
    cfg = load_config(
        str(ROOT / "projects/aurora/msrvtt_ret.yaml"), [*small, *video_overrides("msrvtt_retrieval", paths)]
    )
    return build_checked("msrvtt_retrieval", cfg.datasets_cfg.msrvtt_retrieval)


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    return write_videos(tmp_path, COUNT, frames=20)


def epoch_of(dataset, workers: int, batch: int = 2, seed: int = 0, epoch: int = 0) -> dict[str, torch.Tensor]:
    """Clips of an epoch in order, by their text."""
    drawn = SeededDataset(dataset, seed)
    drawn.epoch = epoch
    loader = DataLoader(drawn, batch_size=batch, num_workers=workers, collate_fn=dataset.collater)
    return {text: clip for part in loader for text, clip in zip(part["text_input"], part["video"])}


# Batches, as LAVIS 1.0.2 and its main branch make them


class Numbers(BaseDataset):
    """Without files."""

    vis_processor = None  # none of its samples has a picture to read

    def __init__(self) -> None:
        self.annotation, self.vis_root = [{"image": "0.jpg"}, {"image": "1.jpg"}], ""

    def __getitem__(self, index: int) -> dict:
        return {"image": torch.ones(3, 2, 2), "image_id": index, "score": index / 2, "instance_id": str(index)}


def test_numbers_of_samples_are_tensors():
    dataset = CheckedDataset(Numbers(), "numbers")
    batch = dataset.collater([dataset[0], dataset[1]])
    assert torch.equal(batch["image_id"], torch.tensor([0, 1])) and batch["image"].shape == (2, 3, 2, 2)
    assert torch.equal(batch["score"], torch.tensor([0, 0.5], dtype=torch.float64))
    assert batch["instance_id"] == ["0", "1"]


class Lists(VQADataset):
    """Main's."""

    def __init__(self) -> None:
        pass

    def collater(self, samples: list[dict]) -> dict:
        return {"weight": [weight for sample in samples for weight in sample["weights"]]}


def test_weights_of_answers_are_a_tensor_of_floats():
    batch = CheckedDataset(Lists(), "lists").collater([{"weights": [1]}, {"weights": [0.5, 0.2]}])
    assert batch["weight"].dtype == torch.float32 and torch.equal(batch["weight"], torch.tensor([1, 0.5, 0.2]))


@pytest.mark.parametrize(("kind", "cls"), [("image", CheckedDataset), ("video", ResamplingDataset)])
def test_a_sample_that_lavis_could_not_read_is_named(kind, cls):
    class Nothing(Numbers):
        def __getitem__(self, index: int) -> None:
            return None

    inner = Nothing()
    inner.annotation = [{kind: "0.jpg"}, {kind: "1.jpg"}]
    with pytest.raises(AuroraError, match=r"[01].jpg.*LAVIS could not read it"):
        cls(inner, "nothing")[0]


# Draws


def test_draws_depend_on_seed_epoch_and_sample_alone(paths):
    dataset = videos(paths)["train"]
    first = epoch_of(dataset, workers=0)
    torch.manual_seed(123)
    for workers, batch in ((0, 3), (2, 2), (1, 1)):
        again = epoch_of(dataset, workers, batch)
        assert again.keys() == first.keys() and all(torch.equal(again[text], first[text]) for text in first)
    for other in ({"epoch": 1}, {"seed": 1}):
        changed = epoch_of(dataset, 0, **other)
        assert not any(torch.equal(changed[text], first[text]) for text in first)


def test_samples_of_an_epoch_draw_differently(paths):
    """All of one file: what differs is the draw."""
    entries = json.loads(paths["train"].read_text())
    paths["train"].write_text(json.dumps([{**entries[0], "caption": entry["caption"]} for entry in entries]))
    clips = list(epoch_of(videos(paths)["train"], workers=0).values())
    assert len(clips) == COUNT
    assert not any(torch.equal(a, b) for i, a in enumerate(clips) for b in clips[:i])


# Broken videos


@pytest.mark.parametrize("how", BREAKS)
def test_another_sample_stands_in_for_a_broken_video(paths, how):
    path = paths["videos"] / "train_2.mp4"
    break_clip(path, how)
    datasets = videos(paths)
    with seeded(0):
        sample = datasets["train"][2]
    [named] = sample[BROKEN]
    assert named.startswith(f"{path} (") and "\n" not in named
    assert sample["text_input"] != json.loads(paths["train"].read_text())[2]["caption"]
    with seeded(0):
        assert torch.equal(sample["video"], datasets["train"][2]["video"])
    assert sample["video"].std() > 0.1
    assert datasets["train"][3][BROKEN] == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_names_the_broken_videos_of_all_its_samples(paths, workers):
    for i in (1, 4):
        (paths["videos"] / f"train_{i}.mp4").unlink()
    dataset = ConcatDataset([videos(paths)["train"]])
    loader = DataLoader(dataset, batch_size=3, num_workers=workers, collate_fn=dataset.collater)
    batches = list(loader)
    for batch in batches:
        assert batch["video"].shape == (3, 3, 4, 48, 48) and len(batch["text_input"]) == 3
    named = [text.partition(" (")[0] for batch in batches for text in batch[BROKEN]]
    assert {str(paths["videos"] / f"train_{i}.mp4") for i in (1, 4)} == set(named)


def test_evaluation_stops_at_a_broken_video(paths):
    path = paths["videos"] / "test_2.mp4"
    break_clip(path, "truncated")
    with pytest.raises(AuroraError, match=f"^msrvtt_retrieval test: cannot read {path} \\(BrokenVideo: "):
        videos(paths)["test"][2]


def test_without_any_video_training_stops_at_once(paths):
    for file in paths["videos"].iterdir():
        file.unlink()
    with pytest.raises(AuroraError, match=f"{TRIES} videos in a row cannot be read, the last .*no such file"):
        videos(paths)["train"][0]


def test_other_errors_are_not_skipped(paths):
    dataset = videos(paths)["train"]
    dataset.inner.vis_processor = lambda path: 1 / 0
    with pytest.raises(AuroraError, match="ZeroDivisionError"):
        dataset[0]


# The report


def test_without_broken_videos_nothing_is_said(tmp_path, caplog):
    report_undecodable([], 10, 0.0, tmp_path / "broken.txt")
    assert not caplog.records and not (tmp_path / "broken.txt").exists()


def test_report_counts_and_names(tmp_path, caplog):
    broken = [f"/v/{i:02d}.mp4 (no such file)" for i in range(12)]
    with caplog.at_level(logging.WARNING):
        report_undecodable([*broken, broken[0]], 2000, 0.01, tmp_path / "broken.txt")
    [record] = caplog.records
    assert "not be read 13 times in 2000 samples, 12 different ones: /v/00.mp4 (no such file); " in record.message
    assert "and 2 more" in record.message and "11.mp4" not in record.message
    assert (tmp_path / "broken.txt").read_text().splitlines() == broken


def test_too_many_are_an_error(tmp_path):
    report_undecodable(["a"] * 10, 1000, 0.01, tmp_path / "broken.txt")
    with pytest.raises(
        AuroraError, match=r"^videos could not be read 11 times in 1000 .* run.max_broken_share, 0.01; mend them"
    ):
        report_undecodable(["a"] * 11, 1000, 0.01, tmp_path / "broken.txt")


def _report(rank: int, path: Path) -> str:
    try:
        report_undecodable([f"{rank}.mp4 (text)"] * (1 + rank), 10, 0.1, path)
    except AuroraError as error:
        return str(error)
    return ""


def test_processes_count_together(tmp_path):
    messages = run_processes(2, _report, tmp_path / "broken.txt")
    assert messages[0] == messages[1]
    expected = "videos could not be read 3 times in 20 samples, 2 different ones: 0.mp4 (text); 1.mp4 (text); "
    assert messages[0].startswith(expected)
    assert (tmp_path / "broken.txt").read_text().splitlines() == ["0.mp4 (text)", "1.mp4 (text)"]
