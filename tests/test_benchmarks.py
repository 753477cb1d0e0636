"""Every project of the paper, from its YAML, on a few files of each benchmark's own format, through train.py."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from distributed import run_programs
from lavis.common.registry import registry
from runs import logged, only_run
from tiny import SPLITS, tiny_config, write_pictures
from tiny_video import write_video_questions, write_videos
from tiny_vqa import write_vqa

from lavis_aurora_cli import evaluate, train

ROOT = Path(__file__).resolve().parents[1]
COUNT = 6
IMAGE_SIZE = 48
TINY = tiny_config()
TINY_WEIGHTS = Path(TINY.tokenizer) / "model.safetensors"
VIT = [f"model.vit.{key}={value}" for key, value in TINY.vit.items()]
# Sizes and paths; all else is the project's.
MODEL = [
    "model.pretrained=null",
    f"model.image_size={IMAGE_SIZE}",
    *VIT,
    f"model.med_config_path={TINY.med_config_path}",
    f"model.tokenizer={TINY.tokenizer}",
]
BACKBONE = f"model.pretrained={TINY_WEIGHTS}"
RETRIEVAL = [*MODEL, "model.vit_ckpt_layer=2", "model.embed_dim=64", "model.queue_size=16"]
RUN = ["run.max_epoch=1", "run.batch_size_train=3", "run.batch_size_eval=4", "run.num_workers=0", "run.device=cpu"]


def sizes(name: str) -> list[str]:
    """Picture sizes, and few frames for videos."""
    parts = ["preprocess"]
    options = []
    if name in ("msrvtt_retrieval", "didemo_retrieval", "msrvtt_qa_aurora"):
        parts = [f"datasets.{name}"]
        options = [f"datasets.{name}.vis_processor.{split}.n_frms={n}" for split, n in (("train", 2), ("eval", 3))]
    return options + [
        f"{part}.vis_processor.{split}.image_size={IMAGE_SIZE}" for part in parts for split in ("train", "eval")
    ]


def _place(files: dict[Path, Path]) -> None:
    for source, target in files.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data root with the files of all benchmarks under the names of LAVIS's YAMLs."""
    root, made = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("made")
    pictures = write_pictures(made / "pictures", COUNT, captions_each=2)
    _place({pictures["images"]: root / "coco/images"})
    _place({pictures[split]: root / f"coco/annotations/coco_karpathy_{split}.json" for split in SPLITS})
    _place({pictures["images"]: root / "flickr30k/images"})
    _place({pictures[split]: root / f"flickr30k/annotations/{split}.json" for split in SPLITS})
    videos = write_videos(made / "videos", COUNT)
    for name in ("msrvtt", "didemo"):
        _place({videos["videos"]: root / name / "videos"})
        _place({videos[split]: root / name / f"annotations/retrieval_{split}.json" for split in SPLITS})
    asked = write_video_questions(made / "questions", COUNT)
    for clip in asked["videos"].iterdir():
        shutil.copy(clip, root / "msrvtt/videos")
    _place({asked[part]: root / f"msrvtt/annotations/qa_{part}.json" for part in (*SPLITS, "ans2label")})
    write_vqa(made / "vqa", COUNT)
    for picture in (made / "vqa/images").iterdir():
        shutil.copy(picture, root / "coco/images")
    names = {
        "train": "vqa_train",
        "val": "vqa_val_eval",
        "test": "vqa_test",
        "answers": "answer_list",
        "questions": "v2_OpenEnded_mscoco_val2014_questions",
        "truth": "v2_mscoco_val2014_annotations",
    }
    _place({made / f"vqa/{ours}.json": root / f"coco/annotations/{name}.json" for ours, name in names.items()})
    _place({made / "vqa/train.json": root / "coco/annotations/vqa_val.json"})
    _place({made / "vqa/vg.json": root / "vg/annotations/vg_qa.json", made / "vqa/images": root / "vg/images"})
    return root


@pytest.fixture(autouse=True)
def data_root(data, monkeypatch):
    monkeypatch.setitem(registry.mapping["paths"], "cache_root", str(data))


def arguments(project: str, output: Path, *options: str) -> list[str]:
    return [
        "--cfg-path",
        str(ROOT / f"projects/aurora/{project}.yaml"),
        "--options",
        *options,
        f"run.output_dir={output}",
    ]


