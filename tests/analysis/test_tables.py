"""The paper's tables as data: they agree with each other, and with its formulas."""

from __future__ import annotations

import pytest
from tiny import tiny_model
from tiny_vqa import vqa_model

from lavis_aurora.adapters.switching import parameter_groups
from lavis_aurora.analysis.paper import (
    ALL_SLOTS,
    ATTENTION_SLOTS,
    aurora_count,
    label,
    lora_count,
    paper_rows,
    paper_tables,
    uniadapter_count,
)
from lavis_aurora.common.errors import AuroraError

TABLES = paper_tables()["tables"]


@pytest.mark.parametrize("number", ["1", "2", "3"])
def test_the_gaps_that_the_paper_prints_follow_from_its_rows(number):
    """The paper's own lines 'delta PETL': ours against the best other method with a frozen backbone."""
    compared = 0
    for line in TABLES[number]["gaps_to_best_frozen"]:
        for benchmark, gaps in line["gaps"].items():
            rows = [row for row in paper_rows(number, benchmark) if row["group"] == "frozen backbone"]
            [own] = [row for row in rows if row["method"] == "Aurora" and row["rank"] == line["rank"]]
            others = [row for row in rows if row["method"] != "Aurora"]
            for metric, gap in gaps.items():
                known = [row["values"][metric] for row in others if row["values"].get(metric) is not None]
                best = min(known) if metric.endswith("median_rank") else max(known)
                assert own["values"][metric] - best == pytest.approx(gap, abs=1e-6), (benchmark, metric)
                compared += 1
    assert compared == {"1": 24, "2": 8, "3": 3}[number]


def test_every_number_is_in_its_range():
    for number, table in TABLES.items():
        for row in table["rows"]:
            assert row["tunable"] >= 1e5
            for benchmark, values in row["results"].items():
                assert benchmark in paper_tables()["benchmarks"]
                for metric, value in values.items():
                    if value is None:
                        continue
                    low, high = (0.5, 1) if number == "5" else (1, 6) if "median" in metric else (20, 100)
                    assert low <= value <= high, (number, row["method"], metric)
                # Recalls grow with K, the accuracies of both test splits are near.
                recalls = [value for metric, value in values.items() if metric[-3:] in ("_r1", "_r5")]
                if None not in recalls and len(recalls) == 2:
                    assert recalls[0] < recalls[1]


def test_what_is_not_legible_is_null_and_noted():
    [row] = [row for row in TABLES["5"]["rows"] if label(row) == "UniAdapter (r=128)"]
    assert row["results"]["coco_retrieval"] == {"time": None, "memory": 0.95}
    assert "MSCOCO, time of UniAdapter (r=128)" in TABLES["5"]["notes"][0]


def test_rows_without_results_on_a_benchmark_are_left_out():
    assert "OSCAR" not in [row["method"] for row in paper_rows("1", "flickr30k")]
    assert len(paper_rows("1", "coco_retrieval")) == 10
    with pytest.raises(AuroraError, match="table 3.*flickr30k"):
        paper_rows("3", "flickr30k")
    with pytest.raises(AuroraError, match="no table '9'"):
        paper_rows("9", "flickr30k")


def test_counts_are_those_of_appendix_e():
    assert (aurora_count(64), aurora_count(128)) == (130_560, 242_688)
    assert aurora_count(64, slots=ALL_SLOTS) == 159_744
    assert aurora_count(128, separate=3) - aurora_count(128) == 393_216  # the paper's 0.4M
    assert uniadapter_count(512) == 18_874_368 and uniadapter_count(128) == 4_718_592
    assert lora_count(32) == 12 * 9 * 2 * 768 * 32


@pytest.mark.parametrize(
    ("sharing", "targets", "separate", "slots"),
    [
        ("global", None, 1, ATTENTION_SLOTS),
        ("tower", None, 3, ATTENTION_SLOTS),
        ("global", "all_linear", 1, ALL_SLOTS),
        # Three attentions with a projection each, and two feed-forward layers in each of two towers.
        ("tower", "all_linear", 3 * 2 + 2 * 2, ALL_SLOTS),
    ],
)
@pytest.mark.parametrize("make", [tiny_model, vqa_model])
def test_counts_are_those_of_the_models(make, sharing, targets, separate, slots):
    """L (3 + 6) 2r + 2dr + 2Ld, and 2dr more for each tower beyond the first; VQA's decoder adds none."""
    groups = parameter_groups(make(mode_approx={"rank": 5, "sharing": sharing, "targets": targets}))
    trained = sum(count["parameters"] for group, count in groups.items() if group not in ("heads", "frozen"))
    assert trained == aurora_count(5, layers=3, width=128, separate=separate, slots=slots)
