"""The registered model around another one: configuration, delegation, files, runs."""

import copy
import subprocess
import sys
from pathlib import Path

import lavis.models
import pytest
import torch
from lavis.common.config import Config
from lavis.common.registry import registry
from omegaconf import DictConfig, OmegaConf
from tiny import activate, project_yaml, tiny_config, tiny_model
from torch import nn

from lavis_aurora import (
    AuroraError,
    ModeApproxConfig,
    load_adapter,
    load_model_and_preprocess,
    merged_state_dict,
    save_adapter,
    set_adapter,
    trainable_parameters_summary,
)
from lavis_aurora.models.mode_approx_model import ModeApproxModel
from lavis_aurora.project import load_config
from lavis_aurora.training.checkpoints import read_checkpoint
from lavis_aurora_cli import train

BASE = {"arch": "blip_retrieval_aurora", "model_type": "tiny", "pretrained": None, "queue_size": 16}


def config(**overrides) -> DictConfig:
    """``model:`` of a small wrapped model with random weights."""
    return OmegaConf.merge({"arch": "mode_approx", "base": BASE, "mode_approx": {"rank": 4}}, overrides)


def model(seed: int = 0, **overrides) -> ModeApproxModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ModeApproxModel.from_config(config(**overrides))


def batch() -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.randn(4, 3, 48, 48, generator=generator),
        "text_input": ["a red circle", "a blue star", "a green square", "a black ring"],
        "image_id": torch.tensor([1, 2, 3, 4]),
        "epoch": 0,
        "iters": 0,
        "num_iters_per_epoch": 1,
    }


# Building


def test_the_base_is_built_by_its_own_configuration_over_its_types_defaults():
    wrapped = model()
    plain = tiny_model(tuning="full", queue_size=16)
    assert type(wrapped.base) is type(plain)
    keys = {key for key in wrapped.state_dict() if ".mode_approx." not in key}
    assert keys == {f"base.{key}" for key in plain.state_dict()}
    assert all(key.startswith("base.mode_approx.sets.") for key in set(wrapped.state_dict()) - keys)
    assert wrapped.base.queue_size == 16 and wrapped.base.max_txt_len == tiny_config().get("max_txt_len", 35)
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith("base.mode_approx.sets.default.") for name in trained)


def test_without_targets_the_preset_of_the_base_is_taken():
    assert len(model().mode_approx.slots) == 3 * 3 * 3
    one = model(mode_approx={"targets": r"text_encoder\..*\.query"})
    assert all(slot.endswith(".query") for slot in one.mode_approx.slots)


