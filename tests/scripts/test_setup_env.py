"""scripts/setup_env.sh with interpreters and a uv that only note how they are called."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INPUTS = ("scripts/setup_env.sh", "setup.cfg", "constraints.txt", "pyproject.toml", "requirements")
TOOLS = ("bash", "cat", "cksum", "cp", "dirname", "mkdir", "mv", "rm", "tail")
CALLS = "calls.txt"
PYTHON = """#!/bin/bash
if [ "$1" = -c ]; then echo {version}; exit; fi
echo "python{version} $*" >>{calls}
if [ "$2" = venv ]; then mkdir -p "${{@: -1}}/bin"; cp "$0" "${{@: -1}}/bin/python"; fi
"""
UV = """#!/bin/bash
if [ "$1" = cache ]; then echo /the/cache; exit; fi
echo "uv $*" >>{calls}
if [ "$1" = venv ]; then mkdir -p "${{@: -1}}/bin"; cp {folder}/fetched "${{@: -1}}/bin/python"; fi
"""
Setup = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    """Run it on a machine that has these Pythons, and uv or not."""
    for name in INPUTS:
        target = tmp_path / "project" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, target)

    def run(*versions: str, uv: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
        folder = tmp_path / "bin"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for tool in TOOLS:
            (folder / tool).symlink_to(shutil.which(tool) or tool)
        calls = tmp_path / CALLS
        programs = {f"python{version}": PYTHON.format(version=version, calls=calls) for version in versions}
        programs["fetched"] = PYTHON.format(version="3.11", calls=calls)
        if uv:
            programs["uv"] = UV.format(calls=calls, folder=folder)
        for name, text in programs.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        calls.write_text("")
        command = [str(folder / "bash"), str(tmp_path / "project/scripts/setup_env.sh")]
        return subprocess.run(command, capture_output=True, text=True, env={"PATH": str(folder), **environment})

    return run


def _calls(tmp_path: Path) -> list[str]:
    return (tmp_path / CALLS).read_text().splitlines()


@pytest.mark.parametrize("version", ["3.9", "3.11", "3.12", "3.13"])
def test_any_supported_python_is_enough(tmp_path: Path, setup: Setup, version: str) -> None:
    done = setup(version)
    assert done.returncode == 0, done.stderr
    assert "3 GB" in done.stdout and "uv" in done.stdout
    calls = _calls(tmp_path)
    assert calls[0] == f"python{version} -m venv --clear .venv"
    assert [call.partition("--no-input ")[2] for call in calls[1:]] == [
        "--upgrade pip>=24",
        "-e .[dev] -c constraints.txt",
        "--no-deps salesforce-lavis transformers peft -c constraints.txt",
    ]


def test_what_is_installed_is_not_installed_again_until_its_inputs_change(tmp_path: Path, setup: Setup) -> None:
    assert setup("3.12").returncode == 0
    assert setup("3.12").stdout == "" and not _calls(tmp_path)
    with (tmp_path / "project/requirements/minimal.txt").open("a") as file:
        file.write("another\n")
    assert "installing" in setup("3.12").stdout


def test_uv_installs_where_it_is_and_its_cache_is_named(tmp_path: Path, setup: Setup) -> None:
    done = setup("3.12", uv=True)
    assert "/the/cache, which grows by about" in done.stdout
    assert _calls(tmp_path) == [
        f"uv venv --quiet --seed --clear --python {tmp_path}/bin/python3.12 .venv",
        "uv pip install --python .venv/bin/python --compile-bytecode -c constraints.txt "
        "-e .[dev] salesforce-lavis transformers peft",
    ]


@pytest.mark.parametrize("versions", [(), ("3.8",), ("3.14",)])
def test_uv_fetches_python_where_there_is_no_suitable_one(
    tmp_path: Path, setup: Setup, versions: tuple[str, ...]
) -> None:
    assert setup(*versions, uv=True).returncode == 0
    assert _calls(tmp_path)[0] == "uv venv --quiet --seed --clear --managed-python --python 3.11 .venv"


def test_without_python_and_uv_the_error_names_both(setup: Setup) -> None:
    done = setup()
    assert done.returncode == 1
    assert "no Python 3.9 to 3.13 on PATH" in done.stderr and "install uv" in done.stderr


def test_the_environment_and_the_interpreter_can_be_chosen(tmp_path: Path, setup: Setup) -> None:
    done = setup("3.9", "3.13", PYTHON="python3.13", VENV=str(tmp_path / "other"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "other/installed.stamp").is_file() and not (tmp_path / "project/.venv").exists()
    done = setup("3.9", "3.13", PYTHON="python3.9", VENV=str(tmp_path / "other"))
    assert done.returncode == 1 and "holds Python 3.13" in done.stderr
