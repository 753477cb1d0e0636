"""Nested training: which ranks a step trains, what the optimizer leaves alone, and the rank that is enough."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import run_processes
from lavis.tasks.retrieval import RetrievalTask
from runs import assert_same, final, only_run, task_of, train_epoch, training_state
from tiny import CAPTIONS, activate, project_yaml, tiny_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from toy import adapted_toy, inputs

from lavis_aurora import AuroraError
from lavis_aurora.adapters.config import read_adapter
from lavis_aurora.config.method import NESTED_STEPS
from lavis_aurora.encoders.towers import compile_layers
from lavis_aurora.mode_approx.factors import ModeFactors
from lavis_aurora.project import load_config
from lavis_aurora.training import loop
from lavis_aurora.training.checkpoints import read_checkpoint
from lavis_aurora.training.nested import NestedSteps, RankRow, enough, nested_steps, standard_error, table
from lavis_aurora.training.runner import AuroraRunner
from lavis_aurora.training.start import find_rank
from lavis_aurora.training.tasks.base import check_model, runnable_task
from lavis_aurora.training.tasks.retrieval import image_scores
from lavis_aurora_cli import main, train

NESTED = {"nested": True, "nested_ranks": [1, 2, 4]}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def untrained(**settings) -> nn.Module:
    model = adapted_toy(rank=6, **{**NESTED, **settings})
    for v in model.mode_approx["default"].V.values():
        nn.init.zeros_(v)
    return model


def steps_of(model: nn.Module | None = None, seed: int = 3, accumulated: int = 1, **settings) -> NestedSteps:
    model = model or untrained(**settings)
    return NestedSteps(model.mode_approx, sgd(model), seed, epochs=4, batches=1000, accumulated=accumulated)


# The rank of a step


def test_the_components_in_use_grow_and_three_steps_of_ten_train_fewer():
    """Of 4,000 steps: from 800 on 2 are in use, from 1,600 on 4, from 2,400 on all 6."""
    steps, drawn = steps_of(), {}
    for i in range(4000):
        drawn.setdefault(min(i // 800, 3), Counter())[steps.rank_of(i // 1000, i % 1000)] += 1
    assert [set(drawn[stage]) for stage in range(4)] == [{1}, {1, 2}, {1, 2, 4}, {1, 2, 4, 6}]
    for stage, largest in ((1, 2), (2, 4), (3, 6)):
        counts = drawn[stage]
        assert 0.65 < counts[largest] / sum(counts.values()) < 0.75
        assert max(counts[rank] for rank in counts if rank < largest) < 0.4 * sum(counts.values())


def test_growing_ends_with_all_components_in_short_runs_and_with_one_smaller_rank():
    model = untrained(nested_ranks=[2])
    steps = NestedSteps(model.mode_approx, sgd(model), 3, epochs=1, batches=10)
    drawn = [steps.rank_of(0, batch) for batch in range(10)]
    assert drawn[:6] == [2] * 6 and 6 in drawn[6:]


def test_more_epochs_of_a_finished_run_do_not_take_components_back():
    model = untrained()
    with torch.no_grad():
        for v in model.mode_approx["default"].V.values():
            v[:, :3] = 1.0  # components of rank 4 are trained
    steps = steps_of(model)
    assert {steps.rank_of(0, batch) for batch in range(100)} == {1, 2, 4}
    assert {steps.rank_of(3, batch) for batch in range(100)} == {1, 2, 4, 6}


def test_all_or_a_few_from_the_start():
    steps = steps_of(nested_steps="one")
    drawn = Counter(steps.rank_of(0, batch) for batch in range(1000))
    assert set(drawn) == {6, 1, 2, 4} and 0.45 < drawn[6] / 1000 < 0.55


def test_any_rank_a_step():
    steps = steps_of(nested_steps="uniform")
    assert {steps.rank_of(0, batch) for batch in range(200)} == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("kind", NESTED_STEPS)
def test_ranks_follow_from_seed_and_step_alone(kind):
    model = untrained(nested_steps=kind)
    one, other = (steps_of(model, accumulated=2) for _ in range(2))
    torch.manual_seed(5)
    backwards = [other.rank_of(2, batch) for batch in reversed(range(580, 620))][::-1]
    drawn = [one.rank_of(2, batch) for batch in range(580, 620)]
    assert drawn == backwards
    # All batches of a step of the optimizer have the same.
    assert drawn[::2] == drawn[1::2]
    assert drawn != [one.rank_of(3, batch) for batch in range(580, 620)]
    assert drawn != [steps_of(model, seed=4, accumulated=2).rank_of(2, batch) for batch in range(580, 620)]


def test_models_that_are_not_nested_have_no_such_steps():
    run = {"seed": 1, "accum_grad_iters": 1}
    for model in (adapted_toy(), nn.Linear(2, 2)):
        assert nested_steps(model, sgd(nn.Linear(2, 2)), run, 10) is None


# The optimizer


def plain_adamw(values, gradients, ranks, lr=0.05, decay=0.1, betas=(0.9, 0.999), eps=1e-8):
    """AdamW, column by column, which a step of a lower rank passes by."""
    values = values.clone()
    mean, square = torch.zeros_like(values), torch.zeros_like(values)
    for step, (gradient, rank) in enumerate(zip(gradients, ranks), start=1):
        for column in range(rank):
            g = gradient[:, column]
            values[:, column] *= 1 - lr * decay
            mean[:, column] = betas[0] * mean[:, column] + (1 - betas[0]) * g
            square[:, column] = betas[1] * square[:, column] + (1 - betas[1]) * g * g
            m = mean[:, column] / (1 - betas[0] ** step)
            v = square[:, column] / (1 - betas[1] ** step)
            values[:, column] -= lr * m / (v.sqrt() + eps)
    return values


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "with a scaler"])
def test_adam_leaves_components_alone_that_were_not_trained(scaled):
    """Values and moments, with momentum and weight decay, against a plain computation; also between resumes."""
    model = adapted_toy(rank=6, **NESTED, nested_steps="one")
    factors, x = model.mode_approx, inputs(50)
    parameters = list(factors["default"].parameters())
    start = [p.detach().clone() for p in parameters]
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=8.0)

    def optimizer_of(state=None):
        optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)
        if state is not None:
            optimizer.load_state_dict(state)
        return optimizer, NestedSteps(factors, optimizer, 6, epochs=1, batches=12)

    optimizer, steps = optimizer_of()
    gradients, ranks = [], []
    for batch in range(12):
        if batch == 6:
            optimizer, steps = optimizer_of(optimizer.state_dict())
        rank = steps.rank_of(0, batch)
        with steps.trained(0, batch):
            scaler.scale(model(x).square().mean() * (1 + batch)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        gradients.append([p.grad.clone() for p in parameters])
        ranks.append(rank)
        before = [p.detach().clone() for p in parameters]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        for p, old in zip(parameters, before):
            assert torch.equal(p[:, rank:], old[:, rank:]) and not torch.equal(p[:, :rank], old[:, :rank])
    assert set(ranks) >= {1, 6}
    for i, p in enumerate(parameters):
        expected = plain_adamw(start[i], [one[i] for one in gradients], ranks)
        torch.testing.assert_close(p.detach(), expected)


# The loop


def batches(count: int = 6, size: int = 4, rows: slice = slice(None)) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    pictures = torch.randn(count, size, 3, 48, 48, generator=generator)
    ids = torch.arange(count * size).view(count, size)
    texts = CAPTIONS[:size][rows]
    return [{"image": x[rows], "text_input": texts, "image_id": i[rows]} for x, i in zip(pictures, ids)]


def nested_model(**settings) -> nn.Module:
    torch.manual_seed(0)  # of the hard negatives
    ranks = {"nested": True, "nested_ranks": [2, 4], "nested_steps": "one"}
    method = {"rank": 8, "targets": "all_linear", **ranks, **settings}
    return activate(tiny_model(mode_approx=method, momentum=0.75, queue_size=32, alpha=0.4), std=0.1).train()


def epoch(folder: Path, model: nn.Module, rows: slice = slice(None), **run) -> nn.Module:
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    optimizer = sgd(inner)
    state = training_state(task_of("retrieval_aurora"), model, batches(rows=rows), folder, optimizer, **run)
    state.nested = nested_steps(inner, optimizer, state.run, state.steps)
    train_epoch(state)
    return inner


def test_a_step_trains_the_components_that_are_drawn(tmp_path):
    """Against plain gradient descent, teacher and queue included."""
    model, plain = nested_model(), nested_model()
    epoch(tmp_path, model, seed=3)
    optimizer = sgd(plain)
    steps, drawn = NestedSteps(plain.mode_approx, sgd(plain), 3, epochs=1, batches=6), set()
    for i, samples in enumerate(batches()):
        samples.update(epoch=0, iters=i, num_iters_per_epoch=6)
        rank = steps.rank_of(0, i)
        drawn.add(rank)
        with plain.mode_approx.first(rank):
            plain(samples)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(drawn) > 1 and 8 in drawn
    assert_close_states(model, plain)


def assert_close_states(model: nn.Module, other: nn.Module, **tolerances: float) -> None:
    state = other.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], **tolerances, msg=lambda text, name=name: f"{name}: {text}")


def in_one_of_two(rank: int, folder: str) -> dict:
    model = DistributedDataParallel(nested_model(), broadcast_buffers=False)
    return {name: p.detach() for name, p in epoch(Path(folder), model, slice(rank, None, 2)).named_parameters()}


def test_two_processes_train_as_one(tmp_path):
    one = dict(epoch(tmp_path, nested_model()).named_parameters())
    for two in run_processes(2, in_one_of_two, str(tmp_path)):
        for name, p in one.items():
            torch.testing.assert_close(two[name], p.detach(), rtol=1e-3, atol=2e-5)


def test_what_is_not_nested_trains_as_if_there_were_no_such_thing(tmp_path, monkeypatch):
    """Bit for bit: one pass a step, of all components, without a context around it."""
    monkeypatch.setattr(ModeFactors, "first", None)
    model = nested_model(nested=False)
    optimizer = sgd(model)
    state = training_state(task_of("retrieval_aurora"), model, batches(), tmp_path, optimizer)
    assert nested_steps(model, optimizer, state.run, state.steps) is None
    train_epoch(state)
    plain = nested_model(nested=False)
    optimizer = sgd(plain)
    for i, samples in enumerate(batches()):
        samples.update(epoch=0, iters=i, num_iters_per_epoch=6)
        plain(samples)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_close_states(model, plain, rtol=0, atol=0)


@pytest.mark.slow
def test_compiled_layers_train_each_rank(tmp_path):
    models = [nested_model(), nested_model()]
    compile_layers(models[1], backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for model in models:
        epoch(tmp_path, model, seed=3)
    assert_close_states(*models, rtol=1e-3, atol=1e-4)
    assert not torch._dynamo.utils.counters["graph_break"]


# Whole runs

RUN = {"max_epoch": 2, "batch_size_train": 2, "resume": "auto", "save_queue": True, "checkpoint_every": 1}
MODEL = {"mode_approx": {"rank": 8, "nested": True, "nested_ranks": [2, 4]}, "queue_size": 16}


@pytest.mark.slow
def test_a_stopped_run_ends_as_an_undisturbed_one(tmp_path, monkeypatch):
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        yaml = project_yaml(tmp_path / name, count=4, model=MODEL, run={**RUN, "rank": "auto"})
        if name == "stopped":
            original, steps = loop._update, iter(range(100))

            def update(*args, original=original, steps=steps):
                if next(steps) == 2:  # of two epochs of two steps
                    os.kill(os.getpid(), signal.SIGTERM)
                return original(*args)

            with monkeypatch.context() as patch, pytest.raises(SystemExit):
                patch.setattr(loop, "_update", update)
                train(["--cfg-path", str(yaml)])
        train(["--cfg-path", str(yaml)])
    assert_same(*(final(tmp_path / name) for name in ("whole", "stopped")))
    tables = [read_adapter(only_run(tmp_path / name) / "adapter_auto")[1] for name in ("whole", "stopped")]
    assert_same(*tables)


def test_auto_writes_the_smallest_rank_that_is_enough(tmp_path, capsys, caplog):
    yaml = project_yaml(tmp_path, count=10, model=MODEL, run={"rank": "auto"})
    with caplog.at_level(logging.INFO):
        train(["--cfg-path", str(yaml)])
    run = only_run(tmp_path)
    table = json.loads((run / "ranks.json").read_text())
    rows = [RankRow(**row) for row in table["ranks"]]
    assert [row.rank for row in rows] == [2, 4, 8] and table["split"] == "val"
    assert table["chosen"] == enough(rows).rank
    whole = json.loads((run / "result" / "val_epoch_rank_8.json").read_text())
    assert rows[-1].metric == pytest.approx(whole["metrics"]["agg_metrics"])
    # Pictures with one text each: the plain error over pictures.
    hits = [[np.mean([r < k for k in (1, 5, 10)]) for r in whole["ranks"][d]] for d in whole["k_test"]]
    assert rows[-1].error == pytest.approx(100 * np.std(np.mean(hits, axis=0), ddof=1) / 10**0.5)
    config, tensors = read_adapter(run / "adapter_auto")
    best, whole_tensors = read_adapter(run / "adapter_best")
    chosen = table["chosen"]
    assert config.settings.rank == chosen
    assert torch.equal(tensors["factors.P"], whole_tensors["factors.P"][:, :chosen])
    assert config.metrics["test"]["agg_metrics"] == pytest.approx(table["metrics"]["test"]["agg_metrics"])
    assert config.metrics["epoch"] == best.metrics["epoch"]
    assert rows[-1].parameters == sum(tensor.numel() for tensor in whole_tensors.values())
    assert next(row for row in rows if row.rank == chosen).parameters == sum(x.numel() for x in tensors.values())
    assert (run / "ranks.png").is_file()
    assert f"run.rank: {chosen} of 8 components are enough" in caplog.text
    assert "enough" in capsys.readouterr().out


@pytest.mark.slow
def test_without_a_test_the_best_epoch_is_ranked_all_the_same(tmp_path, monkeypatch):
    """The adapter that is cut is the best epoch's, and so the model that is measured must be."""
    metrics, original = iter([90.0, 10.0, 20.0]), AuroraRunner.eval_epoch

    def eval_epoch(self, split_name, cur_epoch, **kwargs):
        log = original(self, split_name=split_name, cur_epoch=cur_epoch, **kwargs)
        if not str(cur_epoch).startswith("rank"):
            return {**log, "agg_metrics": next(metrics)}
        measured.append({name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad})
        return log

    measured: list[dict] = []
    monkeypatch.setattr(AuroraRunner, "eval_epoch", eval_epoch)
    run = {"rank": "auto", "test_splits": [], "max_epoch": 3}
    train(["--cfg-path", str(project_yaml(tmp_path, count=4, model=MODEL, run=run))])
    best = read_checkpoint(only_run(tmp_path) / "checkpoint_best.pth")
    assert best["epoch"] == 0 and len(measured) == 3
    for name, value in measured[0].items():
        assert torch.equal(value, best["model"][name]), name
    # Gone on from in another folder, where no epoch is better.
    source, run["max_epoch"] = only_run(tmp_path), 4
    run["resume_ckpt_path"] = str(source / "checkpoint_latest.pth")
    run["output_dir"] = str(tmp_path / "more" / "output")
    metrics = iter([5.0])
    train(["--cfg-path", str(project_yaml(tmp_path, model=MODEL, run=run))])
    again = only_run(tmp_path / "more") / "adapter_best"
    assert_same(read_adapter(again)[1], read_adapter(source / "adapter_best")[1])


