"""The comparison of methods: which runs are missing, what is kept of them, and the table."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import bench_train
import comparison
import comparison_methods
import processes
import pytest
from comparison import RUN, SEEDS, Comparison, main, table
from comparison_methods import METHODS, Method, read_methods
from distributed import run_apart
from tiny import project_yaml
from tiny_summary import counts, leave_summary

from lavis_aurora.analysis.results import compared
from lavis_aurora.common.errors import AuroraError, Diverged
from lavis_aurora.project import load_config

METRICS = ("image_to_text_r1", "text_to_image_r1")
LORA = Method("LoRA", ["model.tuning=lora"], "model.lora.rank", {"small": 1, "big": 4}, [1e-3, 1e-2])
FROZEN = Method("frozen", ["model.tuning=frozen"])
DIVERGED = {"status": "diverged", "error": "error: no"}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny project as the task of pictures; the folder of results."""
    monkeypatch.setitem(comparison.TASKS, "pictures", str(project_yaml(tmp_path)))
    monkeypatch.setattr(comparison, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def record(trial: comparison.Trial, score: float | None) -> dict[str, Any]:
    """Of a run that reached ``score`` everywhere, or diverged."""
    if score is None:
        return {**trial.key, "error": "error: the loss is NaN"}
    groups = {"LoRA": {"tensors": 2, "parameters": 100}, "heads": {"tensors": 1, "parameters": 7}}
    metrics = {**dict.fromkeys(METRICS, score), "image_to_text_itc_r1": 1.0, "agg_metrics": 50.0}
    return {**trial.key, "parameters": groups, "validation": score, "metrics": metrics}


def test_the_score_of_answers_is_their_accuracy(results, tmp_path):
    found = Comparison("pictures", {"frozen": FROZEN}, None, tmp_path)
    [trial] = found.missing()[0]
    found.records = [{**trial.key, "parameters": {}, "validation": None, "metrics": {"agg_metrics": 61.0}}]
    assert table(found.records).splitlines()[0].endswith("| seeds | accuracy |")
    assert table(found.records).splitlines()[2].endswith("| 1 | 61.0 |")


def test_rates_come_first_then_seeds_at_the_best(results, tmp_path):
    found = Comparison("pictures", {"lora": LORA, "frozen": FROZEN}, ["small"], tmp_path)
    trials, later = found.missing()
    assert [(trial.key["method"], trial.key["rate"], trial.key["seed"]) for trial in trials] == [
        ("lora", 1e-3, SEEDS[0]),
        ("lora", 1e-2, SEEDS[0]),
        ("frozen", None, SEEDS[0]),
    ]
    assert later == len(SEEDS) - 1
    assert trials[0].settings == {
        "model.tuning": "lora",
        "model.lora.rank": "1",
        "run.init_lr": "0.001",
        "run.seed": "1",
    }
    found.records = [record(trial, score) for trial, score in zip(trials, (40.0, None, 5.0))]
    trials, later = found.missing()
    assert [(trial.key["rate"], trial.key["seed"]) for trial in trials] == [(1e-3, 2), (1e-3, 3)]
    assert later == 0
    found.records += [record(trial, score) for trial, score in zip(trials, (42.0, 44.0))]
    assert found.missing() == ([], 0)
    # Another project YAML, options, or size: all of it again.
    assert len(Comparison("pictures", {"lora": LORA}, ["small"], tmp_path, ["run.max_epoch=9"]).missing()[0]) == 2
    lora, frozen = compared(found.records)
    assert (lora.rate, lora.seeds, lora.parameters, lora.at_end) == (1e-3, 3, 100, True)
    assert lora.scores == dict.fromkeys(METRICS, [40.0, 42.0, 44.0])
    assert lora.rates == {1e-3: 40.0, 1e-2: None}
    assert (frozen.rate, frozen.seeds, frozen.at_end) == (None, 1, False)
    row = "| small | LoRA | 100 | 0.001 (an end of those tried) | 3 | 42.0 (2.0) | 42.0 (2.0) |"
    assert row in table(found.records)


def test_a_record_of_another_project_gives_way_to_the_new_one(results, tmp_path):
    old = Comparison("pictures", {"frozen": FROZEN}, None, tmp_path)
    new = Comparison("pictures", {"frozen": FROZEN}, None, tmp_path, ["run.max_epoch=9"])
    [trial], [again] = old.missing()[0], new.missing()[0]
    new.records = [record(trial, 3.0)]
    again.result = DIVERGED
    new.keep(again)
    assert new.records == [{**again.key, "error": "error: no"}]
    assert json.loads(new.results.read_text()) == new.records


def test_no_rate_of_an_older_project_stays_beside_those_of_the_new_one(results, tmp_path, monkeypatch):
    """An old record could be the best of them, and the table's."""
    old = Comparison("pictures", {"lora": LORA}, None, tmp_path)
    new = Comparison("pictures", {"lora": LORA}, None, tmp_path, ["run.max_epoch=9"])
    results.mkdir()
    (results / "pictures.json").write_text(json.dumps([record(trial, 90.0) for trial in old.missing()[0]]))
    trial = new.missing()[0][0]
    monkeypatch.setattr(trial, "record", lambda: record(trial, 40.0))
    new.keep(trial)
    left = [(one["budget"], one["rate"], one.get("validation")) for one in new.records]
    assert left == [("big", 1e-3, 90.0), ("big", 1e-2, 90.0), ("small", 1e-3, 40.0)]


def test_records_of_other_weights_give_way_and_older_ones_count(results, tmp_path, monkeypatch):
    """The path in the YAML is the same."""
    weights = tmp_path / "weights.safetensors"
    options = [f"model.pretrained={weights}"]

    def runs() -> Comparison:
        return Comparison("pictures", {"lora": LORA}, ["small"], tmp_path, options)

    weights.write_text("some")
    results.mkdir()
    before = [record(trial, 40.0) for trial in runs().missing()[0]]
    assert {one["weights"] for one in before} == {hashlib.sha256(b"some").hexdigest()[:12]}
    (results / "pictures.json").write_text(json.dumps(before))
    assert [trial.key["seed"] for trial in runs().missing()[0]] == [2, 3]
    weights.write_text("others")
    found = runs()
    trials, _ = found.missing()
    assert [trial.key["seed"] for trial in trials] == [1, 1]
    old_folder = Path(trials[0].folder.name.replace(trials[0].key["weights"], before[0]["weights"]))
    assert old_folder.name != trials[0].folder.name, "there it would go on with what is trained"
    trials[0].result = DIVERGED
    found.keep(trials[0])
    assert found.records == [{**trials[0].key, "error": "error: no"}], "none of the other weights"
    old = [{key: value for key, value in one.items() if key != "weights"} for one in before]
    (results / "pictures.json").write_text(json.dumps(old))
    assert [trial.key["seed"] for trial in runs().missing()[0]] == [2, 3]
    found.keep(trials[0])
    assert len(found.records) == 2


def test_the_records_of_the_project_are_of_its_runs(tmp_path):
    """Else a command would make all of them again; those of methods with other rates now would only lie there."""
    found = Comparison("pictures", read_methods(None), None, tmp_path)
    for name, method, budget in found.sizes():
        own = [one for one in found.records if (one["method"], one["budget"]) == (name, budget)]
        if own:
            rates, seeds = ({one[key] for one in own} for key in ("rate", "seed"))
            known = [found.known(trial) for trial in found.trials_of(name, method, budget, [*rates], [*seeds])]
            assert sum(map(bool, known)) == len(own) and rates <= {*(method.rates or [None])}, f"{name} {budget}"
    assert any("error" in one for one in found.records) and any("error" not in one for one in found.records)


def test_records_of_two_commands_are_all_kept(results, tmp_path):
    """Each adds to what is in the file, not to what it has read before."""
    one, other = (Comparison("pictures", {"lora": LORA}, ["small"], tmp_path) for _ in range(2))
    trials, _ = one.missing()
    for trial in trials:
        trial.result = DIVERGED
    one.keep(trials[0])
    other.keep(trials[1])
    kept = json.loads(one.results.read_text())
    assert [record["rate"] for record in kept] == [1e-3, 1e-2]
    assert [path.name for path in results.iterdir()] == ["pictures.json"], "its lock is gone"


def test_commands_that_replace_each_other_s_records_do_not_go_on_for_ever(results, tmp_path, monkeypatch):
    """Of other options a record is another, and the file holds one of each run."""
    one = Comparison("pictures", {"frozen": FROZEN}, None, tmp_path)
    other = Comparison("pictures", {"frozen": FROZEN}, None, tmp_path, ["run.max_epoch=9"])

    def end(trial: comparison.Trial) -> comparison.Trial:
        trial.result = DIVERGED
        return trial

    def run_all(trials: list[comparison.Trial], jobs: int, start: Any, poll: Any, report: Any) -> None:
        [trial] = trials
        one.keep(end(trial))
        other.keep(end(other.missing()[0][0]))

    monkeypatch.setattr(comparison, "run_all", run_all)
    with pytest.raises(AuroraError, match="has replaced the record of frozen__.*; run them one after the other"):
        one.run(1)


# It imports nothing of the package, which takes seconds.
FAKE = """
import shutil
import sys
import time
from pathlib import Path
options = dict(option.split("=", 1) for option in sys.argv[sys.argv.index("--options") + 1:])
folder = Path(options["run.output_dir"])
with (folder / "attempts").open("a") as file:
    file.write("x")
time.sleep(0.5)
status = Path(__file__).with_name("status_" + options["run.init_lr"])
if status.exists():
    print("error: it ends")
    sys.exit(int(status.read_text()))
shutil.copytree(Path(__file__).with_name("finished"), folder / "run")
"""


def compare_lora(rank: int, folder: Path, yaml: Path) -> list[dict[str, Any]]:
    """The records of a command that knows one method of two rates, in a process of its own."""
    processes.ROOT = folder
    comparison.TASKS["pictures"] = str(yaml)
    comparison.RESULTS, comparison_methods.METHODS = folder / "results", folder / "methods"
    main(["--task", "pictures", "--output", str(folder / "output")])
    return json.loads((comparison.RESULTS / "pictures.json").read_text())


def fake_training(tmp_path: Path) -> Path:
    """A training program of a run with a good end, and a method of two rates; the project."""
    validation = [{"epoch": 0, "split": "val", "metrics": {**dict.fromkeys(METRICS, 40.0), "agg_metrics": 40.0}}]
    metrics = {"test": {**dict.fromkeys(METRICS, 41.0), "agg_metrics": 50.0}}
    leave_summary(tmp_path / "finished", parameters=counts({"LoRA": 9}, 99), validation=validation, metrics=metrics)
    (tmp_path / "train.py").write_text(FAKE)
    (tmp_path / "methods").mkdir()
    heads = "label: heads\noptions: [model.tuning=heads]\nrates: [1e-3, 1e-2]\n"
    (tmp_path / "methods" / "heads.yaml").write_text(heads)
    return project_yaml(tmp_path)


@pytest.mark.slow
def test_two_commands_at_once_share_the_runs(tmp_path):
    one, other = run_apart(2, compare_lora, tmp_path, fake_training(tmp_path))
    assert one == other and [(record["rate"], record["seed"]) for record in one] == [
        (1e-3, 1),
        (1e-2, 1),
        (1e-2, 2),
        (1e-2, 3),
    ]
    assert [path.read_text() for path in (tmp_path / "output").glob("pictures/*/attempts")] == ["x"] * 4


def test_only_what_a_rate_does_is_a_result_of_it(tmp_path, monkeypatch, capsys):
    """A training that diverges has a record, without a score; one that was killed has none, and is run again."""
    yaml = fake_training(tmp_path)
    monkeypatch.setattr(processes, "ROOT", tmp_path)
    monkeypatch.setattr(comparison, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(comparison_methods, "METHODS", tmp_path / "methods")
    monkeypatch.setitem(comparison.TASKS, "pictures", str(yaml))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = ["--task", "pictures", "--output", str(tmp_path / "output")]

    def records() -> list[tuple[Any, ...]]:
        return [(*(one[key] for key in RUN), "error" in one) for one in json.loads(path.read_text())]

    path, status = tmp_path / "results" / "pictures.json", tmp_path / "status_0.01"
    status.write_text("1")
    with pytest.raises(SystemExit) as end:
        main(command)
    [log] = (tmp_path / "output" / "pictures").glob("heads__0.01_1_*/output.txt")
    assert end.value.code == f"error: 1 of 2 runs failed, e.g. {log}; the same command tries them again"
    out = capsys.readouterr().out
    assert "failed: heads at 0.01, seed 1: error: it ends" in out and "[1/4 done, 1 failed]" in out
    assert records() == [("heads", "", 0.001, 1, False)], "the best rate is not known, nor its other seeds run"
    status.write_text(str(Diverged.exit_status))
    main(command)
    assert "diverged: heads at 0.01, seed 1: error: it ends" in capsys.readouterr().out
    rate = ("heads", "", 0.001)
    assert records() == [*((*rate, seed, False) for seed in SEEDS), ("heads", "", 0.01, 1, True)]
    main(command)
    attempts = {one.parent.name[:14]: one.read_text() for one in (tmp_path / "output").glob("pictures/*/attempts")}
    assert attempts == {"heads__0.001_1": "x", "heads__0.001_2": "x", "heads__0.001_3": "x", "heads__0.01_1_": "xx"}


def test_a_record_holds_whatever_its_run_does_not_depend_on(results, tmp_path):
    """Comments and settings of other ways of tuning may change; what the run itself is told may not."""
    found = Comparison("pictures", {"lora": LORA}, None, tmp_path)
    before = found.source(LORA.options_at("small", "pictures"))["project"]
    text = found.project.read_text()
    assert "model:\n" in text
    found.project.write_text("# A comment.\n" + text.replace("model:\n", "model:\n  mode_approx: {rank: 7}\n"))
    assert found.source(LORA.options_at("small", "pictures"))["project"] == before
    assert found.source(LORA.options_at("big", "pictures"))["project"] != before
    found.project.write_text(text.replace("model:\n", "model:\n  alpha: 0.123\n"))
    assert found.source(LORA.options_at("small", "pictures"))["project"] != before


def test_unknown_methods_and_keys_are_named(tmp_path, monkeypatch):
    with pytest.raises(AuroraError, match="--methods lorra: there is no .*lorra.yaml; did you mean 'lora_all'"):
        read_methods(["lorra"])
    monkeypatch.setattr(comparison_methods, "METHODS", tmp_path)
    (tmp_path / "mine.yaml").write_text("label: mine\noptions: []\nrate: [1]\n")
    with pytest.raises(AuroraError, match="mine.yaml.*rate"):
        read_methods(None)
    for key in ("task_rates: {question: [1]}", "task_options: {question: []}", "tasks: [question]"):
        (tmp_path / "mine.yaml").write_text(f"label: mine\noptions: []\n{key}\n")
        with pytest.raises(AuroraError, match="mine.yaml: a task: unknown value 'question'; did you mean"):
            read_methods(None)


def test_a_task_may_have_rates_of_its_own(results, tmp_path, monkeypatch):
    lora = Method("LoRA", ["model.tuning=lora"], rates=[1e-3, 1e-2], task_rates={"questions": [5e-4]})
    monkeypatch.setitem(comparison.TASKS, "questions", comparison.TASKS["pictures"])
    for task, rates in (("pictures", [1e-3, 1e-2]), ("questions", [5e-4])):
        trials, later = Comparison(task, {"lora": lora}, None, tmp_path).missing()
        assert [trial.key["rate"] for trial in trials] == rates and later == 2


def test_answers_are_compared_at_lower_rates():
    """There Aurora is best at 4e-3, and collapses at 8e-3."""
    for name, method in read_methods(None).items():
        if method.rates and "questions" in method.tasks:
            pictures, questions = method.rates_of("pictures"), method.rates_of("questions")
            # UniAdapter's best is the last but one of its own.
            assert len(questions) == (6 if name == "uniadapter" else 4) and max(questions) < max(pictures), name
    assert read_methods(["aurora_all_linear"])["aurora_all_linear"].rates_of("questions") == [1e-3, 2e-3, 4e-3, 8e-3]


@pytest.mark.parametrize(
    "task", [pytest.param(one, marks=pytest.mark.slow) if one == "pictures" else one for one in comparison.TASKS]
)
def test_the_runs_of_all_methods_can_be_configured(task, tmp_path):
    """Each YAML for each task; at each of its sizes, which are the same for all."""
    found = Comparison(task, read_methods(None), None if task == "pictures" else ["25k"], tmp_path)
    for _, method, budget in found.sizes():
        options = [f"{key}={value}" for key, value in method.options_at(budget, task).items()]
        load_config(str(found.project), options)


@pytest.mark.slow
def test_runs_are_made_once_and_kept(results, tmp_path, monkeypatch, capsys):
    methods = tmp_path / "methods"
    methods.mkdir()
    (methods / "heads.yaml").write_text("label: heads\noptions: [model.tuning=heads]\nrates: [1e-3, 1e-2]\n")
    (methods / "frozen.yaml").write_text("label: frozen\noptions: [model.tuning=frozen]\n")
    monkeypatch.setattr(comparison_methods, "METHODS", methods)
    arguments = ["--task", "pictures", "--output", str(tmp_path / "output"), "--jobs", "2"]
    main(arguments)
    records = json.loads((results / "pictures.json").read_text())
    assert [(one["method"], one["seed"]) for one in records].count(("heads", 1)) == 2
    assert len(records) == 5 and all("error" not in one for one in records)
    shown = capsys.readouterr().out
    assert "| heads |" in shown and "| frozen |" in shown
    before = (results / "pictures.json").stat().st_mtime_ns
    main(arguments)
    assert (results / "pictures.json").stat().st_mtime_ns == before


def test_methods_of_the_project_say_what_they_are():
    for path in METHODS.glob("*.yaml"):
        assert path.read_text().startswith("# ")


def test_methods_of_the_project_name_a_row_of_the_benchmark():
    """Besides the backbone as it is, of which no step is trained, and the heads, which it does not measure."""
    costs = {name: method.cost for name, method in read_methods(None).items()}
    assert [name for name, cost in costs.items() if cost is None] == ["frozen", "heads"]
    assert {cost for cost in costs.values() if cost} <= set(bench_train.METHODS)
    # The demo trains without a teacher, so the row of all but one has none.
    assert [name for name, cost in costs.items() if cost and "+alone" not in cost] == ["aurora_all_teacher"]
