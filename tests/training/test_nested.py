"""Nested training: which ranks a step trains and what the optimizer leaves alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from distributed import run_processes
from runs import task_of, train_epoch, training_state
from tiny import CAPTIONS, activate, tiny_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from toy import adapted_toy, inputs

from lavis_aurora.config.method import NESTED_STEPS
from lavis_aurora.encoders.towers import compile_layers
from lavis_aurora.mode_approx.factors import ModeFactors
from lavis_aurora.training.nested import NestedSteps, nested_steps

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
