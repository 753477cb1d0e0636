"""``lavis-aurora compare``: measured results beside the paper's, and what differs in the set-up."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from omegaconf import DictConfig, OmegaConf

from lavis_aurora.analysis.paper import label, paper_rows, paper_tables, setup_differences
from lavis_aurora.analysis.results import final_metrics, numbers_of, read_config, tuned_model
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.files import read_json
from lavis_aurora.common.summary import SUMMARY, Summary, read_summary

RESULT_FILE = re.compile(r"(?P<split>.+)_epoch_(?P<epoch>[^_]+)(_vqa_result|_accuracy)?\.json")
# Methods of the paper by model.tuning; a rank is that of the section of this name.
METHODS = {
    "aurora": "Aurora",
    "lora": "LoRA",
    "uniadapter": "UniAdapter",
    "full": "BLIP",
    "mode_approx": "mode approximation alone",
}
RANKS = {"aurora": "mode_approx", "mode_approx": "mode_approx", "lora": "lora", "uniadapter": "uniadapter"}
ZERO_SHOT = {"aurora": "BLIP + Aurora", "lora": "BLIP + LoRA", "uniadapter": "BLIP + UniAdapter", "frozen": "BLIP"}
# Metrics that stand beside others.
BESIDE = re.compile("chance|_itc_|_lavis_")
QUESTIONS = ("coco_vqa", "msrvtt_qa_aurora")
COLUMN_TITLES = {"test_dev": "test-dev", "test_std": "test-std", "accuracy": "accuracy"}


@dataclass
class Measured:
    """A result of a run.

    Attributes:
        path: file or folder it was read from.
        config: of the run.
        split: that was tested.
        metrics: percent, by the names of the tasks.
        counts: ``images`` or ``videos``, ``texts``, ``questions`` of the split, as far as known.
    """

    path: Path
    config: DictConfig
    split: str
    metrics: dict[str, float]
    counts: dict[str, int]


def read_measured(path: str | Path) -> list[Measured]:
    """Results of a run's folder, one for each tested split, or the one of a result file.

    Raises:
        AuroraError: it is neither, or holds no metrics.
    """
    path = Path(path)
    if path.is_dir():
        config, tested, sizes = read_config(path), final_metrics(path), read_summary(path)["data"]
        if not tested:
            raise AuroraError(f"{path}: its {SUMMARY} holds no test; let the run end, or name a result file")
        return [
            Measured(path, config, split, metrics, _counts(sizes.get(split), metrics))
            for split, metrics in tested.items()
        ]
    match = RESULT_FILE.fullmatch(path.name)
    if not match or not path.is_file():
        raise AuroraError(f"{path}: name the folder of a run, or a file of its folder result")
    run, split = path.absolute().parent.parent, match["split"]
    content = read_json(path)
    metrics = numbers_of(content.get("metrics") if isinstance(content, dict) else None)
    if metrics:
        return [Measured(path, read_config(run), split, metrics, _counts(content, metrics))]
    try:
        summary = read_summary(run)
    except AuroraError as error:
        raise AuroraError(f"{path}: holds no metrics, and its run's {SUMMARY} cannot be read: {error}") from error
    metrics = numbers_of(_metrics_of_epoch(summary, split, match["epoch"]))
    if not metrics:
        raise AuroraError(f"{path}: neither it nor {run / SUMMARY} holds metrics of {split}")
    return [Measured(path, read_config(run), split, metrics, _counts(summary["data"].get(split), metrics))]


def _metrics_of_epoch(summary: Summary, split: str, epoch: str) -> Optional[dict[str, Any]]:
    """Metrics of a split after an epoch. Those of the test are of the best epoch, or, without validations, of any."""
    for one in summary["validation"]:
        if (one["split"], str(one["epoch"])) == (split, epoch):
            return one["metrics"]
    return summary["metrics"].get(split) if epoch == "best" or not summary["validation"] else None


def _counts(sizes: Any, metrics: dict[str, float]) -> dict[str, int]:
    """How many images or videos and texts, or questions, were tested.

    Args:
        sizes: of the split, as far as known.
        metrics: of the split; those of answers have ``questions``.
    """
    known = numbers_of(sizes)
    counts = {key: int(known[key]) for key in ("images", "videos", "texts") if key in known}
    if not counts and "questions" in metrics:
        counts["questions"] = int(metrics["questions"])
    return counts


def benchmark_of(measured: Measured) -> Optional[str]:
    """The paper's benchmark that the run's data are; None if they are none of them."""
    known = [name for name in measured.config.get("datasets", {}) if name in paper_tables()["benchmarks"]]
    return known[0] if known else None


def table_of(config: DictConfig, benchmark: str) -> str:
    """The table of a benchmark; that of zero-shot results for runs that only test."""
    zero_shot = config.run.get("evaluate") and not config.run.get("train_splits")
    if zero_shot and benchmark in paper_tables()["tables"]["4"]["rows"][0]["results"]:
        return "4"
    return paper_tables()["benchmarks"][benchmark]["table"]


def run_label(config: DictConfig) -> str:
    """Method and rank of a run, in the paper's words where it has some."""
    tuning = tuned_model(config).tuning
    name = METHODS.get(tuning, tuning)
    rank = OmegaConf.select(config, f"model.{RANKS[tuning]}.rank") if tuning in RANKS else None
    return f"{name} (r={rank})" if rank is not None else name


def matching_row(measured: Measured, table: str, rows: Sequence[dict[str, Any]]) -> Optional[dict[str, Any]]:
    """The paper's row of the run's method and rank."""
    tuning = tuned_model(measured.config).tuning
    if table == "4":
        return next((row for row in rows if row["method"] == ZERO_SHOT.get(tuning)), None)
    return next((row for row in rows if label(row) == run_label(measured.config)), None)


