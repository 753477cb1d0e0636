"""LAVIS's own tasks under runner_aurora: a step with each model that can take one, and whole runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lavis.common.registry import registry
from lavis.tasks.base_task import BaseTask
from lavis.tasks.multimodal_classification import MultimodalClassificationTask
from lavis.tasks.retrieval import RetrievalTask
from lavis_models import PIXELS, build, hub_folder, samples
from omegaconf import OmegaConf
from runs import ON_MAIN, logged, only_run, task_of, train_epoch, training_state
from tiny import project_yaml, write_pictures
from tiny_vqa import ANSWERS, vqa_project
from torch import nn

from lavis_aurora import AuroraError, ModeApproxConfig
from lavis_aurora.models.mode_approx_model import ModeApproxModel
from lavis_aurora.models.owner import RunState
from lavis_aurora.training.tasks.base import AuroraTaskBase, runnable_task
from lavis_aurora.training.tasks.retrieval import RetrievalAuroraTask
from lavis_aurora_cli import train

# Tasks and models of theirs; gpt_dialogue has no layer to adapt, so any loss stands for its.
STEPS = {
    "retrieval": ["albef_retrieval", "alpro_retrieval", "blip_retrieval"],
    "vqa": ["albef_vqa", "blip_vqa"],
    "gqa": ["blip_vqa"],
    "aok_vqa": ["blip_vqa"],
    "captioning": ["blip2_opt", "blip2_t5", "blip_caption"],
    "multimodal_classification": ["clip", "albef_classification", "albef_nlvr", "alpro_qa", "blip_nlvr"],
    "image_text_pretrain": ["albef_pretrain", "blip2", "blip_pretrain"],
    "dialogue": ["blip_caption"],
}
if ON_MAIN:
    # Text-to-image generation is for models that need the package diffusers.
    STEPS |= {"discrn_qa": ["blip_vqa"], "text-to-image-generation": []}
CAPTIONS = pytest.mark.skipif(ON_MAIN, reason="main's captioning gives BLIP's generate what it does not take")
CLASSIFIES = pytest.mark.skipif(
    ON_MAIN, reason="main's classification gives BLIP's predict what it does not take, and fails from Python 3.11 on"
)
# They ask for a process group even in one process; so does CLIP, whose small model has a loss that does not.
GROUPED = ("alpro_retrieval", "blip2")
READING = {"vqa_reading_comprehension", "gqa_reading_comprehension"}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The working directory; LAVIS's models read their tokenizer here."""
    monkeypatch.chdir(hub_folder(tmp_path))
    monkeypatch.setitem(registry.mapping["paths"], "output_dir", str(tmp_path))
    return tmp_path