def finite(log: dict) -> bool:
    return all(value is None or not isinstance(value, float) or math.isfinite(value) for value in log.values())


# Retrieval


def recalls(log: dict, kind: str) -> list[str]:
    """The keys of a retrieval's figures, all of which must be there and none of the other kind."""
    keys = [f"{d}_{m}" for d in (f"{kind}_to_text", f"text_to_{kind}") for m in ("r1", "r5", "r10", "median_rank")]
    other = {"image": "video", "video": "image"}[kind]
    assert not [key for key in log if other in key]
    return keys


def check_retrieval(folder: Path, kind: str, texts: int, out: str, split: str = "test", epoch: str = "best") -> None:
    result = json.loads((folder / "result" / f"{split}_epoch_{epoch}.json").read_text())
    assert (result[f"{kind}s"], result["texts"]) == (COUNT, texts)
    [log] = logged(folder, f"final_{split}_agg_metrics")
    assert finite(log)
    for key in recalls(log, kind):
        assert log[f"final_{split}_{key}"] == result["metrics"][key]
    assert f"{split}: {COUNT} {kind}s, {texts} texts" in out and f"{kind}-to-text" in out and f"text-to-{kind}" in out


@pytest.mark.parametrize(
    ("project", "dataset", "kind", "texts"),
    [
        ("coco_ret", "coco_retrieval", "image", 2 * COUNT),
        pytest.param("flickr_ret", "flickr30k", "image", 2 * COUNT, marks=pytest.mark.slow),
        pytest.param("msrvtt_ret", "msrvtt_retrieval", "video", COUNT, marks=pytest.mark.slow),
        pytest.param("didemo_ret", "didemo_retrieval", "video", COUNT, marks=pytest.mark.slow),
        pytest.param("released/coco_ret", "coco_retrieval", "image", 2 * COUNT, marks=pytest.mark.slow),
        pytest.param("released/flickr_ret", "flickr30k", "image", 2 * COUNT, marks=pytest.mark.slow),
        ("released/msrvtt_ret", "msrvtt_retrieval", "video", COUNT),
        pytest.param("released/didemo_ret", "didemo_retrieval", "video", COUNT, marks=pytest.mark.slow),
    ],
)
def test_retrieval_trains_and_tests(tmp_path, capsys, project, dataset, kind, texts):
    train(arguments(project, tmp_path / "output", *RETRIEVAL, *RUN, *sizes(dataset)))
    folder = only_run(tmp_path)
    [trained] = logged(folder, "train_loss")
    assert finite(trained) and trained["train_loss"] > 0
    validated = not project.startswith("released")
    check_retrieval(folder, kind, texts, capsys.readouterr().out, epoch="best" if validated else "0")
    state = torch.load(folder / f"checkpoint_{'best' if validated else 'latest'}.pth", weights_only=True)
    assert (folder / ("adapter_best" if validated else "adapter_last")).is_dir()
    assert any(key.startswith("mode_approx") for key in state["model"])


@pytest.fixture(scope="module")
def coco_adapter(tmp_path_factory, data) -> Path:
    """The adapter of a run of coco_ret.yaml, at a rate at which one step shows."""
    folder = tmp_path_factory.mktemp("coco")
    before = registry.mapping["paths"]["cache_root"]
    registry.mapping["paths"]["cache_root"] = str(data)
    options = [*RETRIEVAL, BACKBONE, *RUN, *sizes("coco_retrieval"), "run.init_lr=0.03", "run.test_splits=[]"]
    train(arguments("coco_ret", folder / "output", *options))
    registry.mapping["paths"]["cache_root"] = before
    return only_run(folder) / "adapter_best"