def run_values(measured: Measured, benchmark: str, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Measured values under the paper's names; an accuracy of another split has a name of its own."""
    if benchmark in QUESTIONS:
        if "agg_metrics" not in measured.metrics:
            raise AuroraError(
                f"{measured.path}: the answers to {measured.split} were not scored, since the true ones are not "
                f"known here; the official server scores them"
            )
        name = "accuracy" if benchmark == "msrvtt_qa_aurora" and measured.split == "test" else measured.split
        return {name: measured.metrics["agg_metrics"]}
    names = list(dict.fromkeys(name for row in rows for name in row["values"]))
    # Of texts that several images share, the paper counts as LAVIS does.
    counted = {name: "_lavis_r".join(name.rsplit("_r", 1)) for name in names}
    known = ((name, measured.metrics.get(lavis, measured.metrics.get(name))) for name, lavis in counted.items())
    return {name: value for name, value in known if value is not None}


def comparison(measured: Measured, benchmark: Optional[str] = None, table: Optional[str] = None) -> dict[str, Any]:
    """One result beside the paper's.

    Args:
        measured: the result.
        benchmark: of the paper; that of the run's data by default.
        table: of the paper; that of the benchmark by default.

    Returns:
        ``data``, ``benchmark`` and ``table`` (None if the paper has none), ``columns``, ``rows`` of the paper,
        ``method`` and ``values`` measured, ``gaps`` to the paper's row of the same method and rank, ``setup``.
    """
    benchmark = benchmark or benchmark_of(measured)
    own = {"method": run_label(measured.config), "path": str(measured.path), "split": measured.split}
    own["data"] = ", ".join(measured.config.get("datasets", {}))
    if benchmark is None:
        values = {key: value for key, value in measured.metrics.items() if not BESIDE.search(key)}
        return {**own, "benchmark": None, "table": None, "columns": list(values), "rows": [], "values": values}
    if benchmark not in paper_tables()["benchmarks"]:
        raise AuroraError(f"--benchmark {benchmark}: known: {', '.join(paper_tables()['benchmarks'])}")
    table = table or table_of(measured.config, benchmark)
    rows = paper_rows(table, benchmark)
    values = run_values(measured, benchmark, rows)
    like = matching_row(measured, table, rows)
    known = {} if like is None else {key: value for key, value in like["values"].items() if value is not None}
    return {
        **own,
        "benchmark": benchmark,
        "table": table,
        "columns": list(dict.fromkeys([*(name for row in rows for name in row["values"]), *values])),
        "rows": [{"method": label(row), "tunable": row["tunable"], "values": row["values"]} for row in rows],
        "values": values,
        "like": None if like is None else label(like),
        "gaps": {key: value - known[key] for key, value in values.items() if key in known},
        "setup": setup_differences(measured.config, measured.split, measured.counts, benchmark, table),
    }


def report(result: dict[str, Any]) -> str:
    """A comparison as text."""
    columns = result["columns"]
    if result["table"] is None:
        known = ", ".join(paper_tables()["benchmarks"])
        lines = [
            f"{result['path']}: the paper has no row for {result['data']}, which is none of its benchmarks; "
            f"--benchmark compares nevertheless with {known}"
        ]
        return "\n".join([*lines, *(f"  {key:<30}{result['values'][key]:8.2f}" for key in columns)])
    paper = paper_tables()
    name, title = paper["benchmarks"][result["benchmark"]]["name"], paper["tables"][result["table"]]["title"]
    # Two lines of column heads: what is sought among what, and the metric.
    groups, metrics = zip(*(_column_titles(column) for column in columns))
    places = 2 if result["benchmark"] == "coco_vqa" else 1
    shown = [group if i == 0 or groups[i - 1] != group else "" for i, group in enumerate(groups)]
    lines = [f"{name}, table {result['table']} of the paper ({title}); percent, MdR is the median rank"]
    lines += [f"{'':<34}" + "".join(f"{text:>10}" for text in row) for row in (shown, metrics)]

    def line(title: str, values: dict[str, Any], sign: str = "") -> str:
        cells = [f"{values[c]:{sign}.{places}f}" if values.get(c) is not None else "-" for c in columns]
        return f"{title:<34}" + "".join(f"{cell:>10}" for cell in cells)

    lines += [line(row["method"], row["values"]) for row in result["rows"]]
    lines.append(line(f"measured: {result['method']}", result["values"]))
    if result["gaps"]:
        lines.append(line(f"measured - paper's {result['like']}", result["gaps"], "+"))
    else:
        lines.append(f"the paper has no figure of {result['method']} on {result['split']} to compare with")
    lines += [f"  ({note})" for note in paper["tables"][result["table"]]["notes"]]
    lines += ["", f"set-up of {result['path']}:", f"  {'':<24}{'here':<44}paper"]
    lines += [f"  {key:<24}{here!s:<44}{there}" for key, here, there in result["setup"]]
    return "\n".join(lines)


def _column_titles(column: str) -> tuple[str, str]:
    """(direction, metric) of a column, short."""
    match = re.fullmatch(r"(image|text|video)_to_(image|text|video)_(.+)", column)
    if not match:
        return "", COLUMN_TITLES.get(column, column)
    direction = f"{match[1][0]}->{match[2][0]}".upper()
    return direction, {"median_rank": "MdR"}.get(match[3], f"R@{match[3][1:]}")


def compare(results: Sequence[str | Path], benchmark: Optional[str] = None, table: Optional[str] = None) -> str:
    """All results, one below the other; see :func:`read_measured` and :func:`comparison`."""
    found = [one for path in results for one in read_measured(path)]
    return "\n\n".join(report(comparison(one, benchmark, table)) for one in found)
