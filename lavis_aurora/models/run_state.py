"""What a checkpoint of a run holds of a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lavis_aurora.errors import AuroraError, some
from lavis_aurora.models.checkpoint import check_finite


class RunState:
    """Mixin of models that runner_aurora trains: their trained parameters and the momentum copies of these."""

    def _run_parameters(self) -> dict[str, nn.Parameter]:
        """What a run changes: trained parameters and their momentum copies."""
        pairs = [zip(trained.parameters(), copy.parameters()) for trained, copy in getattr(self, "model_pairs", ())]
        changed = {id(p_m) for pair in pairs for p, p_m in pair if p.requires_grad}
        return {name: p for name, p in self.named_parameters() if p.requires_grad or id(p) in changed}

    def run_state(self) -> dict[str, Tensor]:
        """State that a checkpoint of a run must hold: trained parameters and their momentum copies."""
        return {name: parameter.detach().cpu() for name, parameter in self._run_parameters().items()}

    def load_run_state(self, state: dict[str, Tensor], source: str) -> None:
        """Load what :meth:`run_state` gave; anything missing, foreign, of another shape or NaN is an error."""
        check_finite(state, source)
        own = self._run_parameters()
        problems = [f"{name} is missing" for name in own.keys() - state.keys()]
        problems += [f"{name} is not trained here" for name in state.keys() - own.keys()]
        problems += [
            f"{name} is {tuple(state[name].shape)} there and {tuple(own[name].shape)} here"
            for name in own.keys() & state.keys()
            if own[name].shape != state[name].shape
        ]
        if problems:
            raise AuroraError(
                f"{source} does not fit this model: {some(sorted(problems), separator='; ')}; give the options of "
                f"its run again (config.yaml beside it holds them)"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])

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
