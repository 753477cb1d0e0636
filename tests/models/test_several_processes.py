"""Law 7: two processes with half the batch each compute what one process computes."""

import pytest
import torch
from distributed import run_processes
from tiny import activate, tiny_model
from torch.nn.parallel import DistributedDataParallel

CAPTIONS = ["a red circle", "a big blue square and a small star", "a ring", "a small pink heart"]


def model_and_batch(tuning: str, rows: slice, **overrides):
    torch.manual_seed(0)
    model = activate(tiny_model(tuning=tuning, queue_size=6, alpha=0.4, **overrides)).train()
    image = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(5))
    samples = {
        "image": image[rows],
        "text_input": CAPTIONS[rows],
        "image_id": torch.arange(4)[rows],
        "epoch": 1,
        "iters": 3,
        "num_iters_per_epoch": 10,
    }
    return model, samples


def step(model, samples, module) -> tuple[dict, dict, torch.Tensor]:
    output = model(samples)
    output["loss"].backward()
    grads = {n: p.grad.numpy() for n, p in module.named_parameters() if p.grad is not None}
    losses = {k: output[k].item() for k in ("loss_itc", "loss_itm")}
    return losses, grads, module.idx_queue.numpy()


def half(rank: int, tuning: str):
    model, samples = model_and_batch(tuning, slice(rank, None, 2))
    return step(DistributedDataParallel(model, broadcast_buffers=False), samples, model)


@pytest.mark.parametrize("tuning", ["aurora", "full"])
def test_losses_and_gradients(tuning):
    model, samples = model_and_batch(tuning, slice(0, 4))
    losses, grads, queue = step(model, samples, model)
    (first, grads_0, queue_0), (second, grads_1, queue_1) = run_processes(2, half, tuning)
    for name, value in losses.items():
        assert (first[name] + second[name]) / 2 == pytest.approx(value, abs=1e-5)
    assert grads.keys() == grads_0.keys() == grads_1.keys()
    for name, grad in grads.items():
        scale = max(abs(grad).max(), 1e-3)
        assert abs(grads_0[name] - grad).max() / scale < 1e-3, name
    assert (queue_0 == queue).all()
    assert (queue_1 == queue).all()


OWN_NEGATIVES = {"negative_all_rank": False, "context": {"form": "none"}}


def half_with_own_negatives(rank: int):
    model, samples = model_and_batch("aurora", slice(rank, None, 2), **OWN_NEGATIVES)
    return step(DistributedDataParallel(model, broadcast_buffers=False), samples, model)[0]


def test_without_negatives_of_all_processes_each_matches_within_its_own_batch():
    """As on Flickr30K. In a batch of two, each sample's negative is the other."""
    found = run_processes(2, half_with_own_negatives)
    for rank, losses in enumerate(found):
        model, samples = model_and_batch("aurora", slice(rank, None, 2), **OWN_NEGATIVES)
        assert losses["loss_itm"] == pytest.approx(model(samples)["loss_itm"].item(), abs=1e-5)
    model, samples = model_and_batch("aurora", slice(0, 4), **OWN_NEGATIVES)
    assert sum(losses["loss_itc"] for losses in found) / 2 == pytest.approx(
        model(samples)["loss_itc"].item(), abs=1e-5
    )
