"""What a checkpoint of a run holds of a model."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from lavis.common.dist_utils import is_dist_avail_and_initialized
from torch import Tensor, nn

from lavis_aurora.errors import AuroraError, some
from lavis_aurora.mode_approx.trainable import momentum_copies, trained_buffers
from lavis_aurora.models.checkpoint import check_finite


class RunState:
    """Mixin of models that runner_aurora trains: what is trained, and its momentum copies."""

    def _run_tensors(self) -> dict[str, Tensor]:
        """What a run changes: trained parameters, the buffers of trained modules, and momentum copies of both."""
        pairs = [zip(trained.parameters(), copy.parameters()) for trained, copy in momentum_copies(self)]
        changed = {id(p_m) for pair in pairs for p, p_m in pair if p.requires_grad}
        parameters = {name: p for name, p in self.named_parameters() if p.requires_grad or id(p) in changed}
        return {**parameters, **trained_buffers(self)}

    def run_state(self) -> dict[str, Tensor]:
        """State that a checkpoint of a run must hold: what is trained, buffers too, and momentum copies."""
        return {name: tensor.detach().cpu() for name, tensor in self._run_tensors().items()}

    def load_run_state(self, state: dict[str, Tensor], source: str) -> None:
        """Load what :meth:`run_state` gave; anything missing, foreign, of another shape or NaN is an error.

        Buffers may be missing, as in checkpoints of older versions: they stay as they are, and the log says so.
        """
        check_finite(state, source)
        own = self._run_tensors()
        lacking = [name for name in own if name not in state and not isinstance(own[name], nn.Parameter)]
        problems = [f"{name} is missing" for name in own.keys() - state.keys() - set(lacking)]
        problems += [f"{name} is not trained here" for name in state.keys() - own.keys()]
        problems += [
            f"{name} is {_kind(state[name])} there and {_kind(own[name])} here"
            for name in own.keys() & state.keys()
            if own[name].shape != state[name].shape
            or own[name].is_floating_point() != state[name].is_floating_point()
        ]
        if problems:
            raise AuroraError(
                f"{source} does not fit this model: {some(sorted(problems), separator='; ')}; give the options of "
                f"its run again (config.yaml beside it holds them)"
            )
        if lacking:
            logging.warning("%s holds no %s, which stay as they are; results may differ", source, some(lacking))
        with torch.no_grad():
            for name in own.keys() & state.keys():
                own[name].copy_(state[name])

    def share_buffers(self) -> None:
        """Let all processes have the main one's buffers of trained modules, which each fills from its own batches."""
        if is_dist_avail_and_initialized():
            for buffer in trained_buffers(self).values():
                dist.broadcast(buffer, src=0)

    def queues(self) -> dict[str, Tensor]:
        """Features of earlier batches that training compares with, by name; most models have none."""
        return {}

    def queue_state(self) -> dict[str, Tensor]:
        """Copies of the queues, for a checkpoint."""
        return {name: queue.to("cpu", copy=True) for name, queue in self.queues().items()}

    def load_queue_state(self, state: dict[str, Tensor]) -> bool:
        """Put back what :meth:`queue_state` gave; False, with nothing done, if it is not there or of another kind."""
        own = self.queues()
        kinds = [{name: (queue.shape, queue.dtype) for name, queue in queues.items()} for queues in (own, state)]
        if not kinds[0].items() <= kinds[1].items():
            return False
        for name, queue in own.items():
            queue.copy_(state[name])
        return True


def _kind(tensor: Tensor) -> str:
    """Shape of a tensor, and its type if it holds no floating point numbers."""
    return f"{tuple(tensor.shape)}{'' if tensor.is_floating_point() else f' of {tensor.dtype}'}"
