"""The paper's tables 1 to 5 as data (``tables.json``), and its formulas for counts of parameters (appendix E)."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from lavis_aurora.errors import AuroraError, near_names

# BLIP base: layers of each tower and their width.
LAYERS, WIDTH = 12, 768


@lru_cache(maxsize=1)
def paper_tables() -> dict[str, Any]:
    """Content of ``tables.json``; its ``units`` say what the numbers are, and null is what could not be read."""
    return json.loads(Path(__file__).with_name("tables.json").read_text(encoding="utf-8"))


def paper_rows(table: str, benchmark: str) -> list[dict[str, Any]]:
    """Rows of a table that have results on a benchmark; these are then at ``values``.

    Raises:
        AuroraError: no such table, or the benchmark is not in it.
    """
    tables = paper_tables()["tables"]
    if table not in tables:
        raise AuroraError(f"the paper has no table {table!r}{near_names(table, tables)}")
    rows = [{**row, "values": row["results"].get(benchmark, {})} for row in tables[table]["rows"]]
    rows = [row for row in rows if any(value is not None for value in row["values"].values())]
    if not rows:
        known = sorted({name for row in tables[table]["rows"] for name in row["results"]})
        raise AuroraError(f"table {table} of the paper has no results on {benchmark!r}{near_names(benchmark, known)}")
    return rows


def label(row: dict[str, Any]) -> str:
    """Method and rank of a row."""
    return f"{row['method']} (r={row['rank']})" if "rank" in row else row["method"]


def aurora_count(rank: int, layers: int = LAYERS, width: int = WIDTH, separate: int = 1) -> int:
    """Aurora: L (3 + 6) 2r + 2dr + 2Ld, where 2Ld is the gate.

    Args:
        rank: R.
        layers, width: L and d.
        separate: pairs of U and V: one for all towers (``sharing: global``), or one each for three (``tower``).
    """
    return layers * 9 * 2 * rank + separate * 2 * width * rank + 2 * layers * width


def lora_count(rank: int, layers: int = LAYERS, width: int = WIDTH) -> int:
    """LoRA on all attention projections: L (3 + 6) 2dr."""
    return layers * 9 * 2 * width * rank


def uniadapter_count(rank: int, layers: int = LAYERS, width: int = WIDTH) -> int:
    """UniAdapter: L 4dr."""
    return layers * 4 * width * rank