def test_the_rank_of_a_finished_run(tmp_path, monkeypatch, capsys):
    yaml = project_yaml(tmp_path, count=5, model=MODEL)
    train(["--cfg-path", str(yaml)])
    run = only_run(tmp_path)
    checkpoints = {path.name: path.read_bytes() for path in run.glob("*.pth")}
    monkeypatch.chdir(tmp_path)
    main(["rank", str(run)])
    table = json.loads((run / "ranks.json").read_text())
    main(["rank", str(run), "--options", "run.batch_size_eval=3"])
    assert json.loads((run / "ranks.json").read_text()) == table
    assert only_run(tmp_path) == run
    assert (run / "adapter_auto").is_dir() and (run / "ranks.png").is_file()
    assert {path.name: path.read_bytes() for path in run.glob("*.pth")} == checkpoints
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"

    def held(*_args: object) -> None:
        raise BlockingIOError

    monkeypatch.setattr(fcntl, "lockf", held)
    with pytest.raises(SystemExit):
        main(["rank", str(run)])
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: RUN: {run} is in use by another process")


def test_what_has_no_rank_to_find_is_refused(tmp_path):
    plain = project_yaml(tmp_path)
    with pytest.raises(AuroraError, match="run.rank: auto compares ranks on the first of run.valid_splits"):
        load_config(str(plain), ["run.rank=auto", "run.valid_splits=[]"])
    with pytest.raises(AuroraError, match="run.rank: unknown value"):
        load_config(str(plain), ["run.rank=automatic"])
    with pytest.raises(AuroraError, match="model.mode_approx.nested: true"):
        load_config(str(plain), ["run.rank=auto"])
    nested = project_yaml(tmp_path, model=MODEL)
    with pytest.raises(AuroraError, match="train it with model.tuning: aurora"):
        load_config(str(nested), ["run.rank=auto", "model.tuning=lora", "model.context.form=none"])
    cfg = load_config(str(nested), ["run.rank=auto"])
    with pytest.raises(AuroraError, match="run.rank: auto needs the score of each sample, which run.task retrieval"):
        check_model(runnable_task(RetrievalTask), nested_model(), cfg)
    with pytest.raises(AuroraError, match="no folder of a finished run"):
        find_rank(str(tmp_path))


