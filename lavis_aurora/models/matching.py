"""What image-text matching exchanges between processes: features, lengths, and the same draw of hard negatives."""

from __future__ import annotations

from functools import lru_cache
from typing import cast

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_rank, get_world_size, is_dist_avail_and_initialized
from lavis.models.base_model import all_gather_with_grad, concat_all_gather
from torch import Tensor
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
