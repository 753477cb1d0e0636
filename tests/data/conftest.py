"""Published annotations in small, and their numbers."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lavis_aurora.data.convert import PUBLISHED


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set the published numbers of a split to those of a small one."""

    def change(name: str, **counts: int) -> None:
        monkeypatch.setitem(PUBLISHED, name, PUBLISHED[name]._replace(counts=counts))

    return change


@pytest.fixture
def msrvtt(tmp_path: Path) -> list[str]:
    """Arguments: both files of a set of 6 + 2 + 4 videos with 3 sentences each, and a csv of two test videos."""
    splits = ["train"] * 6 + ["validate"] * 2 + ["test"] * 4
    for name, chosen in (("train_val", range(8)), ("test", range(8, 12))):
        videos = [{"video_id": f"video{i}", "split": splits[i], "url": "u", "category": 1, "id": i} for i in chosen]
        sentences = [
            {"caption": f"sentence {s} of {i}", "video_id": f"video{i}", "sen_id": 3 * i + s}
            for s in range(3)
            for i in chosen
        ] + [{"caption": " ", "video_id": f"video{i}", "sen_id": 900 + i} for i in chosen]
        content = {"info": {"year": "2016"}, "videos": videos, "sentences": sentences}
        (tmp_path / f"{name}_videodatainfo.json").write_text(json.dumps(content))
    with (tmp_path / "test.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "vid_key", "video_id", "sentence"])
        writer.writerow(["ret0", "msr9", "video9", "one, with a comma"])
        writer.writerow(["ret1", "msr11", "video11", "another"])
    files = [str(tmp_path / f"{name}_videodatainfo.json") for name in ("train_val", "test")]
    return ["msrvtt", *files, "--test-csv", str(tmp_path / "test.csv"), "--output", str(tmp_path / "out")]