# The choice


def test_the_smallest_within_one_standard_error_is_enough():
    rows = [RankRow(4, 70, 2, 1), RankRow(8, 78.5, 2, 2), RankRow(16, 80, 1.5, 4), RankRow(32, 79, 9, 8)]
    assert enough(rows).rank == 8
    assert enough([row._replace(error=1) for row in rows]).rank == 16
    assert enough(rows[::-1]).rank == 8
    assert len(table("val", rows, enough(rows)).splitlines()) == 5
    chance = [row._replace(metric=20.0 - row.rank / 32) for row in rows]
    assert enough(chance).rank == 4
    assert table("val", chance, enough(chance)).splitlines()[5].startswith("the ranks do not differ by more than")


def test_error_of_a_mean():
    assert standard_error([1, 2, 3, 4]) == pytest.approx((5 / 3) ** 0.5 / 2)
    assert standard_error([1]) == float("inf")


def test_a_picture_counts_with_its_texts():
    """Their mean is that of both directions, however many texts a picture has."""
    image_ranks, text_ranks, image_of = [0, 7, 20], [0, 3, 12, 0, 6], [0, 0, 1, 2, 2]
    scores = image_scores(image_ranks, text_ranks, image_of)
    recalls = [np.mean(np.array(ranks) < k) for ranks in (image_ranks, text_ranks) for k in (1, 5, 10)]
    assert np.mean(scores) == pytest.approx(100 * np.mean(recalls))
    assert scores[1] == pytest.approx(50 * (1 / 3 + 0))