@contextmanager
def group() -> Iterator[None]:
    """A group of this process alone, as torchrun makes one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def set_up(name: str) -> BaseTask:
    """A task of LAVIS with the default settings, as the command line makes it."""
    return task_of(name)


def wrapped(name: str) -> ModeApproxModel:
    return ModeApproxModel(build(name), ModeApproxConfig(rank=4, targets=name))


def test_tasks_of_this_package_stay_as_they_are():
    assert runnable_task(RetrievalAuroraTask) is RetrievalAuroraTask


def test_lavis_tasks_train_by_our_loop_and_keep_their_own_metrics():
    for cls, shards in ((RetrievalTask, False), (MultimodalClassificationTask, True)):
        task = runnable_task(cls)
        assert issubclass(task, cls) and task.__name__ == cls.__name__
        assert task.losses is AuroraTaskBase.losses
        assert task.after_evaluation is cls.after_evaluation
        assert task.shard_evaluation is shards


@CLASSIFIES
def test_lavis_tasks_evaluate_on_the_cpu():
    class Predicts(nn.Linear):
        def predict(self, samples):
            return {"predictions": self(samples["x"]), "targets": samples["label"]}

    batch = {"x": torch.eye(2), "label": torch.tensor([0, 1]), "instance_id": ["a", "b"], "image_id": ["a", "b"]}
    task = runnable_task(MultimodalClassificationTask)()
    results = task.evaluation(Predicts(2, 2), [batch])
    assert [row["instance_id"] for row in results] == ["a", "b"]
    assert issubclass(type(task), BaseTask)


# Steps


def test_every_task_of_lavis_is_tried_here():
    tasks = registry.mapping["task_name_mapping"].items()
    assert {name for name, cls in tasks if cls.__module__.startswith("lavis.")} == STEPS.keys() | READING


@pytest.mark.parametrize("name", sorted(READING))
def test_tasks_of_models_that_cannot_be_trained_are_refused(name):
    with pytest.raises(AuroraError, match=f"run.task: .*{name}.* no training loss"):
        set_up(name)


def step(task: BaseTask, model: nn.Module, batch: dict, rate: float) -> dict[str, float]:
    """What an epoch of one step reports."""
    # ALBEF's loss is NaN where none of these few words is drawn to be masked.
    torch.manual_seed(7)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    state = training_state(task, model, [batch], Path.cwd(), optimizer)
    state.epoch = 1
    return train_epoch(state)


@pytest.mark.parametrize(("name", "model_name"), [(task, model) for task in STEPS for model in STEPS[task]])
def test_a_step_of_each_task(hub, name, model_name):
    task, model = set_up(name), wrapped(model_name).train()
    factors = model.mode_approx.sets["default"]
    before = {key: value.clone() for key, value in factors.state_dict().items()}
    with group() if model_name in GROUPED else nullcontext():
        stats = step(task, model, samples(model_name), rate=0.5)
    assert stats["loss"] > 0 and stats["lr"] == 0.5
    # V starts at zero, and it alone has a gradient then.
    assert any(not torch.equal(value, before[key]) for key, value in factors.state_dict().items())


@pytest.mark.parametrize("name", GROUPED)
def test_what_asks_for_a_process_group_says_so(hub, name):
    with pytest.raises(AuroraError, match="--nproc_per_node=1 train.py"):
        step(set_up("image_text_pretrain"), wrapped(name).train(), samples(name), rate=0.5)


def test_the_step_is_the_tasks_own(hub):
    class Doubled(MultimodalClassificationTask):
        def train_step(self, model, samples):
            return 2 * super().train_step(model, samples)

    class Alone(MultimodalClassificationTask):
        def train_step(self, model, samples):
            return model.weight.sum() + samples["x"].sum()

    class Model(RunState, nn.Linear):
        def forward(self, samples):
            loss = super().forward(samples["x"]).sum()
            return {"loss": loss, "loss_other": loss.detach() + 1}

    for cls in (Doubled, Alone):
        model = Model(3, 1)
        nn.init.ones_(model.weight), nn.init.zeros_(model.bias)
        stats = step(task_of("multimodal_classification", cls), model, {"x": torch.ones(1, 3)}, rate=1.0)
        expected = {"loss": 6.0, "lr": 1.0}
        assert stats == ({**expected, "loss_other": 4.0} if cls is Doubled else expected)
        assert torch.equal(model.weight, torch.full((1, 3), -1.0 if cls is Doubled else 0.0))


# Whole runs


def run(path: Path, *options: str) -> Path:
    train(["--cfg-path", str(path), *(["--options", *options] if options else [])])
    return only_run(path.parent)


MODELS = {
    "aurora": {"arch": "blip_vqa_aurora", "model_type": "tiny", "pretrained": None},
    "mode_approx": {
        "arch": "mode_approx",
        "mode_approx": {"rank": 4},
        "base": {"arch": "blip_vqa_aurora", "model_type": "tiny", "pretrained": None},
    },
}


@pytest.mark.parametrize("model", MODELS)
def test_vqa_ranks_and_scores(tmp_path, model):
    path = vqa_project(tmp_path, run={"task": "vqa"})
    project = OmegaConf.load(path)
    project.model = MODELS[model]
    OmegaConf.save(project, path)
    folder = run(path)
    answers = json.loads((folder / "result" / "val_vqa_result.json").read_text())
    truth = json.loads((tmp_path / "data" / "truth.json").read_text())["annotations"]
    right = {item["question_id"]: item["answers"][0]["answer"] for item in truth}
    assert len(answers) == len(right) and all(entry["answer"] in ANSWERS for entry in answers)
    accuracy = 100 * sum(right[entry["question_id"]] == entry["answer"] for entry in answers) / len(answers)
    [log] = logged(folder, "val_agg_metrics")
    assert log["val_agg_metrics"] == pytest.approx(accuracy, abs=0.01)
    assert (folder / "result" / "test_vqa_result.json").is_file()


@pytest.mark.parametrize(("task", "method"), [("gqa", "rank"), ("gqa", "generate"), ("aok_vqa", "rank")])
def test_other_questions(tmp_path, task, method):
    """GQA's and A-OKVQA's files, which have a list of answers, but are not VQAv2's."""
    path = vqa_project(tmp_path, run={"task": task, "inference_method": method})
    data = tmp_path / "data"
    for split in ("train", "val"):
        entries = json.loads((data / f"{split}.json").read_text())
        for entry in entries:
            entry.update(answer="red", direct_answers=["red"] * 10, choices=["red", "blue"], correct_choice_idx=0)
        (data / f"{split}.json").write_text(json.dumps(entries))
    lists = {"train": ["train.json"], "val": ["val.json", "answers.json"], "test": ["val.json", "answers.json"]}
    files = {split: [str(data / name) for name in names] for split, names in lists.items()}
    project = OmegaConf.load(path)
    annotations = {split: {"url": names, "storage": names} for split, names in files.items()}
    images = {"storage": str(data / "images")}
    project.datasets = {task: {"build_info": {"annotations": annotations, "images": images}}}
    OmegaConf.save(project, path)
    folder = run(path)
    results = json.loads((folder / "result" / "val_vqa_result.json").read_text())
    expected = 100 * sum(entry["pred_ans"] == "red" for entry in results) / len(results)
    [log] = logged(folder, "val_agg_metrics")
    assert len(results) == 6 and log["val_acc"] == pytest.approx(expected)


