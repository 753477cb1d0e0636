"""A project YAML: its sections, the names in it, ``--options`` over it, and ``model.adapter``."""

from __future__ import annotations

import re
from pathlib import Path

import lavis
import pytest
from lavis.common.registry import registry
from omegaconf import OmegaConf
from tiny import project_yaml, refused, tiny_model
from tiny_vqa import vqa_model

from lavis_aurora import AuroraError, load_model_and_preprocess, save_adapter
from lavis_aurora.common.paths import package_file
from lavis_aurora.config.adapter_settings import check_towers
from lavis_aurora.project import AuroraConfig, load_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return project_yaml(tmp_path, count=1)


# Sections and names


def test_unknown_section_gets_the_nearest_name(project: Path) -> None:
    config = OmegaConf.load(project)
    config.runn = config.pop("run")
    OmegaConf.save(config, project)
    refused(project, "runn: unknown section; did you mean 'run'?")


def test_unknown_section_in_options_gets_the_nearest_name(project: Path) -> None:
    refused(project, "--options modle: unknown section; did you mean 'model'?", options=["modle.tuning=full"])


@pytest.mark.parametrize("section", ["model", "datasets", "run"])
def test_missing_section_is_named(project: Path, section: str) -> None:
    config = OmegaConf.load(project)
    del config[section]
    OmegaConf.save(config, project)
    refused(project, f"{section}: the section is missing")


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
    message = refused(project, key, repr(value), options=[f"{key}={value}"] if where == "options" else None)
    assert f"did you mean {near!r}" in message


@pytest.mark.parametrize("where", ["yaml", "options"])
def test_unregistered_dataset_gets_the_nearest_one(project: Path, where: str) -> None:
    options = ["datasets.coco_retrival.type=default"]
    if where == "yaml":
        config = OmegaConf.load(project)
        config.datasets.coco_retrival = config.datasets.pop("coco_retrieval")
        OmegaConf.save(config, project)
        options = []
    refused(project, "datasets.coco_retrival", "did you mean 'coco_retrieval'", options=options)


def test_picture_size_of_a_processor_must_be_the_models(project: Path) -> None:
    key = "datasets.coco_retrieval.vis_processor.train.image_size"
    said = f"{key}: 48 is not model.image_size, 64; leave it out to follow that"
    refused(project, said, options=["model.image_size=64", f"{key}=48"])
    config = OmegaConf.load(project)
    config.preprocess = {"vis_processor": {"eval": {"name": "blip_image_eval", "image_size": 32}}}
    OmegaConf.save(config, project)
    refused(project, "preprocess.vis_processor.eval.image_size: 32 is not model.image_size, 48")


PROJECTS = Path(__file__).resolve().parents[1] / "projects" / "aurora"


