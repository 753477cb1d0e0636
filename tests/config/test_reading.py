"""Strings stay as they are written, and no nesting overturns the reader."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tiny import project_yaml, refused

from lavis_aurora.analysis.results import read_config
from lavis_aurora.config.check import MAX_NESTING, TEXT_KEYS, read_options, read_yaml
from lavis_aurora.project import load_config

# Numbers, truth values and more in YAML 1.1.
ODD_NAMES = ["2023_11_26", "1e3", "on", "yes", "true", "08", "010", "12:30", "0x10", "1_000.5", ".inf", "1e400", "="]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_folder_is_called_what_is_written(tmp_path: Path, name: str) -> None:
    project = project_yaml(tmp_path, count=1)
    options = [f"run.output_dir={name}", f"model.pretrained={name}", f"run.test_splits=[{name}]"]
    storage = "datasets.coco_retrieval.build_info.images.storage"
    cfg = load_config(str(project), [*options, f"{storage}={name}"])
    found = [cfg.run_cfg.output_dir, cfg.model_cfg.pretrained, *cfg.run_cfg.test_splits]
    assert [*found, OmegaConf.select(cfg.config, storage)] == [name] * 4


@pytest.mark.parametrize("name", [name for name in ODD_NAMES if name != "="])
def test_so_it_is_in_a_yaml_and_in_what_a_run_writes(tmp_path: Path, name: str) -> None:
    project = project_yaml(tmp_path, count=1)
    lines = [line for line in project.read_text().splitlines() if "output_dir" not in line]
    project.write_text("\n".join([*lines, f"  output_dir: {name}"]))
    cfg = load_config(str(project))
    assert cfg.run_cfg.output_dir == name
    OmegaConf.save(cfg.config, tmp_path / "config.yaml")
    assert read_config(tmp_path).run.output_dir == name


def test_what_is_no_string_is_read_as_ever() -> None:
    options = ["run.max_epoch=1_0", "run.amp=on", "run.init_lr=1e-4", "run.resume_ckpt_path=null", "model.adapter="]
    run = read_options([*options, "model.gate={form: none, init: 'ones'}", "run.output_dir='on'", "run.device=${x}"])
    assert OmegaConf.to_container(run) == {
        "run": {
            **{"max_epoch": 10, "amp": True, "init_lr": 1e-4, "resume_ckpt_path": None},
            **{"output_dir": "on", "device": "${x}"},
        },
        "model": {"adapter": None, "gate": {"form": "none", "init": "ones"}},
    }
    assert {"output_dir", "pretrained", "form", "storage"} <= TEXT_KEYS
    assert not {"rank", "amp", "init_lr", "model", "gate"} & TEXT_KEYS


def test_the_projects_read_as_omegaconf_has_them() -> None:
    for path in (Path(__file__).parents[2] / "projects" / "aurora").glob("*.yaml"):
        assert read_yaml(path) == OmegaConf.load(path), path


@pytest.mark.parametrize("depth", [MAX_NESTING + 1, 1000, 1_000_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ("- ", ""), ("{a: ", "}")])
def test_nesting_is_bounded(tmp_path: Path, depth: int, opening: str, closing: str) -> None:
    """libyaml's composer would end the process."""
    path = tmp_path / "project.yaml"
    path.write_text(opening * depth + "1" + closing * depth)
    assert refused(path) == f"{path}: nested more than {MAX_NESTING} deep"


@pytest.mark.parametrize(
    "option", ["run.output_dir=!x", "model.tokenizer=!!python/name:x y", "run.train_splits=[!x a]"]
)
def test_a_tag_is_no_value(tmp_path: Path, option: str) -> None:
    """Of which an empty string would be left."""
    refused(project_yaml(tmp_path, count=1), "unknown tag ", "begins with ! in quotes", options=[option])


def test_nesting_of_options_is_bounded(tmp_path: Path) -> None:
    refused(project_yaml(tmp_path, count=1), "nested more than", options=[f"model.gate={'[' * 60000}"])


def test_yaml_at_the_bound_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("[" * MAX_NESTING + "]" * MAX_NESTING)
    assert read_yaml(path) is not None
