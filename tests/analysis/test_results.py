"""Reading back what a run left."""

from __future__ import annotations

import json

import pytest
from tiny import project_yaml
from tiny_summary import counts, leave_summary

from lavis_aurora.analysis.results import final_metrics, latest_run, read_config, trained_parameters
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.files import read_json
from lavis_aurora.common.summary import read_summary
from lavis_aurora_cli import train


def test_the_summary_of_a_run_gives_the_metrics_of_its_result_file(tmp_path):
    train(["--cfg-path", str(project_yaml(tmp_path))])
    run = latest_run(tmp_path / "output")
    result = json.loads((run / "result" / "test_epoch_best.json").read_text())
    assert final_metrics(run) == {"test": result["metrics"]}
    assert read_config(run).run.k_test == 4
    trained = trained_parameters(read_summary(run))
    assert trained["gate"] == 3 * 2 * 128 and "frozen" not in trained


def test_metrics_are_the_numbers_of_each_split(tmp_path):
    metrics = {"test": {"agg_metrics": 2.0, "note": "x"}, "test_dev": {"agg_metrics": None, "questions": 3}}
    leave_summary(tmp_path / "new", metrics=metrics)
    assert final_metrics(tmp_path / "new") == {"test": {"agg_metrics": 2.0}, "test_dev": {"questions": 3.0}}
    # A run that was not tested, and a folder of none, are no results.
    leave_summary(tmp_path / "untested")
    (tmp_path / "other").mkdir()
    assert latest_run(tmp_path) == tmp_path / "new"
    assert latest_run(tmp_path / "nowhere") is None


def test_trained_parameters_are_those_of_each_group(tmp_path):
    leave_summary(tmp_path, parameters=counts({"gate": 6, "heads": 4}, 100))
    assert trained_parameters(read_summary(tmp_path)) == {"gate": 6, "heads": 4}


def test_a_run_of_an_older_version_is_one_line_that_says_what_to_do(tmp_path):
    with pytest.raises(AuroraError, match="summary.json is not there.*evaluate.py") as caught:
        final_metrics(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_no_run_and_no_json_is_named(tmp_path):
    with pytest.raises(AuroraError, match="config.yaml.*folder of a run"):
        read_config(tmp_path)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(AuroraError, match="x.json"):
        read_json(tmp_path / "x.json")
