"""YAMLs: every shipped one builds, and the paper's settings are stated."""

from __future__ import annotations

import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
from lavis.common.registry import registry
from lavis.common.utils import get_abs_path
from omegaconf import DictConfig, OmegaConf
from tiny import refused, tiny_config

from lavis_aurora.common.paths import PACKAGE_ROOT
from lavis_aurora.config.check import parse_config
from lavis_aurora.config.models import RetrievalAuroraConfig
from lavis_aurora.project import AuroraConfig, load_config

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [ROOT / "projects", PACKAGE_ROOT / "configs"]
YAMLS = sorted(path for folder in FOLDERS for path in folder.rglob("*.yaml"))
PROJECTS = [path for path in YAMLS if "projects" in path.parts]
MODELS = [path for path in YAMLS if path.parent.name == "models"]
DATASETS = [path for path in YAMLS if path.parent.name == "datasets"]
SIZES = ("image_size", "vit", "vit_grad_ckpt", "vit_ckpt_layer", "med_config_path", "tokenizer", "embed_dim")


def _name(path: Path) -> str:
    return path.stem


def _load(path: Path) -> AuroraConfig:
    """A project without the adapter that it is to evaluate, which has to be made first."""
    return load_config(str(path), ["model.adapter=null"] if OmegaConf.load(path).model.get("adapter") else None)


def _registered(kind: str, name: str) -> type:
    known = registry.mapping[kind]
    assert name in known, f"{name} is not among {sorted(known)}"
    return known[name]


def _build_tiny(model_cfg: DictConfig) -> None:
    """Build the model of a YAML at the size of type tiny, with random weights, all else as configured."""
    cls = _registered("model_name_mapping", model_cfg.arch)
    if "base" in model_cfg:
        base = OmegaConf.merge(model_cfg.base, _tiny_sizes(_registered("model_name_mapping", model_cfg.base.arch)))
        model = cls.from_config(OmegaConf.merge(model_cfg, {"base": base}))
    else:
        model = cls.from_config(OmegaConf.merge(model_cfg, {"vit": None}, _tiny_sizes(cls)))
    assert type(model) is cls
    assert any(p.requires_grad for p in model.parameters()) or model_cfg.get("tuning") == "frozen"


def _tiny_sizes(cls: type) -> dict:
    """Sizes of type tiny, as far as a model has them, and random weights."""
    keys = {f.name for f in fields(cls.CONFIG_CLASS)}
    tiny = {key: value for key, value in tiny_config().items() if key in keys.intersection(SIZES)}
    tiny |= {"pretrained": None, "finetuned": None, "load_finetuned": False}
    if "queue_size" in keys:
        tiny["queue_size"] = 8
    return tiny


def _check_processors(section: DictConfig) -> None:
    for kind in ("vis_processor", "text_processor"):
        assert set(section[kind]) == {"train", "eval"}
        for processor in section[kind].values():
            _registered("processor_name_mapping", processor.name).from_config(processor)


# Every YAML


def test_every_yaml_is_found_and_of_one_kind() -> None:
    found = subprocess.run(
        ["find", *map(str, FOLDERS), "-name", "*.y*ml"], check=True, capture_output=True, text=True
    ).stdout.split()
    assert sorted(found) == sorted(map(str, YAMLS))
    assert len(YAMLS) > 5
    assert sorted(PROJECTS + MODELS + DATASETS) == YAMLS
    assert PROJECTS and MODELS and DATASETS


@pytest.mark.parametrize("path", PROJECTS, ids=_name)
def test_project_loads_names_registered_things_and_builds(path: Path) -> None:
    cfg = _load(path)
    for key, kind in (("task", "task"), ("runner", "runner"), ("lr_sched", "lr_scheduler")):
        _registered(f"{kind}_name_mapping", cfg.run_cfg[key])
    assert cfg.datasets_cfg
    splits: set[str] = set()
    for name, dataset in cfg.datasets_cfg.items():
        _registered("builder_name_mapping", name)
        _check_processors(dataset)
        splits |= set(dataset.build_info.annotations)
    assert {*cfg.run_cfg.train_splits, *cfg.run_cfg.valid_splits, *cfg.run_cfg.test_splits} <= splits
    assert not Path(cfg.run_cfg.output_dir).is_absolute()
    _build_tiny(cfg.model_cfg)


@pytest.mark.parametrize("path", [path for path in MODELS if path.stem != "mode_approx_default"], ids=_name)
def test_model_yaml_is_a_registered_type_and_builds(path: Path) -> None:
    config = OmegaConf.load(path)
    assert set(config) == {"model", "preprocess"}
    cls = _registered("model_name_mapping", config.model.arch)
    assert cls.default_config_path(config.model.model_type) == str(path)
    _check_processors(config.preprocess)
    settings = parse_config(cls.CONFIG_CLASS, config.model, "model")
    assert {p.image_size for p in config.preprocess.vis_processor.values()} == {settings.image_size}
    _build_tiny(config.model)


