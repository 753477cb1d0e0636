"""What a run left, for tests."""

from __future__ import annotations

import json
from pathlib import Path


def only_run(tmp_path: Path) -> Path:
    """The folder of the single run so far."""
    [folder] = (tmp_path / "output").iterdir()
    return folder


def logged(folder: Path, key: str) -> list[dict]:
    """Lines of log.txt that hold ``key``; the configuration comes first and is no line."""
    lines = [line for line in (folder / "log.txt").read_text().splitlines() if line.startswith('{"')]
    return [entry for entry in map(json.loads, lines) if key in entry]
