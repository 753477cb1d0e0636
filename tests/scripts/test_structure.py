"""The structure of a made-up package, of which everything is known."""

from __future__ import annotations

from pathlib import Path

import pytest
from structure import beyond, measure

# Files by path. Room a is handed on by b's __init__; c alone does more than that.
TREE = {
    "lavis_aurora/__init__.py": '"""Doc."""\n',
    "lavis_aurora/a/__init__.py": "",
    "lavis_aurora/a/one.py": "import os\n\n\ndef f():\n    x = 1\n    return x\n",
    "lavis_aurora/a/two.py": "from .one import f\n",
    "lavis_aurora/b/__init__.py": '"""Doc."""\nfrom lavis_aurora.a.one import f as g\n\n__all__ = ["g"]\n',
    "lavis_aurora/b/low.py": "def deep():\n    from lavis_aurora.a import two\n    return two\n",
    "lavis_aurora/b/high.py": "from lavis_aurora.b import g, low\n",
    "lavis_aurora/c/__init__.py": "import lavis_aurora.b.high\nREADY = True\n",
    "lavis_aurora/cli.py": (
        "from typing import TYPE_CHECKING\n"
        "from lavis_aurora.b import g\n"
        "if TYPE_CHECKING:\n    from lavis_aurora.c import READY\n"
    ),
    "cli_entry.py": "def main():\n    from lavis_aurora.cli import g\n    return g\n",
    "train.py": "from cli_entry import main\n",
    "scripts/helper.py": "from lavis_aurora.c import READY\n",
    "scripts/program.py": "import helper\nfrom helper import READY\n",
}


def write(folder: Path, tree: dict[str, str]) -> Path:
    for name, content in tree.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def test_rooms_floors_and_chain_of_a_known_tree(tmp_path: Path) -> None:
    found = measure(write(tmp_path, TREE))
    assert found.floors == {
        "lavis_aurora/__init__.py": 1,
        "lavis_aurora/a": 1,
        "lavis_aurora/b": 2,
        # Not above c, which it imports for types alone; nor above b, of which it only has what a handed to it.
        "lavis_aurora/cli.py": 2,
        "lavis_aurora/c": 3,
        "cli_entry.py": 3,
        "scripts": 4,
        "train.py": 4,
    }
    assert found.chain == [f"lavis_aurora.{name}" for name in ("c", "b.high", "b.low", "a.two", "a.one")]
    assert found.circles == [] == beyond(found)
    assert found.figures["modules"] == 9 and found.figures["rooms"] == 8 and found.figures["floors"] == 4
    assert found.figures["imports for types"] == 1
    assert found.figures["longest function"] == 3 and found.longest["longest function"] == "cli_entry:main"
    assert found.figures["longest module"] == 6 and found.longest["longest module"] == "lavis_aurora.a.one"


@pytest.mark.parametrize(
    ("path", "content", "circle"),
    [
        ("lavis_aurora/a/one.py", "from lavis_aurora.a import two\n", ["lavis_aurora.a.one", "lavis_aurora.a.two"]),
        # Between rooms, where no module stands in a circle.
        ("lavis_aurora/a/one.py", "import lavis_aurora.cli\n", ["lavis_aurora.a.one", "lavis_aurora.cli"]),
        ("lavis_aurora/a/new.py", "import cli_entry\n", ["cli_entry.py", "lavis_aurora/cli.py", "lavis_aurora/a"]),
    ],
)
def test_circles_are_found(tmp_path: Path, path: str, content: str, circle: list[str]) -> None:
    found = measure(write(tmp_path, {**TREE, path: content}))
    assert any(set(circle) == set(one) for one in found.circles)
    assert any(line.startswith("imports in a circle: ") for line in beyond(found))


def test_what_is_too_long_is_named(tmp_path: Path) -> None:
    long = "def long():\n" + "    x = 1\n" * 400
    found = measure(write(tmp_path, {**TREE, "scripts/helper.py": long}))
    assert beyond(found) == ["longest module: 401, at most 350", "longest function: 401, at most 60"]
    assert found.longest == {"longest module": "scripts.helper", "longest function": "scripts.helper:long"}


def test_this_package_is_within_its_limits() -> None:
    assert beyond(measure()) == []
