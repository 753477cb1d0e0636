"""What makes the losses those of the whole batch: exchange between processes, the same draw of hard negatives, and
computing a batch in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import cast

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_rank, get_world_size, is_dist_avail_and_initialized
from lavis.models.base_model import all_gather_with_grad, concat_all_gather
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import BatchEncoding


def to_device(tokens: BatchEncoding, device: torch.device | str) -> BatchEncoding:
    """``tokens`` on ``device``. A GPU is not waited for: it copies from pinned memory when its turn comes."""
    if torch.device(device).type != "cuda":
        return tokens.to(device)
    # Pinned memory is used again only after the copy, for which torch watches the stream.
    return BatchEncoding({key: ids.pin_memory().to(device, non_blocking=True) for key, ids in tokens.items()})


def broadcast_seed(device: torch.device) -> int:
    """Rank 0's seed, known to every process."""
    seed = torch.tensor([torch.initial_seed() % 2**62], dtype=torch.long, device=device)
    if is_dist_avail_and_initialized():
        dist.broadcast(seed, src=0)
    return int(seed)


@lru_cache(maxsize=1)
def _gloo_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """The processes of ``world``, talking from CPU to CPU."""
    if "gloo" in dist.get_backend_config(world):
        return world
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo"))  # a number for those outside; there are none


def all_reduce_max_length(length: int) -> int:
    """The largest of the processes' lengths. It is exchanged between CPUs, so that no GPU is waited for."""
    longest = torch.tensor(length)
    dist.all_reduce(longest, dist.ReduceOp.MAX, group=_gloo_group(dist.group.WORLD))
    return int(longest)


def gather(tensor: Tensor, with_grad: bool = False) -> Tensor:
    """The tensors of all processes as one batch, in the order in which one process would have met the samples.

    Sample i of the batch of one process is sample i // processes of process i % processes.
    """
    if not is_dist_avail_and_initialized():
        return tensor
    rows = (all_gather_with_grad if with_grad else concat_all_gather)(tensor.contiguous())
    ordered: Tensor = rows.unflatten(0, (get_world_size(), -1)).transpose(0, 1).flatten(0, 1)
    return ordered


def sample_hard_negatives(logits: Tensor, same: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """For each row a column drawn with probability softmax(logits) among those that are not ``same``.

    Drawn by the largest of logits + Gumbel noise: nothing underflows, nothing waits for the GPU. The noise is
    that of the whole batch over all processes; each takes the rows of its own samples.

    Args:
        logits: similarity / temperature, (batch, all).
        same: True where the column shows the row's own image, (batch, all).
        generator: seeded alike on every process.

    Returns:
        column (batch,), and whether the row has any true negative (batch,); without one the column is arbitrary.
    """
    rows, columns = logits.shape
    exponential = torch.empty(max(rows, columns), columns, device=logits.device).exponential_(generator=generator)
    if columns > rows:
        exponential = exponential[get_rank() :: columns // rows]
    scores = logits.float().masked_fill(same, float("-inf")) - exponential[:rows].log()
    return scores.argmax(dim=1), ~same.all(dim=1)


def compute_in_parts(
    compute: Callable[..., Iterable[Tensor]], size: int | None, *batch: Tensor, whole: tuple[Tensor, ...] = ()
) -> list[Tensor]:
    """What ``compute`` gives for a batch, of which one part's activations at a time are kept.

    In the backward pass each part is computed again, with the same draws of dropout: gradients are those of the whole
    batch, at the cost of a second forward pass (gradient caching, Gao et al., 2021, which losses over pairs need in
    place of accumulated gradients).

    Args:
        compute: from parts of the batch, and ``whole``, to tensors with a row for each sample.
        size: samples of a part; None: all of them at once.
        batch: tensors with a row for each sample.
        whole: further arguments.

    Returns:
        The tensors of all parts, one after the other.
    """
    if size is None or size >= len(batch[0]):
        return list(compute(*batch, *whole))
    parts = zip(*(torch.split(tensor, size) for tensor in batch))
    if torch.is_grad_enabled():
        computed = [checkpoint(compute, *part, *whole, use_reentrant=False) for part in parts]
    else:
        computed = [compute(*part, *whole) for part in parts]
    return [torch.cat(tensors) for tensors in zip(*computed)]
