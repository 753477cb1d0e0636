"""Reading back what a run left."""

from __future__ import annotations

import json

import pytest
from tiny import project_yaml, tiny_model

from lavis_aurora.adapters.sets import trainable_parameters_summary
from lavis_aurora.analysis.results import final_metrics, newest_run, read_config, trained_parameters
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.files import read_json
from lavis_aurora_cli import train


def test_the_log_of_a_run_gives_the_metrics_of_its_result_file(tmp_path):
    train(["--cfg-path", str(project_yaml(tmp_path))])
    run = newest_run(tmp_path / "output")
    result = json.loads((run / "result" / "test_epoch_best.json").read_text())
    assert final_metrics(run) == {"test": result["metrics"]}
    assert read_config(run).run.k_test == 4


def test_the_last_evaluation_of_each_split_counts(tmp_path):
    lines = [
        "{",
        '  "run": {}',
        "}",
        '{"final_test_epoch": "best", "final_test_agg_metrics": 1.0}',
        '{"val_epoch": 1, "val_agg_metrics": 9.0}',
        '{"final_test_epoch": "best", "final_test_agg_metrics": 2.0, "final_test_note": "x"}',
        '{"final_test_dev_epoch": 0, "final_test_dev_agg_metrics": null, "final_test_dev_questions": 3}',
        '{"final_test_epoch": "be',
    ]
    (tmp_path / "log.txt").write_text("\n".join(lines))
    assert final_metrics(tmp_path) == {"test": {"agg_metrics": 2.0}, "test_dev": {"questions": 3.0}}
    assert final_metrics(tmp_path / "nowhere") == {}


def test_counts_are_read_from_the_summary_that_a_run_prints():
    model = tiny_model()
    counts = trained_parameters(
        f"12 [INFO] model\nodd one  1  5  0.1\nx\n{trainable_parameters_summary(model)}\nmore"
    )
    assert "odd one" not in counts
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts["gate"] == 3 * 2 * 128
    assert trained_parameters("gate  1  5  0.1\nno summary") == {}


def test_what_is_no_run_and_no_json_is_named(tmp_path):
    with pytest.raises(AuroraError, match="config.yaml.*folder of a run"):
        read_config(tmp_path)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(AuroraError, match="x.json"):
        read_json(tmp_path / "x.json")
