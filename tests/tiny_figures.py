"""Tables and runs to draw, for any test."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from tiny import project_yaml
from tiny_vqa import vqa_project

from lavis_aurora.analysis.drawing import Plot
from lavis_aurora.analysis.results import write_table
from lavis_aurora.models.blip_retrieval_aurora import BlipRetrievalAurora
from lavis_aurora_cli import train


def arguments(plot: Plot, *given: str | Path) -> argparse.Namespace:
    """Command line arguments of a plot, parsed."""
    parser = argparse.ArgumentParser()
    plot.add_arguments(parser)
    return parser.parse_args([str(one) for one in given])


def sweep_table(path: Path, key: str, values: dict[str, list[float]]) -> Path:
    """A sweep's csv: R@1 of each seed is given, R@5 and R@10 are 10 and 20 more."""
    cells: list[tuple[dict[str, str], dict[str, Any]]] = []
    for value, seeds in values.items():
        for seed, r1 in enumerate(seeds):
            metrics = {f"{way}_r{k}": r1 + more for way in WAYS for k, more in ((1, 0), (5, 10), (10, 20))}
            result = {"status": "done", "seconds": 1.0, "metrics": {"test": {**metrics, "agg_metrics": r1 + 10}}}
            cells.append(({key: value, "run.seed": str(seed)}, result))
    write_table(cells, path)
    return path


WAYS = ("image_to_text", "text_to_image")


@pytest.fixture(scope="session")
def retrieval_runs(tmp_path_factory) -> dict[str, Path]:
    """Folders of runs of a tiny retrieval by model.tuning, from the weights that come with the package."""
    folder = tmp_path_factory.mktemp("retrieval")
    weights = OmegaConf.load(BlipRetrievalAurora.default_config_path("tiny")).model.pretrained
    yaml = project_yaml(folder, model={"pretrained": weights}, run={"init_lr": 1e-2})
    runs = {}
    for tuning in ("aurora", "full"):
        output = folder / tuning
        train(["--cfg-path", str(yaml), "--options", f"model.tuning={tuning}", f"run.output_dir={output}"])
        [runs[tuning]] = output.iterdir()
    return runs


@pytest.fixture(scope="session")
def answer_runs(tmp_path_factory) -> list[Path]:
    """Folders of two runs of a tiny question answering."""
    folder = tmp_path_factory.mktemp("answers")
    yaml = vqa_project(folder)
    for seed in (1, 2):
        options = ["run.test_splits=[val]", f"run.seed={seed}", f"run.output_dir={folder / 'output'}"]
        train(["--cfg-path", str(yaml), "--options", *options])
    return sorted((folder / "output").iterdir())


def with_candidates(run: Path) -> dict[str, Any]:
    """Write ranked candidates into a run's result file, unless it holds them; returns its content."""
    path = run / "result" / "test_epoch_best.json"
    result = json.loads(path.read_text())
    ids = [[(text + i) % 8 for i in (1, 0, 2, 3)] for text in range(8)]
    result.setdefault("candidates", {"text_to_image": {"ids": ids}})
    path.write_text(json.dumps(result))
    return result
