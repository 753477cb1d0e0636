"""YAMLs: every shipped one builds, every key is checked, and the paper's settings are stated."""

from __future__ import annotations

import json
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
from lavis.common.registry import registry
from lavis.common.utils import get_abs_path
from omegaconf import DictConfig, OmegaConf
from tiny import project_yaml, tiny_config

from lavis_aurora.config import (
    CONTEXT_FORMS,
    GATE_FORMS,
    GATE_INITS,
    TUNINGS,
    ContextConfig,
    GateConfig,
    ModeApproxConfig,
    RetrievalAuroraConfig,
    RunConfig,
    VitConfig,
)
from lavis_aurora.config_check import parse_config
from lavis_aurora.errors import AuroraError
from lavis_aurora.paths import PACKAGE_ROOT
from lavis_aurora.project import AuroraConfig, load_config

ROOT = Path(__file__).resolve().parents[1]
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
    _refused(ROOT / f"projects/aurora/{project}.yaml", "model.adapter: ", "output/coco_ret/adapter_best")


def test_defaults_are_lavis_own() -> None:
    own = OmegaConf.load(get_abs_path("configs/models/blip_retrieval_coco.yaml")).model
    settings = RetrievalAuroraConfig()
    for key in ("vit_type", "image_size", "embed_dim", "queue_size", "med_config_path"):
        assert getattr(settings, key) == own[key], key


# Keys


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return project_yaml(tmp_path, count=1)


def _refused(path: Path, *parts: str, options: list[str] | None = None) -> str:
    """The one-line error of loading, which names the file and all of ``parts``."""
    with pytest.raises(AuroraError) as caught:
        load_config(str(path), options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    for part in parts:
        assert part in message
    return message


UNKNOWN_KEYS = [
    ("model.tunning", "tuning"),
    ("model.quee_size", "queue_size"),
    ("model.mode_aprox", "mode_approx"),
    ("model.mode_approx.rnk", "rank"),
    ("model.mode_approx.scal", "scale"),
    ("model.gate.from", "form"),
    ("model.context.forms", "form"),
    ("model.vit.pach_size", "patch_size"),
    ("model.vit.dept", "depth"),
    ("run.max_epochs", "max_epoch"),
    ("run.itcweight", "itc_weight"),
    ("run.batch_size", "batch_size_train"),
]


@pytest.mark.parametrize(("key", "near"), UNKNOWN_KEYS, ids=[key for key, _ in UNKNOWN_KEYS])
@pytest.mark.parametrize("where", ["yaml", "options"])
def test_unknown_key_gets_the_nearest_valid_name(project: Path, where: str, key: str, near: str) -> None:
    if where == "yaml":
        config = OmegaConf.load(project)
        OmegaConf.update(config, key, 1, force_add=True)
        OmegaConf.save(config, project)
    message = _refused(project, f"{key}: unknown key", options=[f"{key}=1"] if where == "options" else None)
    assert repr(near) in message.partition("did you mean ")[2]


def test_unknown_key_without_a_near_name_gets_all_names(project: Path) -> None:
    _refused(project, "model.gate.zzz: unknown key; known: form, init", options=["model.gate.zzz=1"])


def test_unknown_section_gets_the_nearest_name(project: Path) -> None:
    config = OmegaConf.load(project)
    config.runn = config.pop("run")
    OmegaConf.save(config, project)
    _refused(project, "runn: unknown section; did you mean 'run'?")


def test_unknown_section_in_options_gets_the_nearest_name(project: Path) -> None:
    _refused(project, "--options modle: unknown section; did you mean 'model'?", options=["modle.tuning=full"])


@pytest.mark.parametrize("section", ["model", "datasets", "run"])
def test_missing_section_is_named(project: Path, section: str) -> None:
    config = OmegaConf.load(project)
    del config[section]
    OmegaConf.save(config, project)
    _refused(project, f"{section}: the section is missing")


UNREGISTERED = [
    ("model.arch", "blip_retrieval_auror", "blip_retrieval_aurora"),
    ("run.task", "retrieval_auror", "retrieval_aurora"),
    ("run.runner", "runner_auror", "runner_aurora"),
    ("run.lr_sched", "linear_warmup_cosine", "linear_warmup_cosine_lr"),
    ("model.model_type", "tinny", "tiny"),
    ("datasets.coco_retrieval.type", "defaults", "default"),
    ("datasets.coco_retrieval.vis_processor.train.name", "blip_image_trian", "blip_image_train"),
    ("datasets.coco_retrieval.text_processor.eval.name", "blip_captoin", "blip_caption"),
]


@pytest.mark.parametrize(("key", "value", "near"), UNREGISTERED, ids=[row[0] for row in UNREGISTERED])
@pytest.mark.parametrize("where", ["yaml", "options"])
def test_unregistered_name_gets_the_nearest_one(project: Path, where: str, key: str, value: str, near: str) -> None:
    if where == "yaml":
        config = OmegaConf.load(project)
        OmegaConf.update(config, key, value, force_add=True)
        OmegaConf.save(config, project)
    message = _refused(project, key, repr(value), options=[f"{key}={value}"] if where == "options" else None)
    assert f"did you mean {near!r}" in message


@pytest.mark.parametrize("where", ["yaml", "options"])
def test_unregistered_dataset_gets_the_nearest_one(project: Path, where: str) -> None:
    options = ["datasets.coco_retrival.type=default"]
    if where == "yaml":
        config = OmegaConf.load(project)
        config.datasets.coco_retrival = config.datasets.pop("coco_retrieval")
        OmegaConf.save(config, project)
        options = []
    _refused(project, "datasets.coco_retrival", "did you mean 'coco_retrieval'", options=options)


# Values


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.mode_approx.rank", "abc"),
        ("model.mode_approx.rank", "1.5"),
        ("model.mode_approx.rank", "null"),
        ("model.mode_approx.scale", "big"),
        ("model.mode_approx", "3"),
        ("model.gate", "residual"),
        ("model.context", "[1]"),
        ("model.vit", "base"),
        ("model.vit.depth", "[3]"),
        ("model.image_size", "48px"),
        ("model.train_heads", "maybe"),
        ("model.queue_size", "many"),
        ("model.tuning.form", "aurora"),
        ("run.max_epoch", "six"),
        ("run.init_lr", "fast"),
        ("run.amp", "2.5"),
        ("run.train_splits", "train"),
        ("run.seed", "{a: 1}"),
    ],
)
def test_wrong_type_names_the_key(project: Path, key: str, value: str) -> None:
    named = key.rpartition(".")[0] if key == "model.tuning.form" else key
    _refused(project, f"{named}: ", options=[f"{key}={value}"])