def test_the_yaml_of_mode_approx_leaves_the_base_to_its_user() -> None:
    [path] = [path for path in MODELS if path.stem == "mode_approx_default"]
    config = OmegaConf.load(path)
    assert set(config) == {"model"} and "base" not in config.model
    _build_tiny(OmegaConf.merge(config.model, {"base": {"arch": "blip_retrieval_aurora", "model_type": "base"}}))


def test_every_registered_model_type_has_its_yaml() -> None:
    ours = [cls for cls in registry.mapping["model_name_mapping"].values() if hasattr(cls, "CONFIG_CLASS")]
    stated = [path for cls in ours for path in cls.PRETRAINED_MODEL_CONFIG_DICT.values()]
    assert sorted(stated) == sorted(map(str, MODELS))
    assert all(cls.DEFAULT_MODEL_TYPE in cls.PRETRAINED_MODEL_CONFIG_DICT for cls in ours)


@pytest.mark.parametrize("path", DATASETS, ids=_name)
def test_dataset_yaml_is_a_type_of_a_registered_builder(path: Path) -> None:
    (name, section), *others = OmegaConf.load(path).datasets.items()
    assert not others
    builder = _registered("builder_name_mapping", name)
    assert str(path) in map(get_abs_path, builder.DATASET_CONFIG_DICT.values())
    assert section.build_info[section.data_type].storage
    for info in section.build_info.annotations.values():
        assert info.storage
    builder(section)


# The paper's settings


@pytest.mark.parametrize(("project", "k_test"), [("coco_ret", 256), ("flickr_ret", 128)])
def test_retrieval_projects_have_the_papers_settings(project: str, k_test: int) -> None:
    cfg = load_config(str(ROOT / f"projects/aurora/{project}.yaml"))
    run, model = cfg.run_cfg, cfg.model_cfg
    assert model.arch == "blip_retrieval_aurora" and model.model_type == "base" and model.image_size == 384
    for dataset in cfg.datasets_cfg.values():
        assert {p.image_size for p in dataset.vis_processor.values()} == {384}
    assert (run.batch_size_train, run.max_epoch, run.k_test) == (16, 6, k_test)
    assert (run.init_lr, run.weight_decay, run.lr_sched) == (1e-4, 0.05, "linear_warmup_cosine_lr")
    settings = parse_config(RetrievalAuroraConfig, model, "model")
    assert (settings.tuning, settings.mode_approx.rank) == ("aurora", 64)
    assert settings.pretrained and settings.pretrained.endswith("BLIP/models/model_base.pth")


VIDEO = [
    ("msrvtt_ret", "msrvtt_retrieval", 224, 8, 5),
    ("didemo_ret", "didemo_retrieval", 224, 8, 5),
    ("msrvtt_qa", "msrvtt_qa_aurora", 384, 4, 10),
    ("zeroshot_msrvtt", "msrvtt_retrieval", 224, None, None),
    ("zeroshot_didemo", "didemo_retrieval", 224, None, None),
]


@pytest.mark.parametrize(("project", "dataset", "size", "batch", "epochs"), VIDEO, ids=[row[0] for row in VIDEO])
def test_video_projects_have_the_papers_settings(
    project: str, dataset: str, size: int, batch: int | None, epochs: int | None
) -> None:
    cfg = _load(ROOT / f"projects/aurora/{project}.yaml")
    run, model, processors = cfg.run_cfg, cfg.model_cfg, cfg.datasets_cfg[dataset].vis_processor
    assert list(cfg.datasets_cfg) == [dataset]
    assert model.model_type == "base" and model.image_size == size
    assert {split: (p.name, p.n_frms, p.image_size) for split, p in processors.items()} == {
        "train": ("aurora_video_train", 8, size),
        "eval": ("aurora_video_eval", 16, size),
    }
    if batch is None:
        assert run.evaluate and not run.train_splits and run.k_test == 128
        return
    assert (run.batch_size_train, run.max_epoch, model.mode_approx.rank) == (batch, epochs, 64)
    assert (run.init_lr, run.weight_decay, run.lr_sched) == (1e-4, 0.05, "linear_warmup_cosine_lr")
    if project == "msrvtt_qa":
        assert (run.task, run.inference_method, run.num_beams) == ("video_qa_aurora", "generate", 1)
    else:
        assert (run.task, run.k_test) == ("retrieval_aurora", 128)


@pytest.mark.parametrize("project", ["zeroshot_msrvtt", "zeroshot_didemo"])
def test_zero_shot_projects_need_an_adapter(project: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(ROOT / f"projects/aurora/{project}.yaml", "model.adapter: ", "output/coco_ret/adapter_best")