@pytest.mark.parametrize(
    ("name", "command"), [("msrvtt", train), pytest.param("didemo", evaluate, marks=pytest.mark.slow)]
)
def test_zero_shot_tests_an_adapter_of_coco(tmp_path, capsys, coco_adapter, name, command):
    """Smaller frames than COCO's pictures, as in the paper; nothing is trained."""
    size = 32
    options = [o.replace(f"={IMAGE_SIZE}", f"={size}") for o in [*RETRIEVAL, *sizes(f"{name}_retrieval")]]
    options += [BACKBONE, *RUN]
    figures = []
    for number, adapter in enumerate((str(coco_adapter), "null")):
        output = tmp_path / str(number) / "output"
        command(arguments(f"zeroshot_{name}", output, *options, f"model.adapter={adapter}"))
        folder = only_run(output.parent)
        assert not list(folder.glob("*.pth")) and not logged(folder, "train_loss")
        check_retrieval(folder, "video", COUNT, capsys.readouterr().out, epoch="0")
        figures.append(json.loads((folder / "result/test_epoch_0.json").read_text())["ranks"])
    assert figures[0] != figures[1]


@pytest.mark.slow
def test_two_processes_train_and_test_on_videos(tmp_path, capsys, data, monkeypatch):
    """MSR-VTT, two processes with a worker each: the losses are those of one process, and both test all videos."""
    options = [*RETRIEVAL, *RUN, *sizes("msrvtt_retrieval"), "run.valid_splits=[]"]
    train(arguments("msrvtt_ret", tmp_path / "one/output", *options, "run.batch_size_train=4"))
    options += ["run.batch_size_train=2", "run.num_workers=1"]
    monkeypatch.setenv("AURORA_DATA", str(data))
    told = run_programs(2, train, arguments("msrvtt_ret", tmp_path / "two/output", *options))[0]
    logs = []
    for name, out in (("one", capsys.readouterr().out), ("two", told)):
        folder = only_run(tmp_path / name)
        check_retrieval(folder, "video", COUNT, out, epoch="0")
        logs.append(logged(folder, "train_loss")[0])
    # The epoch is one step: the losses are those of the model as it starts, on the same frames and crops.
    for key, value in logs[0].items():
        assert logs[1][key] == pytest.approx(value, abs=2e-3), key


# Question answering


@pytest.mark.parametrize("project", [pytest.param("vqav2", marks=pytest.mark.slow), "released/vqav2"])
def test_vqav2_trains_and_answers(tmp_path, project):
    options = [*MODEL, *RUN, *sizes("coco_vqa"), "model.vit_drop_path_rate=0"]
    train(arguments(project, tmp_path / "output", *options))
    folder = only_run(tmp_path)
    assert finite(logged(folder, "train_loss")[0])
    answers = json.loads((folder / "result" / "test_epoch_0_vqa_result.json").read_text())
    assert len(answers) == COUNT and all(set(entry) == {"question_id", "answer", "confidence"} for entry in answers)


@pytest.mark.parametrize(
    ("project", "method"),
    [
        ("msrvtt_qa", []),
        pytest.param("msrvtt_qa", ["run.inference_method=rank"], marks=pytest.mark.slow),
        pytest.param("released/msrvtt_qa", [], marks=pytest.mark.slow),
    ],
    ids=["generate", "rank", "released"],
)
def test_msrvtt_qa_trains_and_answers(tmp_path, capsys, project, method):
    options = [*MODEL, *RUN, *sizes("msrvtt_qa_aurora"), *method]
    train(arguments(project, tmp_path / "output", *options))
    folder = only_run(tmp_path)
    assert finite(logged(folder, "train_loss")[0])
    epoch = "0" if project.startswith("released") else "best"
    answers = json.loads((folder / "result" / f"test_epoch_{epoch}_vqa_result.json").read_text())
    assert len(answers) == COUNT and {entry["truth"] for entry in answers} == {"red", "star", "two", "now", "left"}
    [log] = logged(folder, "final_test_agg_metrics")
    right = sum(entry["answer"] == {"two": "2"}.get(entry["truth"], entry["truth"]) for entry in answers)
    right += sum(entry["answer"] == entry["truth"] == "two" for entry in answers)
    assert log["final_test_agg_metrics"] == pytest.approx(100 * right / COUNT)
    plain = sum(entry["answer"] == entry["truth"] for entry in answers)
    assert log["final_test_plain_accuracy"] == pytest.approx(100 * plain / COUNT)
    assert {f"final_test_{word}" for word in ("what", "who", "how", "when", "where")} <= log.keys()
    assert f"test: {COUNT} questions, accuracy" in capsys.readouterr().out