OUT_OF_RANGE = [
    ("model.mode_approx.rank", "0", "1 or more"),
    ("model.mode_approx.rank", "-4", "1 or more"),
    ("model.mode_approx.scale", "0", "above 0"),
    ("model.mode_approx.scale", "-1.5", "above 0"),
    ("model.mode_approx.scale", "nan", "above 0"),
    ("model.gate.form", "residul", "did you mean 'residual'"),
    ("model.gate.init", "zero", "did you mean 'zeros'"),
    ("model.context.form", "atention", "did you mean 'attention'"),
    ("model.vit.patch_size", "0", "1 or more"),
    ("model.vit.embed_dim", "0", "1 or more"),
    ("model.vit.depth", "0", "1 or more"),
    ("model.vit.num_heads", "-1", "1 or more"),
    ("model.vit.num_heads", "3", "a multiple of vit.num_heads (3)"),
    ("model.tuning", "auror", "did you mean 'aurora'"),
    ("model.vit_type", "huge", "known: base, large"),
    ("model.image_size", "0", "1 or more (pixels)"),
    ("model.image_size", "50", "a multiple of the patch size (16)"),
    ("model.max_txt_len", "1", "2 or more (tokens)"),
    ("model.load_finetuned", "true", "model.finetuned: missing although model.load_finetuned is true"),
    ("model.queue_size", "-1", "0 (no queue) or more"),
    ("model.embed_dim", "0", "1 or more"),
    ("model.alpha", "-0.1", "between 0 and 1"),
    ("model.alpha", "1.1", "between 0 and 1"),
    ("model.momentum", "-0.1", "between 0 and 1"),
    ("model.momentum", "1.5", "between 0 and 1"),
    ("run.device", "tpu9", "known: auto, cpu, cuda"),
    ("run.max_broken_share", "-0.1", "between 0 and 1"),
    ("run.max_broken_share", "1.1", "between 0 and 1"),
    ("run.token_dtype", "float16", "did you mean 'bfloat16'"),
    ("run.token_budget_gb", "-1", "0 or more"),
    *[
        (f"run.{key}", "0", "1 or more")
        for key in ("max_epoch", "accum_grad_iters", "batch_size_train", "batch_size_eval", "log_freq")
    ],
    *[
        (f"run.{key}", "-1", "0 or more")
        for key in ("init_lr", "min_lr", "weight_decay", "grad_clip", "num_workers", "k_test", "warmup_steps")
    ],
]


