"""Every YAML of LAVIS and of this package passes; a key that nothing reads does not."""

from __future__ import annotations

from pathlib import Path

import lavis
import pytest
from lavis.common.config import Config
from lavis.common.registry import registry
from lavis.processors.base_processor import BaseProcessor
from omegaconf import DictConfig, OmegaConf
from runs import ON_MAIN

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.config.dataset_keys import check_dataset_keys, check_processor_keys, default_section

LAVIS = Path(lavis.__file__).parent
OF_LAVIS = ("configs/datasets/*/*.yaml", "configs/models/**/*.yaml", "projects/**/*.yaml")
YAMLS = sorted({path for pattern in OF_LAVIS for path in LAVIS.glob(pattern)})
BUILDERS = registry.mapping["builder_name_mapping"]
# Their default YAML is none in LAVIS's main branch.
UNREADABLE = {"scienceqa", "vatex_caption_instruct"} | {
    f"vsr_{kind}" for kind in ("caption", "caption_instruct", "classification", "classification_instruct")
}
PROCESSORS = registry.mapping["processor_name_mapping"]


def types() -> list[tuple[str, str]]:
    """Builders and their types; of some, LAVIS ships no YAML."""
    builders = [(name, cls) for name, cls in BUILDERS.items() if not (ON_MAIN and name in UNREADABLE)]
    pairs = [(name, kind) for name, cls in builders for kind in cls.DATASET_CONFIG_DICT]
    return [(name, kind) for name, kind in pairs if Path(BUILDERS[name].default_config_path(kind)).is_file()]


def merged(name: str, cfg: dict | DictConfig) -> DictConfig:
    """A dataset's part of a YAML over its defaults, as LAVIS merges it; some of its YAMLs name another dataset."""
    datasets = Config.build_dataset_config(OmegaConf.create({"datasets": {name: cfg}})).datasets
    return OmegaConf.merge(*datasets.values())


def check_processors(section: DictConfig) -> int:
    """Checks those that are registered; returns their number."""
    parts = [part for kind in ("vis_processor", "text_processor") for part in (section.get(kind) or {}).values()]
    known = [part for part in parts if part and part.get("name") in PROCESSORS]
    for part in known:
        check_processor_keys(part, "key")
    return len(known)


@pytest.mark.parametrize(("name", "kind"), types())
def test_defaults_of_every_builder_pass(name: str, kind: str) -> None:
    check_dataset_keys(name, merged(name, {"type": kind}))


def test_the_datasets_of_the_paper_are_among_them() -> None:
    needed = "coco_retrieval flickr30k msrvtt_retrieval didemo_retrieval msrvtt_qa msrvtt_qa_aurora coco_vqa vg_vqa"
    assert {*needed.split()} <= {name for name, _ in types()}


@pytest.mark.slow
@pytest.mark.skipif(ON_MAIN, reason="main has files that are no YAML, and keys in them that nothing reads")
def test_every_yaml_of_lavis_passes() -> None:
    datasets = processors = 0
    for path in YAMLS:
        cfg = OmegaConf.load(path)
        for name, part in (cfg.get("datasets") or {}).items():
            if part is not None and name in BUILDERS:
                kind = part.get("type", "default")
                if (name, kind) in types():
                    check_dataset_keys(name, merged(name, part))
                    datasets += 1
            processors += check_processors(part or {})
        processors += check_processors(cfg.get("preprocess") or {})
    assert datasets > 50 and processors > 100, "the files were not found"


def test_a_default_yaml_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "default.yaml"
    path.write_text("datasets:\n  coco_vqa:\n    a: 1\n  b: [\n")
    monkeypatch.setattr(BUILDERS["coco_vqa"], "DATASET_CONFIG_DICT", {"default": str(path)})
    with pytest.raises(AuroraError, match=r"^datasets.coco_vqa: its default YAML cannot be read: .*default.yaml"):
        default_section("coco_vqa", OmegaConf.create())


@pytest.mark.parametrize("name", sorted(PROCESSORS))
def test_a_processor_reads_the_keys_that_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its constructor's arguments are what its from_config asks for."""

    asked = set()

    class Asked(dict):
        def get(self, key, default=None):
            asked.add(key)
            return default

    cls = PROCESSORS[name]
    if hasattr(cls, "CONFIG_CLASS"):
        pytest.skip("checks itself")
    with monkeypatch.context() as patch:
        # What is built from the keys is another matter, and some of LAVIS's would be downloaded.
        patch.setattr(cls, "__init__", lambda self, **_: None)
        cls.from_config(Asked())
    assert asked
    check_processor_keys(OmegaConf.create({"name": name, **dict.fromkeys(asked, 1)}), "key")
    with pytest.raises(AuroraError, match="^key.zzz: unknown key"):
        check_processor_keys(OmegaConf.create({"name": name, "zzz": 1}), "key")


def test_a_processor_that_takes_its_section_as_a_whole_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Whole(BaseProcessor):
        def __init__(self, cfg):
            super().__init__()

    class Any(BaseProcessor):
        def __init__(self, **keys):
            super().__init__()

    for cls in (Whole, Any):
        monkeypatch.setitem(PROCESSORS, "of_others", cls)
        check_processor_keys(OmegaConf.create({"name": "of_others", "zzz": 1}), "key")


VIDEO, DEMO = "datasets.msrvtt_retrieval", "datasets.demo_retrieval"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "msrvtt_retrieval",
            {"build_info": {"video": {}}},
            f"{VIDEO}.build_info.video: unknown key; did you mean 'v",
        ),
        (
            "msrvtt_qa",
            {"build_info": {"annotations": {"ans2labels": {}}}},
            "ans2labels: unknown key; did you mean 'an",
        ),
        (
            "coco_vqa",
            {"build_info": {"annotations": {"ans2label": {}}}},
            "annotations.ans2label: unknown key; known: ",
        ),
        ("demo_retrieval", {"build_info": {"sed": 1}}, f"{DEMO}.build_info.sed: unknown key; did you mean 'seed'"),
        (
            "demo_retrieval",
            {"build_info": {"annotations": {"val": {"counts": 1}}}},
            "val.counts: unknown key; did you",
        ),
        ("coco_vqa", {"build_info": {"annotations": {"val": {"count": 1}}}}, "val.count: unknown key; known: md5"),
        ("coco_vqa", {"build_info": 3}, "datasets.coco_vqa.build_info: must be a section of keys, not 3"),
        ("coco_vqa", {"vis_processor": {"train": 3}}, "vis_processor.train: must be a section of keys, not 3"),
    ],
)
def test_keys_that_nothing_reads(name: str, change: dict, message: str) -> None:
    with pytest.raises(AuroraError) as caught:
        check_dataset_keys(name, merged(name, change))
    assert message in str(caught.value)


@pytest.mark.parametrize("content", ["model: {}", "datasets: {a: {}, b: {}}"])
def test_a_default_yaml_of_a_builder_holds_one_dataset(
    tmp_path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    path = tmp_path / "defaults.yaml"
    path.write_text(content)
    cls = registry.get_builder_class("demo_retrieval")
    monkeypatch.setattr(cls, "default_config_path", classmethod(lambda cls, type: str(path)))
    with pytest.raises(AuroraError, match="defaults.yaml: the default YAML of demo_retrieval must hold one dataset"):
        check_dataset_keys("demo_retrieval", OmegaConf.create({}))