def small_project(hub: Path, monkeypatch, name: str, task: str, dataset: str, files: dict, **run_keys) -> Path:
    """A project around a small model of LAVIS, on pictures without captions of their own."""
    registry_model = {"blip_caption": "base_coco", "albef_classification": "ve", "blip_nlvr": "nlvr"}
    registry_model |= {"blip2_t5": "pretrain_flant5xl"}
    base = {"arch": name, "model_type": registry_model.get(name, "base"), "image_size": PIXELS}
    pictures = write_pictures(hub / "data", 6)
    annotations = {}
    for split, entries in files.items():
        path = hub / f"{split}.json"
        path.write_text(json.dumps(entries))
        annotations[split] = {"url": [str(path)], "storage": [str(path)]}
    info = {"annotations": annotations, "images": {"storage": str(pictures["images"])}}
    size = {split: {"name": f"blip_image_{split}", "image_size": PIXELS} for split in ("train", "eval")}
    words = {split: {"name": "blip_caption"} for split in ("train", "eval")}
    path = project_yaml(hub, run={"task": task, **run_keys})
    project = OmegaConf.load(path)
    project.model = {"arch": "mode_approx", "base": base, "mode_approx": {"rank": 4}}
    project.datasets = {dataset: {"build_info": info, "vis_processor": size, "text_processor": words}}
    OmegaConf.save(project, path)
    # Only its size is not that of the YAML.
    cls = registry.get_model_class(name)
    monkeypatch.setattr(cls, "from_config", classmethod(lambda _cls, cfg: build(name)))
    return path


def pictures_of(split: str, **rest) -> list[dict]:
    return [{"image": f"{split}/{i:03d}.jpg", **{k: v[i % len(v)] for k, v in rest.items()}} for i in range(6)]


@CAPTIONS
def test_captioning(hub, monkeypatch):
    files = {split: pictures_of(split, caption=["a red circle", "a star"], image_id=range(6)) for split in ("train",)}
    files |= {split: pictures_of(split, caption=[["a red circle"]]) for split in ("val", "test")}
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_options: compiled.append(type(self).__name__))
    settings = {"report_metric": False, "num_beams": 1, "compile": True}
    folder = run(small_project(hub, monkeypatch, "blip_caption", "captioning", "coco_caption", files, **settings))
    assert compiled == ["Block"] * 2 + ["BertLayer"] * 2
    captions = json.loads((folder / "result" / "val_epoch0.json").read_text())
    assert [entry["image_id"] for entry in captions] == list(range(6))
    assert [entry["val_agg_metrics"] for entry in logged(folder, "val_agg_metrics")] == [0.0]


@CLASSIFIES
def test_classification_of_pairs(hub, monkeypatch):
    labels = ["True", "False"]
    files = {
        split: [
            {"images": [f"{split}/{i:03d}.jpg"] * 2, "sentence": "a star", "label": labels[i % 2]} for i in range(6)
        ]
        for split in ("train", "val", "test")
    }
    folder = run(small_project(hub, monkeypatch, "blip_nlvr", "multimodal_classification", "nlvr", files))
    results = json.loads((folder / "result" / "val_epoch0.json").read_text())
    [log] = logged(folder, "val_agg_metrics")
    assert log["val_acc"] == sum(entry["prediction"] == entry["target"] for entry in results) / 6


