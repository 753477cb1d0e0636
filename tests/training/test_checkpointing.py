import math
import os
import random

import pytest
import torch

from lavis_aurora import AuroraError
from lavis_aurora.common.paths import package_file
from lavis_aurora.training.checkpoints import (
    BEST,
    LATEST,
    PREVIOUS,
    find_resumable_run,
    newest_run_differs,
    read_checkpoint,
    read_latest,
    same_computation,
    write_checkpoint,
)
from lavis_aurora.training.order import random_state

STATE = {
    "model": {"a": torch.ones(2)},
    "optimizer": {"state": {}, "param_groups": [{"params": [0], "lr": 0.1}]},
    "scaler": None,
    "epoch": 3,
    "step": 5,
    "best_metric": 1.0,
    "best_epoch": 1,
}


def test_round_trip_leaves_one_file(tmp_path):
    write_checkpoint(STATE, tmp_path / "a.pth")
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]
    state = read_checkpoint(tmp_path / "a.pth")
    assert torch.equal(state["model"]["a"], torch.ones(2))
    assert state["epoch"] == 3


def test_a_failing_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    write_checkpoint(STATE, tmp_path / "a.pth")

    def full(_state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(AuroraError, match="cannot write .*a.pth .*No space left.*; free some space"):
        write_checkpoint({**STATE, "epoch": 4}, tmp_path / "a.pth")
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]
    assert read_checkpoint(tmp_path / "a.pth")["epoch"] == 3