WRONG = [
    ({"base": None}, "model.base: missing; name the model to wrap"),
    ({"base": {"arch": "blip_retrieval_auror"}}, "model.base.arch: .* did you mean 'blip_retrieval_aurora'"),
    ({"base": {"arch": "mode_approx"}}, "model.base.arch: 'mode_approx' is no registered model"),
    ({"base": {"model_type": "tinny"}}, "model.base.model_type: blip_retrieval_aurora has no type 'tinny'.*'tiny'"),
    ({"base": {"tuning": "aurora"}}, "model.base.tuning: leave it out"),
    ({"mode_approx": {"rnk": 2}}, "model.mode_approx.rnk: unknown key; did you mean 'rank'"),
    ({"mode_approx": {"targets": 3}}, "mode_approx.targets: 3 cannot be used"),
    ({"mode_approx": {"targets": []}}, "mode_approx.targets: .* cannot be used"),
    ({"mode_approx": {"targets": ["(q"]}}, r"mode_approx.targets: '\(q' is no regular expression"),
    (
        {"mode_approx": {"targets": ["blip_retrival"]}},
        "targets: 'blip_retrival' .*did you mean the preset 'blip_retrieval'",
    ),
    ({"modules_to_save": ["itm_haed"]}, "model.modules_to_save: 'itm_haed' matches no module.*'itm_head'"),
    ({"modules_to_save": ["text_proj_m"]}, "model.modules_to_save: 'text_proj_m' matches no module"),
    ({"bass": 1}, "model.bass: unknown key; did you mean 'base'"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[str(change) for change, _ in WRONG])
def test_wrong_input_is_named_with_its_key(change, message):
    with pytest.raises(AuroraError, match=message) as caught:
        ModeApproxModel.from_config(config(**change) if change != {"base": None} else OmegaConf.create({}))
    assert "\n" not in str(caught.value)


def test_a_base_without_a_preset_asks_for_targets():
    base = {"arch": "gpt_dialogue", "model_type": "base"}
    with pytest.raises(AuroraError, match="model.mode_approx.targets: there is no preset for gpt_dialogue"):
        ModeApproxModel.from_config(OmegaConf.create({"base": base}))


# LAVIS's ways to it


def test_lavis_own_configuration_reads_the_default_yaml(tmp_path: Path):
    path = project_yaml(tmp_path, count=1)
    project = OmegaConf.load(path)
    project.model = {"arch": "mode_approx", "model_type": "default", "base": BASE}
    own = Config.build_model_config(project)
    assert own.model.mode_approx.rank == 64 and own.model.base.model_type == "tiny"
    assert len(ModeApproxModel.from_config(own.model).mode_approx.slots) == 27


def test_a_project_gets_the_defaults_and_processors_of_the_base(tmp_path: Path):
    path = project_yaml(tmp_path, count=1)
    project = OmegaConf.load(path)
    project.model = {"arch": "mode_approx", "base": {"arch": "blip_vqa_aurora", "model_type": "tiny"}}
    OmegaConf.save(project, path)
    cfg = load_config(str(path))
    defaults = OmegaConf.load(registry.get_model_class("blip_vqa_aurora").default_config_path("tiny"))
    assert cfg.model_cfg.model_type == "default"
    assert cfg.model_cfg.base == defaults.model
    dataset = cfg.datasets_cfg.coco_retrieval
    assert dataset.text_processor.eval == defaults.preprocess.text_processor.eval
    larger = load_config(str(path), ["model.base.image_size=64"]).datasets_cfg.coco_retrieval.vis_processor
    assert {split: processor.image_size for split, processor in larger.items()} == {"train": 64, "eval": 64}
    key = "datasets.coco_retrieval.vis_processor.train.image_size"
    with pytest.raises(AuroraError, match=f"{key}: 48 is not model.base.image_size, 64"):
        load_config(str(path), ["model.base.image_size=64", f"{key}=48"])
    with pytest.raises(AuroraError, match="model.load_finetuned: .* write it below model.base"):
        load_config(str(path), ["model.load_finetuned=false"])
    with pytest.raises(AuroraError, match="project.yaml: model.base.arch: .*'blip_vqa_aurora'"):
        load_config(str(path), ["model.base.arch=blip_vqa_auror"])


@pytest.mark.parametrize("load", [load_model_and_preprocess, lavis.models.load_model_and_preprocess])
def test_the_loaders_take_the_model_inside_as_type(load):
    wrapped, vis, txt = load("mode_approx", "blip_retrieval_aurora/tiny", is_eval=True)
    plain, plain_vis, plain_txt = load("blip_retrieval_aurora", "tiny", is_eval=True)
    assert type(vis["eval"]) is type(plain_vis["eval"]) and type(txt["eval"]) is type(plain_txt["eval"])
    assert wrapped.mode_approx.sets["default"].config.rank == 64 and not wrapped.training
    image = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        ours, theirs = (m.visual_encoder.forward_features(image) for m in (wrapped, plain))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        (None, "mode_approx: name the model inside as ARCH/TYPE"),
        ("tiny", "mode_approx: no type 'tiny'; name the model inside as ARCH/TYPE"),
        ("blip_vqa_auror/tiny", "arch: 'blip_vqa_auror' is no registered model; did you mean 'blip_vqa_aurora'"),
        ("blip_vqa_aurora/tinny", "model_type: blip_vqa_aurora has no type 'tinny'; did you mean 'tiny'"),
    ],
)
def test_other_types_are_one_clear_error(model_type, message):
    with pytest.raises(AuroraError, match=message):
        load_model_and_preprocess("mode_approx", model_type)


def test_it_is_listed_in_lavis_model_zoo():
    assert "default" in dict(lavis.models.ModelZoo())["mode_approx"]


# Being the base


