"""What a checkpoint of a run takes from a model."""

from __future__ import annotations

import pytest
import torch
from distributed import run_processes
from tiny import tiny_model
from torch.nn.parallel import DistributedDataParallel
from toy import NormedToy, train_steps

from lavis_aurora import AuroraError, ModeApproxConfig, load_adapter, save_adapter
from lavis_aurora.models.mode_approx_model import ModeApproxModel
from lavis_aurora.training.checkpoints import KEYS, read_checkpoint, write_checkpoint


def test_queues_are_copies_that_training_leaves_alone():
    model = tiny_model(queue_size=16)
    kept = model.queue_state()
    before = {name: queue.clone() for name, queue in model.queues().items()}
    assert kept.keys() == before.keys() and kept
    for queue in model.queues().values():
        queue.zero_()
    assert all(torch.equal(kept[name], before[name]) for name in kept)
    assert model.load_queue_state(kept)
    assert all(torch.equal(queue, before[name]) for name, queue in model.queues().items())


# Running statistics


def wrapped() -> ModeApproxModel:
    """A model whose head has running statistics, trained with its momentum copy."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ModeApproxModel(NormedToy(), ModeApproxConfig(rank=2, targets=[r"tower\.query"]), ["head"])


def test_a_run_goes_on_with_the_buffers_of_what_is_trained(tmp_path):
    undisturbed, stopped, resumed = wrapped(), wrapped(), wrapped()
    train_steps(undisturbed, 0, 6)
    train_steps(stopped, 0, 3)
    write_checkpoint({**dict.fromkeys(KEYS), "model": stopped.run_state()}, tmp_path / "latest.pth")
    state = read_checkpoint(tmp_path / "latest.pth")["model"]
    assert state["base.head.1.num_batches_tracked"] == 6 and "base.head_m.3.running_var" in state
    assert not any("tower" in key for key in state)
    resumed.load_run_state(state, "latest.pth")
    train_steps(resumed, 3, 6)
    assert undisturbed.state_dict().keys() == resumed.state_dict().keys()
    for key, value in undisturbed.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_a_checkpoint_without_buffers_says_what_it_lacks(caplog):
    tuned, model = wrapped(), wrapped()
    train_steps(tuned, 0, 2)
    state = {key: value for key, value in tuned.run_state().items() if "running" not in key and "batches" not in key}
    model.load_run_state(state, "old.pth")
    [message] = [record.getMessage() for record in caplog.records]
    assert message.startswith("old.pth holds no base.head.1.running_mean") and "stay as they are" in message
    assert torch.equal(model.base.head[0].weight, tuned.base.head[0].weight)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("base.head.1.num_batches_tracked", torch.tensor(2.0), r"is \(\) there and \(\) of torch.int64 here"),
        ("base.head.1.running_mean", torch.zeros(3), r"is \(3,\) there and \(4,\) here"),
        ("base.head.1.running_var", torch.full((4,), torch.nan), "holds NaN or infinite weights"),
        ("base.tower.norm.running_mean", torch.zeros(6), "base.tower.norm.running_mean is not trained here"),
    ],
)
def test_buffers_that_do_not_fit_are_refused(key, value, words):
    model = wrapped()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(AuroraError, match=words):
        model.load_run_state({**model.run_state(), key: value}, "latest.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_teacher_takes_the_buffers_of_an_adapter_that_is_loaded(tmp_path):
    tuned, model = wrapped(), wrapped()
    train_steps(tuned, 0, 2)
    save_adapter(tuned, tmp_path)
    load_adapter(model, tmp_path, "other")
    assert torch.equal(model.head_m[1].running_mean, wrapped().head_m[1].running_mean)
    load_adapter(model, tmp_path)
    for part in (model.head, model.head_m):
        assert torch.equal(part[1].running_mean, tuned.head[1].running_mean)
        assert part[1].num_batches_tracked == tuned.head[1].num_batches_tracked


def epoch_in_two_processes(rank: int) -> tuple[dict, dict]:
    """Statistics after an epoch in which each process has samples of its own, before and after they are shared."""
    model = wrapped()
    one = DistributedDataParallel(model, broadcast_buffers=False)
    for i in range(2):
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(i))
        one(x[rank::2]).square().mean().backward()
    before = {name: buffer.numpy().copy() for name, buffer in model.named_buffers()}
    model.share_buffers()
    return before, {name: buffer.numpy() for name, buffer in model.named_buffers()}


def test_all_processes_evaluate_with_the_main_ones_statistics():
    (own, first), (other, second) = run_processes(2, epoch_in_two_processes)
    assert (own["base.head.1.running_mean"] != other["base.head.1.running_mean"]).any()
    for name, value in first.items():
        assert (value == own[name]).all() and (value == second[name]).all(), name
