"""scripts/test_matrix.sh, and every place that says which Pythons are supported."""

from __future__ import annotations

import configparser
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from lavis_aurora_doctor import NEWEST_TORCH, PYTHONS

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/test_matrix.sh"
VERSIONS = ["3.9", "3.10", "3.11", "3.12", "3.13"]


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_its_tests_are_there() -> None:
    named = re.findall(r"tests/[\w./]+", SCRIPT.read_text().partition("LAWS=(")[2].partition(")")[0])
    assert len(named) > 5
    assert all((ROOT / name).exists() for name in named)


@pytest.mark.parametrize(("arguments", "said"), [([], "usage:"), (["--all"], "usage:"), (["3.11"], "pip install uv")])
def test_what_it_needs_is_said(tmp_path: Path, arguments: list[str], said: str) -> None:
    for tool in ("bash", "dirname"):
        (tmp_path / tool).symlink_to(f"/bin/{tool}" if Path(f"/bin/{tool}").exists() else f"/usr/bin/{tool}")
    command = [str(tmp_path / "bash"), str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert done.returncode == 2 and said in done.stderr


def test_supported_pythons_are_the_same_everywhere() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert re.findall(r"Python :: (3\.\d+)", config["metadata"]["classifiers"]) == VERSIONS
    assert config["options"]["python_requires"] == ">=3.9,<3.14"
    assert tuple(".".join(map(str, version)) for version in PYTHONS) == (VERSIONS[0], VERSIONS[-1])
    assert " | ".join(VERSIONS) in _text("scripts/setup_env.sh")
    workflow = yaml.safe_load(_text(".github/workflows/stacks.yml"))["jobs"]["stack"]
    assert workflow["strategy"]["matrix"]["python"] == VERSIONS
    assert "bash scripts/test_matrix.sh" in str(workflow["steps"])
    assert "bash scripts/test_matrix.sh" in _text("Dockerfile")


def test_torch_is_capped_at_the_newest_tested() -> None:
    major, minor = NEWEST_TORCH
    assert f"torch>=2.6,<{major}.{minor + 1}\n" in _text("requirements/minimal.txt")
    assert f"torch=={major}.{minor}." in _text("constraints.txt")