def test_forward_and_everything_else_is_the_bases():
    wrapped, plain = model(), tiny_model(tuning="full", queue_size=16)
    plain.load_state_dict({k[5:]: v for k, v in wrapped.state_dict().items() if ".mode_approx." not in k})
    torch.manual_seed(2)
    ours = wrapped.eval()(batch())
    torch.manual_seed(2)
    theirs = plain.eval()(batch())
    for key in ("loss", "loss_itc", "loss_itm"):
        torch.testing.assert_close(ours[key], theirs[key])
    assert wrapped.tokenizer is wrapped.base.tokenizer
    assert wrapped.compute_sim_matrix.__wrapped__.__self__ is wrapped.base
    assert wrapped.device == plain.device
    with pytest.raises(AttributeError, match="no_such_thing"):
        wrapped.no_such_thing  # noqa: B018


def test_tasks_reach_the_base_before_an_evaluation():
    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Linear(4, 4)

        def before_evaluation(self, **kwargs):
            self.told = kwargs

        def generate(self, samples, **kwargs):
            return ["caption"] * len(samples["image"])

    wrapped = ModeApproxModel(Base(), ModeApproxConfig(rank=2))
    wrapped.before_evaluation(dataset=1, task_type=2)
    assert wrapped.base.told == {"dataset": 1, "task_type": 2}
    assert wrapped.generate({"image": [1, 2]}, num_beams=3) == ["caption"] * 2


def test_checkpoints_of_the_base_load_unmodified(tmp_path: Path):
    plain = tiny_model(seed=5, tuning="full", queue_size=16)
    torch.save({"model": plain.state_dict()}, tmp_path / "base.pth")
    wrapped = activate(model())
    default = wrapped.mode_approx.sets["default"]
    factors = copy.deepcopy(default.state_dict())
    wrapped.load_checkpoint(str(tmp_path / "base.pth"))
    for key, value in plain.state_dict().items():
        if "queue" not in key:
            assert torch.equal(wrapped.state_dict()[f"base.{key}"], value), key
    assert all(torch.equal(value, factors[key]) for key, value in default.state_dict().items())


def test_frozen_batch_normalisation_stands_still():
    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.norm, self.own = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    wrapped = ModeApproxModel(Base(), ModeApproxConfig(rank=2), ["own"]).train()
    assert (wrapped.training, wrapped.norm.training, wrapped.own.training) == (True, False, True)
    assert not wrapped.eval().own.training


# Further modules


def test_modules_to_save_are_trained_saved_and_reported(tmp_path: Path):
    wrapped = model(modules_to_save=["itm_head", "text_proj"])
    assert {name for name, p in wrapped.named_parameters() if p.requires_grad and ".mode_approx." not in name} == {
        f"base.{part}.{kind}" for part in ("itm_head", "text_proj") for kind in ("weight", "bias")
    }
    assert "heads" in trainable_parameters_summary(wrapped)
    # Their momentum copies follow them by LAVIS's own pairs.
    with torch.no_grad():
        wrapped.text_proj.weight += 1
    wrapped._momentum_update()
    assert not torch.equal(wrapped.text_proj_m.weight, model().text_proj_m.weight)
    assert "base.text_proj_m.weight" in wrapped.run_state()
    assert "base.visual_encoder_m.pos_embed" not in wrapped.run_state()
    activate(wrapped)
    save_adapter(wrapped, tmp_path)
    other = ModeApproxModel.from_config(config(modules_to_save=["itm_head", "text_proj"]))
    other.base.load_state_dict(
        {k: v for k, v in model().base.state_dict().items() if "mode_approx" not in k}, strict=False
    )
    load_adapter(other, tmp_path)
    assert torch.equal(other.text_proj.weight, wrapped.text_proj.weight)


def test_the_teacher_starts_as_the_adapter_that_is_loaded_whichever_is_active(tmp_path: Path):
    heads = {"modules_to_save": ["text_proj"]}
    tuned = activate(model(**heads))
    with torch.no_grad():
        tuned.text_proj.weight.fill_(7)
    save_adapter(tuned, tmp_path / "other")
    plain = model(**heads)
    save_adapter(plain, tmp_path / "plain")
    load_adapter(plain, tmp_path / "other", "other")
    set_adapter(plain, "other")
    load_adapter(plain, tmp_path / "plain")
    assert torch.equal(plain.text_proj.weight, tuned.text_proj.weight)
    assert torch.equal(plain.text_proj_m.weight, model(**heads).text_proj.weight)


