"""The table of a sweep: a row for each cell, and mean and spread over the seeds."""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis_aurora.common.errors import AuroraError

SEED = "run.seed"
KINDS = ("cell", "mean", "spread")
Cells = Sequence[tuple[Mapping[str, str], Mapping[str, Any]]]


def table_rows(cells: Cells) -> list[dict[str, Any]]:
    """Rows of kind cell, then mean and spread of cells that differ by ``run.seed`` alone.

    Spread is the sample standard deviation, and left empty for a single cell. Failed cells count for nothing.

    Args:
        cells: settings and result of each, as scripts/sweep.py has them.
    """
    rows = []
    groups: dict[tuple, list[dict[str, float]]] = defaultdict(list)
    for settings, result in cells:
        figures = _figures(result)
        state = {"kind": "cell", "cells": 1, "status": result["status"]}
        rows.append({**state, **settings, **figures, "error": result.get("error", "")})
        if result["status"] == "done":
            groups[tuple((key, value) for key, value in settings.items() if key != SEED)].append(figures)
    for kind in KINDS[1:]:
        for settings, members in groups.items():
            row = {"kind": kind, "cells": len(members), "status": "done", **dict(settings)}
            for key in members[0]:
                values = [member[key] for member in members if key in member]
                if kind == "mean":
                    row[key] = statistics.fmean(values)
                elif len(values) > 1:
                    row[key] = statistics.stdev(values)
            rows.append(row)
    return rows


def _figures(result: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a cell: seconds, trained parameters with and without heads, metrics by split."""
    figures: dict[str, float] = {"seconds": result["seconds"]}
    counts = result.get("parameters") or {}
    if counts:
        figures["trained"] = sum(counts.values())
        figures["trained_without_heads"] = figures["trained"] - counts.get("heads", 0)
    for split, metrics in (result.get("metrics") or {}).items():
        figures.update({f"{split}.{key}": value for key, value in metrics.items()})
    return figures


def write_table(cells: Cells, path: str | Path) -> None:
    """Write the rows of :func:`table_rows` as csv."""
    rows = table_rows(cells)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    # What is long stands last.
    columns = [column for column in columns if column != "error"] + ["error"]
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def read_table(path: str | Path, *columns: str) -> list[dict[str, str]]:
    """Rows of a sweep's csv.

    Raises:
        AuroraError: the file cannot be read or lacks one of ``columns``.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            known = reader.fieldnames or []
    except (OSError, UnicodeError, csv.Error) as error:
        raise AuroraError(
            f"{path}: cannot be read as csv ({error}); name the sweep.csv of scripts/sweep.py"
        ) from error
    for column in ("kind", *columns):
        if column not in known:
            raise AuroraError(f"{path}: has no column {column!r}; it has {', '.join(known)}")
    return rows


def series(path: str | Path, key: str, metrics: Sequence[str]) -> dict[str, dict[str, list]]:
    """Mean, spread and single cells of each metric by the values of ``key``.

    Raises:
        AuroraError: another key than ``key`` and the seed differs, so that the values do not stand alone.

    Returns:
        By value of ``key``, in the table's order: by metric, ``{"mean", "spread", "cells"}``; spread is None for a
        single cell.
    """
    rows = read_table(path, key, *metrics)
    varied = [c for c in rows[0] if "." in c and c.split(".")[0] in ("model", "run", "datasets")] if rows else []
    for column in varied:
        if column not in (key, SEED) and len({row[column] for row in rows}) > 1:
            raise AuroraError(
                f"{path}: {column} differs too; a figure of {key} needs a sweep of it and of seeds alone"
            )
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        for metric in metrics:
            if row["status"] != "done" or row[metric] == "":
                continue
            one = found.setdefault(row[key], {}).setdefault(metric, {"mean": None, "spread": None, "cells": []})
            if row["kind"] == "cell":
                one["cells"].append(float(row[metric]))
            else:
                one[row["kind"]] = float(row[metric])
    if not found:
        raise AuroraError(f"{path}: no cell of it is done")
    return found