@CLASSIFIES
def test_classification_of_pictures_named_without_their_ending(hub, monkeypatch):
    labels = ["contradiction", "neutral", "entailment"]
    files = {
        split: [{"image": f"{split}/{i:03d}", "sentence": "a star", "label": labels[i % 3]} for i in range(6)]
        for split in ("train", "val", "test")
    }
    name = "albef_classification"
    folder = run(small_project(hub, monkeypatch, name, "multimodal_classification", "snli_ve", files))
    assert len(json.loads((folder / "result" / "test_epochbest.json").read_text())) == 6


@pytest.mark.skipif(not ON_MAIN, reason="of LAVIS's main branch")
@pytest.mark.parametrize(
    ("name", "task", "dataset"),
    [("blip_caption", "captioning", "coco_caption"), ("blip_nlvr", "multimodal_classification", "nlvr")],
)
def test_what_main_cannot_evaluate_is_refused_before_it_is_trained(hub, monkeypatch, capsys, name, task, dataset):
    files = {split: pictures_of(split, caption=["a star"], image_id=range(6)) for split in ("train", "val", "test")}
    with pytest.raises(SystemExit):
        run(small_project(hub, monkeypatch, name, task, dataset, files))
    error = capsys.readouterr().err
    assert f"run.task: {task} of LAVIS's main branch " in error and "use LAVIS 1.0.2, or to train alone, set" in error
    assert not (hub / "output").exists()


@pytest.mark.skipif(not ON_MAIN, reason="of LAVIS's main branch")
def test_captioning_of_main(hub, monkeypatch):
    files = {"train": pictures_of("train", caption=["a red circle", "a star"], image_id=range(6))}
    files |= {split: pictures_of(split, caption=[["a red circle"]]) for split in ("val", "test")}
    settings = {"report_metric": False, "num_beams": 1, "max_len": 4}
    path = small_project(hub, monkeypatch, "blip2_t5", "captioning", "coco_caption_instruct", files, **settings)
    project = OmegaConf.load(path)
    del project.datasets.coco_caption_instruct.text_processor  # its own gives an instruction
    OmegaConf.save(project, path)
    captions = json.loads((run(path) / "result" / "val_epoch0.json").read_text())
    assert [entry["image_id"] for entry in captions] == list(range(6))


def test_captioning_trains_without_validation(hub, monkeypatch):
    files = {split: pictures_of(split, caption=["a star"], image_id=range(6)) for split in ("train", "val", "test")}
    path = small_project(hub, monkeypatch, "blip_caption", "captioning", "coco_caption", files)
    folder = run(path, "run.valid_splits=[]", "run.test_splits=[]")
    assert logged(folder, "train_loss")


def test_a_task_may_report_its_losses_as_main_does(hub):
    class Pair(MultimodalClassificationTask):
        def train_step(self, model, samples):
            loss = model.weight.sum() + samples["x"].sum()
            return loss, {"loss": loss, "loss_other": loss + 1}

    model = nn.Linear(3, 1)
    nn.init.ones_(model.weight)
    losses = task_of("multimodal_classification", Pair).losses(model, {"x": torch.ones(1, 3)})
    assert {key: float(value) for key, value in losses.items()} == {"loss": 6.0, "loss_other": 7.0}
    assert losses["loss"].requires_grad and not losses["loss_other"].requires_grad


def test_pretraining_has_no_evaluation(hub, monkeypatch, capsys):
    captions = ["a red circle", "a star", "a blue square"]
    files = {split: pictures_of(split, caption=captions, image_id=range(6)) for split in ("train", "val", "test")}
    name, task = "blip_pretrain", "image_text_pretrain"
    path = small_project(hub, monkeypatch, name, task, "coco_caption", files, batch_size_train=3)
    with pytest.raises(SystemExit):
        run(path)
    assert "run.valid_splits: run.task image_text_pretrain reports no agg_metrics on val" in capsys.readouterr().err
    before = only_run(hub)
    train(["--cfg-path", str(path), "--options", "run.valid_splits=[]", "run.max_epoch=2",
           f"run.resume_ckpt_path={before / 'checkpoint_latest.pth'}"])  # fmt: skip
    [folder] = [one for one in (hub / "output").iterdir() if one != before]
    [log] = logged(folder, "train_loss")
    assert log["train_epoch"] == 1 and log["train_loss"] > 0
