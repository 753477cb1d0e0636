"""Law 7: two processes with half the batch each compute what one process computes."""

import pytest
from distributed import run_processes
from tiny_retrieval import half, model_and_batch, step
from torch.nn.parallel import DistributedDataParallel


@pytest.mark.parametrize("tuning", ["aurora", pytest.param("full", marks=pytest.mark.slow)])
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