@pytest.mark.parametrize(("key", "value", "need"), OUT_OF_RANGE, ids=[f"{k}={v}" for k, v, _ in OUT_OF_RANGE])
def test_value_out_of_range_names_key_value_and_need(project: Path, key: str, value: str, need: str) -> None:
    named = {"model.load_finetuned": "model.finetuned"}.get(key, key.replace("model.mode_approx.", "mode_approx."))
    named = named.replace("model.gate.", "gate.").replace("model.context.", "context.")
    named = "vit.embed_dim" if "multiple of vit" in need else named.replace("model.vit.", "vit.")
    _refused(project, f"{named}: ", need, options=[f"{key}={value}"])


def test_image_size_without_vit_must_fit_lavis_patches() -> None:
    with pytest.raises(AuroraError, match=r"model.image_size: 200 .* a multiple of the patch size \(16\)"):
        RetrievalAuroraConfig(image_size=200)


def test_picture_size_of_a_processor_must_be_the_models(project: Path) -> None:
    _refused(
        project,
        "datasets.coco_retrieval.vis_processor.train.image_size: 48 is not model.image_size, 64",
        options=["model.image_size=64"],
    )


def test_step_scheduler_needs_a_decay_rate(project: Path) -> None:
    options = ["run.lr_sched=linear_warmup_step_lr"]
    _refused(project, "run.lr_decay_rate", options=options)
    assert load_config(str(project), [*options, "run.lr_decay_rate=0.9"]).run_cfg.lr_decay_rate == 0.9


def test_unknown_interpolation_names_its_key(project: Path) -> None:
    _refused(project, "run.output_dir", "nowhere", options=["run.output_dir=${nowhere}"])