@pytest.mark.parametrize("path", sorted(PROJECTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_processors_follow_the_models_picture_size(path: Path, tmp_path: Path) -> None:
    """Of every project: keys that the YAML does not hold are nothing to trip over."""
    options, inside = [], "base." * ("base" in OmegaConf.load(path).model)
    if path.stem.startswith("zeroshot"):
        save_adapter(tiny_model(), tmp_path)
        options = [f"model.adapter={tmp_path}", "model.model_type=tiny"]
    for dataset in load_config(str(path), [f"model.{inside}image_size=96", *options]).datasets_cfg.values():
        assert {processor.image_size for processor in dataset.vis_processor.values()} == {96}


@pytest.mark.parametrize("name", ["blip_image_eval", "aurora_video_eval", "clip_image_eval", "blip2_image_train"])
def test_a_processor_that_is_named_without_a_size_follows_too(project: Path, name: str) -> None:
    """Its own default would be 384, or 224."""
    cfg = load_config(str(project), [f"datasets.coco_retrieval.vis_processor.eval.name={name}"])
    assert cfg.datasets_cfg.coco_retrieval.vis_processor.eval.image_size == 48


LAVIS_PROJECTS = Path(lavis.__file__).parent / "projects"


def swapped(tmp_path: Path, path: str, arch: str) -> Path:
    """A YAML of LAVIS with nothing but the name of the model changed."""
    config = OmegaConf.load(LAVIS_PROJECTS / path)
    config.model.arch = arch
    OmegaConf.save(config, tmp_path / "swapped.yaml")
    return tmp_path / "swapped.yaml"


@pytest.mark.parametrize("path", ["blip/train/retrieval_coco_ft", "albef/train/vqa_ft", "blip/train/caption_coco_ft"])
def test_only_the_name_swapped_for_mode_approx_shows_the_lines_to_write(tmp_path: Path, path: str) -> None:
    plain = OmegaConf.load(LAVIS_PROJECTS / f"{path}.yaml").model
    yaml = swapped(tmp_path, f"{path}.yaml", "mode_approx")
    message = refused(yaml, "model.model_type: unknown type", "write 'arch: mode_approx' and 'base: {")
    assert plain.arch in message
    config = OmegaConf.load(yaml)
    shown = re.search("'(base: {.*})'", message)[1].replace("ARCH", plain.arch)
    config.model = OmegaConf.merge({"arch": "mode_approx"}, OmegaConf.create(shown))
    OmegaConf.save(config, yaml)
    cfg = load_config(str(yaml))
    assert cfg.model_cfg.base == OmegaConf.merge(
        OmegaConf.load(registry.get_model_class(plain.arch).default_config_path(plain.model_type)).model, plain
    )


def test_a_type_that_only_lavis_has_is_shown_inside_mode_approx(tmp_path: Path) -> None:
    yaml = swapped(tmp_path, "blip/train/okvqa_ft.yaml", "blip_vqa_aurora")
    base = "{arch: blip_vqa, model_type: okvqa, load_finetuned: false, image_size: 480}"
    refused(yaml, "unknown type 'okvqa'; known: base", f"write 'arch: mode_approx' and 'base: {base}' below model")


@pytest.mark.parametrize("evaluate", [False, True])
@pytest.mark.parametrize(
    ("path", "arch", "rate"),
    [
        ("blip/train/retrieval_coco_ft.yaml", "blip_retrieval_aurora", "2e-05"),
        ("blip/train/vqav2_ft.yaml", "blip_vqa_aurora", "2e-05"),
        ("blip/train/retrieval_flickr_ft.yaml", "blip_retrieval_aurora", "1e-05"),
        ("blip/train/retrieval_coco_ft.yaml", "blip_retrieval", None),  # the whole model
    ],
)
def test_full_tunings_rate_is_said(
    tmp_path: Path, path: str, arch: str, rate: str | None, evaluate: bool, caplog: pytest.LogCaptureFixture
) -> None:
    yaml = swapped(tmp_path, path, arch)
    load_config(str(yaml), evaluate=evaluate)
    said = [record.getMessage() for record in caplog.records if "run.init_lr" in record.getMessage()]
    note = f"run.init_lr: {rate} is a rate for training a whole model; adapters are trained at 0.0001"
    assert said == ([f"{note} (run.init_lr=0.0001)"] if rate and not evaluate else [])
    caplog.clear()
    for options in (["run.init_lr=1e-4"], ["model.tuning=full"] if arch != "blip_retrieval" else []):
        load_config(str(yaml), options)
    assert not [record for record in caplog.records if "whole model" in record.getMessage()]


def test_unknown_interpolation_names_its_key(project: Path) -> None:
    refused(project, "run.output_dir", "nowhere", options=["run.output_dir=${nowhere}"])


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


def test_a_mapping_given_empty_is_empty(project: Path) -> None:
    written = OmegaConf.load(project)
    written.run.lr_scales = {"heads": 0.1}
    OmegaConf.save(written, project)
    assert load_config(str(project)).run_cfg.lr_scales == {"heads": 0.1}
    assert load_config(str(project), ["run.lr_scales={}"]).run_cfg.lr_scales == {}
    assert load_config(str(project), ["run.lr_scales.gate=2"]).run_cfg.lr_scales == {"heads": 0.1, "gate": 2}


def test_an_option_may_refer_to_what_the_yaml_says(project: Path) -> None:
    run = load_config(str(project), ["run.output_dir=output/top_${run.k_test}", "run.lr_scales={}"]).run_cfg
    assert run.output_dir == f"output/top_{run.k_test}"


@pytest.mark.parametrize(
    "options", [["run.max_epoch"], ["run.max_epoch", "2", "run.seed"], ["run.max_epoch=2", "run.seed", "3"]]
)
def test_option_without_a_value_is_refused(project: Path, options: list[str]) -> None:
    message = refused(project, "--options", options=options)
    assert any(option in message for option in options)


def test_evaluate_skips_training_whatever_the_yaml_says(project: Path) -> None:
    assert load_config(str(project), evaluate=True).run_cfg.evaluate is True
    assert load_config(str(project)).run_cfg.evaluate is False
    assert load_config(str(project), ["run.evaluate=true"]).run_cfg.evaluate is True


# model.adapter


@pytest.fixture
def adapter(tmp_path):
    save_adapter(tiny_model(mode_approx={"rank": 5}, gate={"form": "affine"}), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_settings_of_the_adapter_stand_in_for_those_left_out(tmp_path, adapter):
    model = load_config(str(project_yaml(tmp_path)), [f"model.adapter={adapter}"]).model_cfg
    assert (model.mode_approx.rank, model.gate.form) == (5, "affine")
    assert model.queue_size == 16


FILE = ".*tiny/adapter/adapter_config.json"


def test_an_adapter_of_other_towers_names_its_type():
    """Before anything is fetched; a type of the same towers is fine."""
    tiny, project = package_file("configs/models/tiny/adapter"), ROOT / "projects/aurora/flickr_ret.yaml"
    with pytest.raises(
        AuroraError,
        match=rf"model.adapter: {FILE}: it is of the type tiny, .*; set model.model_type=tiny$",
    ):
        load_config(str(project), [f"model.adapter={tiny}"])
    said = ["model.model_type=tiny", f"model.adapter={tiny}"]
    assert load_config(str(project), said).model_cfg.adapter == str(tiny)
    name = "blip_retrieval_aurora"
    with pytest.raises(
        AuroraError, match=r"adapter_config.json: it is of the type tiny, .* of base; set model_type=tiny$"
    ):
        load_model_and_preprocess(name, "base", adapter=tiny)
    check_towers(name, "base", {"arch": name, "model_type": "coco"}, {})


def test_settings_of_the_yaml_are_kept(tmp_path, adapter):
    """What contradicts the adapter is refused when it is loaded, with both values."""
    yaml = project_yaml(tmp_path, model={"mode_approx": {"rank": 6}})
    model = load_config(str(yaml), [f"model.adapter={adapter}"]).model_cfg
    assert (model.mode_approx.rank, model.gate.form) == (6, "affine")
    with pytest.raises(AuroraError, match="mode_approx.rank is 5 there and 6 here"):
        tiny_model(mode_approx={"rank": 6}, gate={"form": "affine"}, adapter=str(adapter), adapter_check_base=False)


def test_share_decoder_belongs_to_an_adapter_of_question_answering(tmp_path):
    save_adapter(vqa_model(share_decoder=False), tmp_path / "adapter")
    model = {"arch": "blip_vqa_aurora", "queue_size": None}
    yaml = project_yaml(tmp_path, model=model)
    text = yaml.read_text().replace("  queue_size: null\n", "")
    yaml.write_text(text)
    assert load_config(str(yaml), [f"model.adapter={tmp_path / 'adapter'}"]).model_cfg.share_decoder is False


def test_a_folder_that_is_none_is_said_before_anything_is_built(tmp_path):
    yaml = project_yaml(tmp_path)
    with pytest.raises(AuroraError, match=f"project.yaml: model.adapter: {tmp_path} is no adapter folder"):
        load_config(str(yaml), [f"model.adapter={tmp_path}"])


def test_paths_may_start_at_home(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell replaces ``~`` in a YAML, or behind the = of an option."""
    monkeypatch.setenv("HOME", "/home/me")
    images = "datasets.coco_retrieval.build_info.images.storage"
    train = "datasets.coco_retrieval.build_info.annotations.train"
    options = ["model.tokenizer=~/vocabulary", "run.output_dir=~/out", f"{images}=~/images", "run.prompt=~ {}"]
    options += [f"{train}.storage=[~/a.json,b.json]", f"{train}.url=[x,y]", "model.pretrained=~/blip.pth"]
    config = OmegaConf.load(project)
    config.model.med_config_path = "~/med.json"
    OmegaConf.save(config, project)
    cfg = load_config(str(project), options)
    model, info = cfg.model_cfg, cfg.datasets_cfg.coco_retrieval.build_info
    assert [
        model.tokenizer,
        model.med_config_path,
        model.pretrained,
        cfg.run_cfg.output_dir,
        info.images.storage,
    ] == [f"/home/me/{name}" for name in ("vocabulary", "med.json", "blip.pth", "out", "images")]
    assert list(info.annotations.train.storage) == ["/home/me/a.json", "b.json"]
