"""Tokens kept on disk: runs with them are what they are without, and no others than their own are ever used."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from distributed import ROOT, child_environment
from PIL import Image
from runs import assert_same, final, only_run
from safetensors import safe_open
from tiny import project_yaml
from tiny_video import video_project, write_videos
from tiny_vqa import vqa_project
from torch import Tensor

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.data.features import FeatureCache
from lavis_aurora.encoders import towers
from lavis_aurora.training import features, runner
from lavis_aurora.training.checkpoints import LATEST, read_checkpoint
from lavis_aurora_cli import evaluate, train

LAYERS = {"mode_approx": {"layers": {"last": 1}}}
UNTESTED: dict[str, Any] = {"valid_splits": [], "test_splits": []}


def kept(tmp_path: Path, **run: Any) -> dict[str, Any]:
    """``run`` with a cache beside the project."""
    return {"cache_features": str(tmp_path / "cache"), "cache_dtype": "float32", **run}


def start(yaml: Path, *options: str, program: Any = train) -> None:
    program(["--cfg-path", str(yaml), *(["--options", *options] if options else [])])


def retrieval(folder: Path, cached: bool = True, model: dict | None = None, **run: Any) -> Path:
    """Eight pictures a split, two captions each to train on; three layers, of which the last is tuned."""
    folder.mkdir(parents=True, exist_ok=True)
    run = {"max_epoch": 2, "save_queue": True, **run}
    return project_yaml(folder, 8, 2, model=model or LAYERS, run=kept(folder, **run) if cached else run)


def count_passes(patch: pytest.MonkeyPatch) -> list[int]:
    """Pictures of each pass through the frozen part of the tower, from now on."""
    counts: list[int] = []
    plain = towers.VisionTransformer.forward

    def counted(self: Any, x: Tensor, *args: Any) -> Tensor:
        counts.append(len(x))
        return plain(self, x, *args)

    patch.setattr(towers.VisionTransformer, "forward", counted)
    return counts


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return count_passes(monkeypatch)


class Whole(NamedTuple):
    """A run of retrieval with tokens on disk that nothing disturbed; tests add folders to its cache, and no more."""

    folder: Path
    passes: list[int]
    final: dict


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        counts = count_passes(patch)
        start(retrieval(folder))
    return Whole(folder, counts, final(folder))


def log_of(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def test_in_single_precision_a_run_is_what_it_is_without(tmp_path: Path, whole: Whole, passes: list) -> None:
    start(retrieval(tmp_path / "plain", cached=False))
    assert_same(final(tmp_path / "plain"), whole.final)
    # One to learn the size, and each picture once: of train, val and test.
    assert sum(whole.passes) == 1 + 24 and len(whole.passes) < len(passes)


@pytest.mark.slow
def test_so_is_a_run_of_questions(tmp_path: Path, passes: list) -> None:
    processors = {"vis_processor": {"train": {"name": "blip_image_eval", "image_size": 48}}}
    datasets, run = {"coco_vqa": processors, "vg_vqa": processors}, {"max_epoch": 2}
    counts = {}
    for name, keys in (("plain", run), ("cached", kept(tmp_path, **run))):
        (tmp_path / name).mkdir()
        start(vqa_project(tmp_path / name, 8, model=LAYERS, datasets=datasets, run=keys))
        counts[name] = passes[:]
        passes.clear()
    assert_same(final(tmp_path / "plain"), final(tmp_path / "cached"))
    # The eight pictures that all splits have.
    assert sum(counts["cached"]) == 1 + 8 and len(counts["cached"]) < len(counts["plain"])


@pytest.mark.slow
def test_half_precision_changes_little_and_takes_half(tmp_path: Path) -> None:
    results, sizes = {}, {}
    for dtype in ("float32", "float16"):
        start(retrieval(tmp_path / dtype, cache_dtype=dtype, max_epoch=1, **UNTESTED))
        results[dtype] = read_checkpoint(only_run(tmp_path / dtype) / LATEST)["model"]
        sizes[dtype] = sum(path.stat().st_size for path in (tmp_path / dtype / "cache").rglob("*.safetensors"))
    assert 0.5 <= sizes["float16"] / sizes["float32"] < 0.55
    for name, value in results["float32"].items():
        assert (results["float16"][name] - value).abs().max() <= 0.02, name


def test_evaluations_and_further_adapters_use_what_is_there(tmp_path: Path, whole: Whole, passes: list) -> None:
    yaml, run = whole.folder / "project.yaml", only_run(whole.folder)
    result = next((run / "result").glob("test_epoch_best.json")).read_text()
    output = f"run.output_dir={tmp_path / 'again'}"
    start(yaml, f"run.resume_ckpt_path={run / 'checkpoint_best.pth'}", output, program=evaluate)
    start(yaml, "model.mode_approx.rank=3", output)
    assert passes == [1, 1]
    again = next(tmp_path.glob("again/*/result/test_epoch_0.json")).read_text()
    assert json.loads(again)["metrics"] == json.loads(result)["metrics"]


def test_a_changed_picture_is_computed_anew(tmp_path: Path, passes: list) -> None:
    yaml = retrieval(tmp_path, max_epoch=1, **UNTESTED)
    start(yaml)
    [path] = [tmp_path / "data" / "images" / "train" / "003.jpg"]
    size, moment = path.stat().st_size, path.stat().st_mtime_ns
    Image.new("RGB", (64, 64), "red").save(path)
    passes.clear()
    start(yaml)
    assert passes == [1, 1]
    # Also one of the same size at another time.
    content = bytearray(path.read_bytes())
    path.write_bytes(content)
    os.utime(path, ns=(moment, moment + 1))
    passes.clear()
    start(yaml)
    assert passes == [1, 1] and size != path.stat().st_size


def test_a_picture_that_changes_during_the_run_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    yaml = retrieval(tmp_path)
    fill = runner.use_features

    def changed(*args: Any) -> None:
        fill(*args)
        os.utime(tmp_path / "data" / "images" / "train" / "003.jpg", ns=(1, 1))

    monkeypatch.setattr(runner, "use_features", changed)
    with pytest.raises(SystemExit):
        start(yaml)
    assert "003.jpg was changed while the run was at work; start the run again" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        "run.seed=5",  # of random weights
        "model.mode_approx.layers.last=2",
        "run.cache_dtype=float16",
        "datasets.coco_retrieval.vis_processor.eval.mean=[0.1,0.1,0.1]",
    ],
)
def test_other_weights_layers_and_preprocessing_have_their_own(
    tmp_path: Path, whole: Whole, option: str, passes: list
) -> None:
    cache = whole.folder / "cache"
    first = {path.name for path in cache.iterdir()}
    alone = [f"run.output_dir={tmp_path}", "run.max_epoch=1", "run.test_splits=[]"]
    start(whole.folder / "project.yaml", option, *alone)
    assert sum(passes) > 1
    assert len({path.name for path in cache.iterdir()} - first) == 1


def a_cache(folder: Path, **about: Any) -> FeatureCache:
    return FeatureCache(folder, about, (2, 3), torch.float32)


def test_foreign_and_damaged_files_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture = tmp_path / "a.jpg"
    picture.write_bytes(b"a")
    one, other = a_cache(tmp_path, layer=1), a_cache(tmp_path, layer=2)
    assert one.folder != other.folder
    tokens = torch.randn(2, 3)
    one.write({features.entry_name(str(picture)): tokens})
    one.scan()
    assert torch.equal(one.read(str(picture)), tokens)
    [file] = one.folder.glob("*.safetensors")
    (other.folder / file.name).write_bytes(file.read_bytes())
    with caplog.at_level(logging.WARNING):
        other.scan()
    assert len(other) == 0 and "is of other features and is not used" in log_of(caplog)
    file.write_bytes(file.read_bytes()[:-4])
    fresh = a_cache(tmp_path, layer=1)
    assert len(fresh) == 0 and "cannot be read" in log_of(caplog)
    one.write({features.entry_name(str(picture)): tokens})  # of the same pictures, it has the same name
    fresh.scan()
    assert torch.equal(fresh.read(str(picture)), tokens)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # which no length and no header tells
    file.write_bytes(content)
    with pytest.raises(AuroraError, match=f"{file} is damaged: .* have another checksum .*; remove the file"):
        a_cache(tmp_path, layer=1).read(str(picture))


def test_killed_while_it_fills_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Whole, passes: list
) -> None:
    monkeypatch.setattr(features, "FILE_PICTURES", 4)
    write = FeatureCache.write
    writes: list[int] = []

    def killed(self: FeatureCache, entries: dict) -> None:
        if len(writes) == 2:
            raise KeyboardInterrupt
        writes.append(len(entries))
        write(self, entries)

    yaml = retrieval(tmp_path / "killed")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(FeatureCache, "write", killed)
        start(yaml)
    assert writes == [4, 4]
    shutil.rmtree(tmp_path / "killed" / "output")
    passes.clear()
    start(yaml)
    assert sum(passes) == 1 + 24 - 8
    assert_same(whole.final, final(tmp_path / "killed"))


@pytest.mark.slow
def test_an_interrupted_run_ends_as_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Whole
) -> None:
    yaml = retrieval(tmp_path / "killed", checkpoint_every=1)
    read, count = FeatureCache.read, []

    def killed(self: FeatureCache, path: str) -> Tensor:
        count.append(path)
        if len(count) == 30:
            raise KeyboardInterrupt
        return read(self, path)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(FeatureCache, "read", killed)
        start(yaml)
    start(yaml, "run.resume=auto")
    assert_same(whole.final, final(tmp_path / "killed"))


@pytest.mark.slow
def test_processes_share_the_work(tmp_path: Path) -> None:
    """Each picture is computed once, by one of them, and a run in one process then has all."""
    yaml = retrieval(tmp_path, batch_size_train=2, num_workers=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command += [str(ROOT / "train.py"), "--cfg-path", str(yaml)]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = []
    for path in tmp_path.glob("cache/*/*.safetensors"):
        with safe_open(path, "pt") as file:
            names.append(len(list(file.keys())))
    assert names == 6 * [4]  # of each split, half by each
    start(yaml)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["datasets.coco_retrieval.vis_processor.train.name=blip_image_train"], "processor.train draws at random"),
        (["model.mode_approx.layers=null"], "every layer of the vision tower is tuned"),
        (["model.tuning=full"], "every layer of the vision tower is tuned"),
        (["model.vit_drop_path_rate=0.1"], "model.vit_drop_path_rate drops at random"),
        (["run.cache_limit_gb=1e-4"], "would be beyond run.cache_limit_gb, 0.0001; raise that"),
        (["run.cache_dtype=bfloat16"], "run.cache_dtype: unknown value 'bfloat16'"),
    ],
)
def test_what_cannot_be_kept_is_refused(tmp_path: Path, options: list, message: str, capsys) -> None:
    with pytest.raises(SystemExit):
        start(retrieval(tmp_path), *options)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("cache/*/*.safetensors"))


def test_a_file_in_place_of_its_folder_is_refused_by_the_key(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        start(retrieval(tmp_path), f"run.cache_features={tmp_path / 'file'}")
    assert f"run.cache_features: cannot write {tmp_path / 'file'}" in capsys.readouterr().err


def test_videos_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    paths = write_videos(tmp_path / "data")
    yaml = video_project(tmp_path, "msrvtt_ret", "msrvtt_retrieval", paths, model=LAYERS, run=kept(tmp_path))
    with pytest.raises(SystemExit):
        start(yaml)
    assert "it is for pictures, a file each, and msrvtt_retrieval trains on others" in capsys.readouterr().err