def test_limits_themselves_are_allowed() -> None:
    for form in GATE_FORMS:
        for init in GATE_INITS:
            assert GateConfig(form, init).form == form
    assert [ContextConfig(form).form for form in CONTEXT_FORMS] == list(CONTEXT_FORMS)
    assert ModeApproxConfig(rank=1, scale=1e-6).rank == 1
    assert VitConfig(1, 1, 1, 1).depth == 1
    for tuning in TUNINGS:
        settings = RetrievalAuroraConfig(tuning=tuning, queue_size=0, alpha=0, momentum=1, max_txt_len=2)
        assert settings.tuning == tuning
    assert RunConfig(max_epoch=1, num_workers=0, k_test=0, init_lr=0, grad_clip=0).k_test == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": "/no/such/folder"}, "model.tokenizer"),
        ({"tokenizer": str(ROOT / "tests")}, "model.tokenizer: the folder .* holds no vocab.txt"),
        ({"tokenizer": "no-such-tokenizer"}, "model.tokenizer: cannot load 'no-such-tokenizer'"),
        ({"med_config_path": "/no/such/med_config.json"}, "model.med_config_path: .*/no/such/med_config.json"),
        ({"max_txt_len": 65}, "model.max_txt_len: 65 tokens do not fit the 64 positions"),
        ({"vit": {"embed_dim": 64}}, "model.med_config_path: .* encoder_width 128.*64 wide"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_named_when_building(change: dict, message: str) -> None:
    cfg = tiny_config(**change)
    with pytest.raises(AuroraError, match=message):
        registry.get_model_class(cfg.arch).from_config(cfg)


@pytest.mark.parametrize("content", ["{", "{}", '{"vocab_size": 100}'])
def test_med_config_that_cannot_be_used_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "med.json"
    path.write_text(content)
    cfg = tiny_config(med_config_path=str(path))
    with pytest.raises(AuroraError, match=f"model.med_config_path: .*{path}"):
        registry.get_model_class(cfg.arch).from_config(cfg)


def test_vocabulary_larger_than_the_embeddings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "med.json"
    small = json.loads(Path(tiny_config().med_config_path).read_text()) | {"vocab_size": 401}
    path.write_text(json.dumps(small))
    cfg = tiny_config(med_config_path=str(path))
    with pytest.raises(AuroraError, match=r"model.tokenizer: .* has 402 tokens .* has vocab_size 401"):
        registry.get_model_class(cfg.arch).from_config(cfg)


# Options


@pytest.mark.parametrize("options", [["model.model_type=large"], ["model.model_type", "large"]])
def test_model_type_in_options_loads_that_types_defaults(project: Path, options: list[str]) -> None:
    cfg = load_config(str(project), options)
    large = OmegaConf.load(registry.get_model_class("blip_retrieval_aurora").default_config_path("large"))
    own = OmegaConf.load(project).model
    for key, value in large.model.items():
        expected = own[key] if key in own and key != "model_type" else value
        assert cfg.model_cfg[key] == expected, key
    assert cfg.model_cfg.vit_type == "large" and cfg.model_cfg.get("vit") is None
    processor = cfg.datasets_cfg.coco_retrieval.vis_processor.train
    assert processor == large.preprocess.vis_processor.train


def test_dataset_type_in_options_loads_that_types_defaults(project: Path) -> None:
    config = OmegaConf.load(project)
    config.datasets = {"demo_retrieval": {"type": "default"}}
    OmegaConf.save(config, project)
    assert load_config(str(project)).datasets_cfg.demo_retrieval.build_info.domain == "shifted"
    cfg = load_config(str(project), ["datasets.demo_retrieval.type=clean"])
    assert cfg.datasets_cfg.demo_retrieval.build_info.domain == "clean"


def test_model_type_defaults_to_the_models_default(project: Path) -> None:
    config = OmegaConf.load(project)
    del config.model["model_type"]
    OmegaConf.save(config, project)
    assert load_config(str(project)).model_cfg.model_type == "base"


def test_options_override_the_yaml_which_overrides_the_type(project: Path) -> None:
    config = OmegaConf.load(project)
    config.model.mode_approx = {"rank": 5, "scale": 2.0}
    OmegaConf.save(config, project)
    cfg = load_config(str(project), ["model.mode_approx.rank=7", "run.max_epoch=9"])
    assert cfg.model_cfg.mode_approx == {"rank": 7, "scale": 2.0}
    assert (cfg.run_cfg.max_epoch, cfg.run_cfg.k_test) == (9, OmegaConf.load(project).run.k_test)
    assert cfg.model_cfg.embed_dim == 64
    assert isinstance(cfg, AuroraConfig)


@pytest.mark.parametrize(
    "options", [["run.max_epoch"], ["run.max_epoch", "2", "run.seed"], ["run.max_epoch=2", "run.seed", "3"]]
)
def test_option_without_a_value_is_refused(project: Path, options: list[str]) -> None:
    message = _refused(project, "--options", options=options)
    assert any(option in message for option in options)


def test_evaluate_skips_training_whatever_the_yaml_says(project: Path) -> None:
    assert load_config(str(project), evaluate=True).run_cfg.evaluate is True
    assert load_config(str(project)).run_cfg.evaluate is False
    assert load_config(str(project), ["run.evaluate=true"]).run_cfg.evaluate is True


def test_run_section_is_complete_after_loading(project: Path) -> None:
    run = load_config(str(project)).run_cfg
    assert set(run) == {f.name for f in fields(RunConfig)}
    assert (run.beta2, run.itc_weight, run.seed) == (0.999, 1.0, 42)