def test_a_module_to_save_brings_those_inside_it_once():
    wrapped = model(modules_to_save=[r"text_encoder\.embeddings.*", "text_encoder.embeddings", "itm_head"])
    assert wrapped.heads == [wrapped.text_encoder.embeddings, wrapped.itm_head]


# Files


def test_an_adapter_folder_builds_the_model_again(tmp_path: Path):
    wrapped = activate(model(base={"pretrained": tiny_config_weights()})).eval()
    save_adapter(wrapped, tmp_path / "adapter", name="default")
    loaded, vis, txt = load_model_and_preprocess("mode_approx", adapter=tmp_path / "adapter", is_eval=True)
    assert vis["eval"] and txt["eval"]
    image = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        ours, theirs = (m.visual_encoder.forward_features(image) for m in (wrapped, loaded))
        assert torch.equal(ours, theirs)
        # The teacher starts as the adapter.
        assert torch.equal(loaded.visual_encoder_m.forward_features(image), theirs)
    again, _, _ = load_model_and_preprocess("mode_approx", "blip_retrieval_aurora/tiny", adapter=tmp_path / "adapter")
    assert torch.equal(again.visual_encoder.forward_features(image), ours)


def tiny_config_weights() -> str:
    return OmegaConf.load(registry.get_model_class(BASE["arch"]).default_config_path("tiny")).model.pretrained


def test_the_merged_state_is_that_of_the_plain_base():
    wrapped = activate(model()).eval()
    state = merged_state_dict(wrapped)
    plain = tiny_model(tuning="full", queue_size=16).eval()
    plain.load_state_dict(state)
    image = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        ours, theirs = (m.visual_encoder.forward_features(image) for m in (wrapped, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        ours, theirs = (m.visual_encoder_m.forward_features(image) for m in (wrapped, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_copies_stand_alone():
    wrapped = activate(model()).eval()
    twin = copy.deepcopy(wrapped)
    image = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        before = wrapped.visual_encoder.forward_features(image)
        for parameter in twin.mode_approx.parameters():
            parameter.zero_()
        assert torch.equal(wrapped.visual_encoder.forward_features(image), before)
        assert not torch.equal(twin.visual_encoder.forward_features(image), before)
    assert twin.model_pairs[-1][0] is twin.mode_approx.sets["default"]


# Runs


@pytest.mark.parametrize("task", ["retrieval_aurora", pytest.param("retrieval", marks=pytest.mark.slow)])
def test_a_project_trains_evaluates_and_resumes(tmp_path: Path, task: str):
    path = project_yaml(tmp_path, count=4, run={"task": task, "max_epoch": 1, "k_test": 2})
    project = OmegaConf.load(path)
    project.model = config()
    OmegaConf.save(project, path)
    train(["--cfg-path", str(path)])
    [run] = (tmp_path / "output").iterdir()
    state = read_checkpoint(run / "checkpoint_best.pth")["model"]
    assert state and all(key.startswith("base.mode_approx.sets.") for key in state)
    assert {key.split(".")[3] for key in state} == {"default", "momentum"}
    assert (run / "adapter_best" / "adapter_config.json").is_file()
    resolved = OmegaConf.load(run / "config.yaml")
    assert resolved.model.base.vit.embed_dim == 128
    latest = run / "checkpoint_latest.pth"
    train(["--cfg-path", str(path), "--options", "run.max_epoch=2", f"run.resume_ckpt_path={latest}"])
    assert len(list((tmp_path / "output").iterdir())) == 2


def test_importing_the_presets_needs_no_torch():
    code = (
        "import importlib.util as u, sys; "
        "s = u.spec_from_file_location('p', 'lavis_aurora/mode_approx/presets.py'); m = u.module_from_spec(s); "
        "s.loader.exec_module(m); assert 'torch' not in sys.modules and m.PRESETS['clip']"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
