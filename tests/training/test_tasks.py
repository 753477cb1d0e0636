"""Training and evaluation of retrieval through the command line: what is said of videos, also of broken ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import logged, only_run
from tiny import tiny_config
from tiny_video import break_clip, video_overrides, write_videos

from lavis_aurora.training.tasks.retrieval import report
from lavis_aurora_cli import evaluate, train

ROOT = Path(__file__).resolve().parents[2]
COUNT = 6


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """--options that make msrvtt_ret.yaml a run of seconds; the clips lie in ``tmp_path/data/videos``."""
    paths = write_videos(tmp_path / "data", COUNT, frames=10)
    return [
        *video_overrides("msrvtt_retrieval", paths),
        *(f"datasets.msrvtt_retrieval.vis_processor.{split}.n_frms=2" for split in ("train", "eval")),
        "model.model_type=tiny",
        f"model.image_size={tiny_config().image_size}",
        "model.pretrained=null",
        "model.queue_size=16",
        "run.batch_size_train=3",
        "run.max_epoch=1",
        "run.num_workers=1",
        "run.device=cpu",
        f"run.output_dir={tmp_path / 'output'}",
    ]


def run(options: list[str], *more: str, command=train) -> None:
    command(["--cfg-path", str(ROOT / "projects/aurora/msrvtt_ret.yaml"), "--options", *options, *more])


def test_broken_videos_are_skipped_counted_and_named(tmp_path, options, caplog):
    broken = tmp_path / "data/videos/train_4.mp4"
    break_clip(broken, "truncated")
    run(options, "run.max_broken_share=0.9", "run.max_epoch=2", "run.valid_splits=[]", "run.test_splits=[]")
    folder = only_run(tmp_path)
    assert [entry["train_epoch"] for entry in logged(folder, "train_loss")] == [0, 1]
    said = [record.getMessage() for record in caplog.records if "could not be read" in record.getMessage()]
    assert len(said) == 2 and all(f"in {COUNT} samples, 1 different ones: {broken} (" in line for line in said)
    for epoch in (0, 1):
        [line] = (folder / f"broken_videos_epoch_{epoch}.txt").read_text().splitlines()
        assert line.startswith(f"{broken} (")


def test_too_many_broken_videos_stop_the_run(tmp_path, options, capsys):
    broken = tmp_path / "data/videos/train_1.mp4"
    break_clip(broken, "text")
    with pytest.raises(SystemExit):
        run(options)
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "run.max_broken_share, 0.01" in line and f"{broken} (" in line
    assert not list(only_run(tmp_path).glob("*.pth"))


def test_too_many_missing_videos_start_no_run(tmp_path, options, capsys):
    broken = tmp_path / "data/videos/train_1.mp4"
    broken.unlink()
    with pytest.raises(SystemExit):
        run(options)
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "run.max_broken_share, 0.01" in line and f"{broken} (No such file or directory)" in line
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("split", [pytest.param("val", marks=pytest.mark.slow), "test"])
def test_a_broken_video_stops_the_evaluation(tmp_path, options, capsys, split):
    break_clip(tmp_path / f"data/videos/{split}_3.mp4", "text")
    with pytest.raises(SystemExit):
        run(options, f"run.test_splits=[{split}]", command=evaluate)
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"msrvtt_retrieval {split}: cannot read {tmp_path}/data/videos/{split}_3.mp4 (BrokenVideo: " in line


@pytest.mark.parametrize("given", ["train", "eval"])
def test_videos_without_their_processors_are_refused(tmp_path, options, capsys, given):
    """The model's are for pictures."""
    dataset = f"{{vis_processor: {{{given}: {{name: aurora_video_{given}, image_size: 48}}}}}}"
    (tmp_path / "project.yaml").write_text(
        f"model: {{arch: blip_retrieval_aurora, model_type: tiny}}\ndatasets: {{msrvtt_retrieval: {dataset}}}\n"
        f"run: {{k_test: 2}}\n"
    )
    with pytest.raises(SystemExit):
        train(["--cfg-path", str(tmp_path / "project.yaml")])
    other = {"train": "eval", "eval": "train"}[given]
    expected = f"datasets.msrvtt_retrieval.vis_processor.{other}: blip_image_eval cannot read videos; they need"
    assert expected in capsys.readouterr().err


def test_a_paragraph_of_didemo_is_one_text(tmp_path, options, capsys):
    """Several texts of a video would be retrieved one by one, another task than the paper's."""
    path = tmp_path / "data/retrieval_test.json"
    entries = json.loads(path.read_text())
    entries[2]["caption"] = ["a dog runs", "it jumps"]
    path.write_text(json.dumps(entries))
    renamed = [option.replace("msrvtt_retrieval", "didemo_retrieval") for option in options]
    with pytest.raises(SystemExit):
        evaluate(["--cfg-path", str(ROOT / "projects/aurora/didemo_ret.yaml"), "--options", *renamed])
    assert f"entry 2 of {path} has 2 captions" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("k", [0, 3])
def test_report_names_the_kind(kind, k):
    i2t, t2i = f"{kind}_to_text", f"text_to_{kind}"
    figures = {"r1": 10.0, "r5": 20.0, "r10": 30.0, "median_rank": 4.0}
    metrics = {f"{d}{n}_{m}": v for d in (i2t, t2i) for n in ("", "_itc", "_chance") for m, v in figures.items()}
    result = {"kind": kind, f"{kind}s": 7, "texts": 9, "k_test": {i2t: k, t2i: k}, "itc_weight": 1.0}
    text = report("val", {**result, "shared_texts": 0, "metrics": metrics})
    assert text.startswith(f"val: 7 {kind}s, 9 texts; score = ")
    assert ("not reranked" in text) == (k == 0)
    for direction in (f"{kind}-to-text", f"text-to-{kind}"):
        assert f"  {direction} " in text and f"  {direction}, chance" in text
    assert {"image": "video", "video": "image"}[kind] not in text