@pytest.mark.parametrize("content", [b"", b"x" * 100])
def test_unreadable_checkpoints_are_named(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(AuroraError, match="a.pth is not a readable checkpoint"):
        read_checkpoint(tmp_path / "a.pth")


def test_foreign_files_are_named(tmp_path):
    torch.save({"model": {}}, tmp_path / "a.pth")
    with pytest.raises(AuroraError, match="not a checkpoint of a run: it has no best_epoch, best_metric, epoch"):
        read_checkpoint(tmp_path / "a.pth")


def test_a_checkpoint_with_a_flipped_bit_is_refused_or_the_same(tmp_path):
    path, draw = tmp_path / "a.pth", random.Random(0)
    write_checkpoint({**STATE, "model": {"a": torch.randn(300)}}, path)
    whole, content = read_checkpoint(path), path.read_bytes()
    refused = 0
    for _ in range(100):
        bit = draw.randrange(8 * len(content))
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            state = read_checkpoint(path)
        except AuroraError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert torch.equal(state.pop("model")["a"], whole["model"]["a"])
            assert state == {key: value for key, value in whole.items() if key != "model"}
    assert refused > 20


def moments(**changes):
    one = {"step": torch.tensor(1.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    return {**STATE["optimizer"], "state": {0: {**one, **changes}}}


def process(**changes):
    return {"random": random_state(), "losses": {"loss": 1.0}, **changes}


def test_entries_that_a_run_writes_are_read(tmp_path):
    state = {
        **STATE,
        "model": {"a": torch.ones(2), "none": torch.ones(0), "bf16": torch.ones(2, dtype=torch.bfloat16)},
        "optimizer": moments(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "queue": {"idx_queue": torch.full((1, 4), -100)},
        "config": {"run": {"max_epoch": 4, "batch_size_train": 2, "grad_clip": math.inf}, "model": {}},
        "processes": [process(), process()],
        "steps_per_epoch": 5,
        "validated": False,
    }
    write_checkpoint(state, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth").keys() == state.keys()
    write_checkpoint({**state, "best_metric": -math.inf, "best_epoch": None}, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth")["best_epoch"] is None


IMPOSSIBLE = [
    ("model", 3),
    ("model", {"a": [1.0]}),
    ("model", {"a": torch.ones(2, dtype=torch.int64)}),
    ("queue", [torch.ones(2)]),
    ("optimizer", None),
    ("optimizer", {}),
    ("optimizer", {"state": {}, "param_groups": [{"params": 0, "lr": 0.1}]}),
    ("optimizer", moments(step="one")),
    ("optimizer", moments(exp_avg=torch.ones(3))),
    ("optimizer", moments(exp_avg=None)),
    ("scaler", {"scale": -1.0}),
    ("scaler", 2),
    ("config", 3),
    ("config", {"run": [1]}),
    ("config", {"run": {"world_size": "two", "batch_size_train": None}}),
    ("epoch", -1),
    ("epoch", 1.5),
    ("epoch", True),
    ("epoch", "3"),
    ("step", None),
    ("steps_per_epoch", "many"),
    ("validated", "yes"),
    ("processes", {"a": 1}),
    ("processes", [process(), process(losses={})]),
    ("processes", [process(losses={"loss": "low"})]),
    ("processes", [process(random={**random_state(), "torch": torch.ones(3)})]),
    ("processes", [process(random={**random_state(), "python": (3, (1, 2), None)})]),
    ("processes", [process(random={**random_state(), "cuda": "no"})]),
    ("processes", [process(random={})]),
    ("best_metric", math.nan),
    ("best_metric", "high"),
    ("best_epoch", "first"),
]


@pytest.mark.parametrize(("key", "value"), IMPOSSIBLE)
def test_entries_that_no_run_writes_are_refused(tmp_path, key, value):
    torch.save({**STATE, key: value}, tmp_path / "a.pth")
    with pytest.raises(AuroraError, match=f"a.pth is not a checkpoint of a run: no run writes such {key}$"):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "changes",
    [{"best_epoch": 4}, {"best_metric": -math.inf}, {"steps_per_epoch": 4}, {"config": {"run": {"max_epoch": 3}}}],
)
def test_entries_that_contradict_each_other_are_refused(tmp_path, changes):
    torch.save({**STATE, **changes}, tmp_path / "a.pth")
    with pytest.raises(AuroraError, match="no run writes such epoch, step and best epoch together"):
        read_checkpoint(tmp_path / "a.pth")


NOT_FINITE = {
    "model.a": {"model": {"a": torch.tensor([1.0, math.nan])}},
    "queue.q": {"queue": {"q": torch.tensor([[-math.inf]], dtype=torch.half)}},
    "optimizer.state.0.exp_avg": {"optimizer": moments(exp_avg=torch.tensor([0.0, math.inf]))},
    "scaler.scale": {"scaler": {"scale": math.inf, "_growth_tracker": 0}},
    "processes.0.losses.loss": {"processes": [process(losses={"loss": math.nan})]},
}


@pytest.mark.parametrize("name", NOT_FINITE)
def test_numbers_that_are_none_are_named(tmp_path, name):
    torch.save({**STATE, **NOT_FINITE[name]}, tmp_path / "a.pth")
    with pytest.raises(AuroraError, match=f"a.pth holds NaN or infinite numbers: {name}; take another"):
        read_checkpoint(tmp_path / "a.pth")


def test_the_best_is_gone_on_from_when_no_other_is_left(tmp_path, caplog):
    for name in (LATEST, PREVIOUS, BEST):
        write_checkpoint(STATE, tmp_path / name)
    for name in (LATEST, PREVIOUS):
        (tmp_path / name).write_bytes(b"PK")
    assert read_latest(tmp_path)[1].name == BEST
    assert f"{LATEST} is not a readable checkpoint" in caplog.text and "it is passed over" in caplog.text


def test_checkpoints_of_another_program_are_passed_over(tmp_path):
    config = {"model": {"arch": "a"}, "run": {"seed": 1}}
    for name, state in {"other": {"config": 3, "state_dict": {}}, "odd": {**STATE, "config": "of another"}}.items():
        (tmp_path / name).mkdir()
        torch.save(state, tmp_path / name / LATEST)
    (tmp_path / "run").mkdir()
    write_checkpoint({**STATE, "config": config}, tmp_path / "run" / LATEST)
    os.utime(tmp_path / "run", (1, 1))
    assert find_resumable_run(tmp_path, config).name == "run"


def test_the_one_before_is_kept_and_used_when_the_newest_is_broken(tmp_path):
    for epoch in (1, 2):
        write_checkpoint({**STATE, "epoch": epoch}, tmp_path / LATEST, previous=tmp_path / PREVIOUS)
    state, path = read_latest(tmp_path)
    assert (state["epoch"], path.name) == (2, LATEST)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    state, path = read_latest(tmp_path)
    assert (state["epoch"], path.name) == (1, PREVIOUS)
    path.unlink()
    assert read_latest(tmp_path) is None


def test_the_newest_run_of_the_same_configuration_is_found(tmp_path):
    config = {"model": {"arch": "a"}, "run": {"seed": 1, "num_workers": 0}}
    for i, seed in enumerate((1, 1, 2)):
        folder = tmp_path / f"run{i}"
        folder.mkdir()
        write_checkpoint({**STATE, "config": {**config, "run": {"seed": seed, "num_workers": i}}}, folder / LATEST)
        os.utime(folder, (i, i))
    assert find_resumable_run(tmp_path, config).name == "run1"
    assert find_resumable_run(tmp_path, {**config, "model": {"arch": "b"}}) is None
    assert find_resumable_run(tmp_path / "nowhere", config) is None


def of_type(name, image_size, count, seed, processors_size=None):
    """A configuration of which pictures and file names follow from others."""
    processor = {"vis_processor": {"eval": {"image_size": processors_size or image_size}}}
    return {
        "model": {"arch": "a", "model_type": name, "pretrained": f"{name}.pth", "image_size": image_size},
        "datasets": {"d": {"type": "default", "count": count, "file": "${.count}.json", **processor}},
        "run": {"seed": seed},
    }


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (of_type("tiny", 48, 5, 1), "datasets.d.count (1 more differ, which may follow)"),
        (of_type("tiny", 96, 4, 1), "model.image_size (1 more differ, which may follow)"),
        (of_type("base", 384, 4, 2), "model.model_type, run.seed (3 more differ, which may follow)"),
        (of_type("tiny", 48, 4, 1, 96), "datasets.d.vis_processor.eval.image_size"),
    ],
)
def test_how_the_newest_run_differs_is_said_by_what_a_user_may_change(tmp_path, other, said):
    (tmp_path / "run").mkdir()
    write_checkpoint({**STATE, "config": of_type("tiny", 48, 4, 1)}, tmp_path / "run" / LATEST)
    assert newest_run_differs(tmp_path, other) == f"; the newest, {tmp_path / 'run'}, differs in {said}"


def test_a_run_of_which_only_the_best_is_left_is_found(tmp_path):
    config = {"model": {"arch": "a"}, "run": {"seed": 1}}
    (tmp_path / "run").mkdir()
    write_checkpoint({**STATE, "config": config}, tmp_path / "run" / BEST)
    assert find_resumable_run(tmp_path, config).name == "run"
    assert find_resumable_run(tmp_path, config, evaluate=True).name == "run"


def of(processes, batch, **model):
    run = {"world_size": processes, "batch_size_train": batch, "distributed": processes > 1, "seed": 1}
    return {"model": {"arch": "blip_retrieval_aurora", **model}, "run": run}


def test_the_global_batch_says_whether_other_processes_go_on_with_a_run():
    assert same_computation(of(8, 16), of(1, 128)) and same_computation(of(8, 16), of(4, 32))
    assert not same_computation(of(8, 16), of(1, 16))
    alone = of(1, 16)
    del alone["run"]["world_size"]  # as LAVIS writes it
    assert same_computation(alone, of(1, 16))


@pytest.mark.parametrize("model", [{"negative_all_rank": False}, {"arch": "mode_approx"}])
def test_where_each_process_has_negatives_of_its_own_their_number_counts(model):
    assert not same_computation(of(8, 16, **model), of(1, 128, **model))
    assert same_computation(of(8, 16, **model), of(8, 16, **model))


def test_a_run_is_the_same_where_the_package_has_moved_and_where_its_own_configuration_starts_it():
    """config.yaml is resolved, a checkpoint is not; older versions wrote absolute paths of packaged files."""
    name = "configs/models/tiny/model.safetensors"
    given = {**of(1, 16, pretrained=f"${{aurora.package:{name}}}", tokenizer="${.pretrained}"), "datasets": {}}
    for path in (package_file(name), f"/moved/lavis_aurora/{name}"):
        assert same_computation(given, {**of(1, 16, pretrained=path, tokenizer=path), "datasets": {}})
    lost = {**given, "datasets": {"x": "${oc.env:NOT_SET_ANYWHERE}"}}
    assert same_computation(lost, lost) and not same_computation(lost, given)
    other = f"/moved/{name}"
    assert not same_computation(given, {**of(1, 16, pretrained=other, tokenizer=other), "datasets": {}})
