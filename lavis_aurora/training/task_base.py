"""What stands behind a task of LAVIS: its datasets are checked, and the parts of its loss are kept."""

from __future__ import annotations

import torch.distributed as dist
from lavis.tasks.base_task import BaseTask
from torch import Tensor, nn

from lavis_aurora.data.annotations import build_checked
from lavis_aurora.data.samples import set_ids_apart
from lavis_aurora.errors import AuroraError


class AuroraTaskBase(BaseTask):
    """Last of a task's bases, so that what LAVIS's task does with its datasets and in a step runs on top of it.

    Attributes:
        losses: of the last step, detached: what the model's output holds under names with "loss".
    """

    losses: dict[str, Tensor]

    def build_datasets(self, cfg) -> dict:
        """Datasets by name and split, their files checked; ids of different training sets are different."""
        datasets = {name: build_checked(name, cfg.datasets_cfg[name]) for name in cfg.datasets_cfg}
        set_ids_apart({name: splits["train"] for name, splits in datasets.items() if "train" in splits})
        return datasets

    def train_step(self, model: nn.Module, samples: dict) -> Tensor:
        """The loss of a batch.

        Raises:
            AuroraError: the model asks for other processes, and there are none.
        """
        try:
            output = model(samples)
        except ValueError as error:
            if dist.is_initialized() or "process group" not in str(error):
                raise
            # BLIP-2's, CLIP's and ALPRO's losses, and LAVIS's blip_retrieval with negative_all_rank.
            raise AuroraError(
                "this model gathers the features of all processes and asks for them even where it is alone; start "
                "it by python -m torch.distributed.run --nproc_per_node=1 train.py, or leave that out where its "
                "configuration can (model.base.negative_all_rank: false)"
            ) from error
        self.losses = {key: output[key].detach() for key in output if "loss" in key and output[key] is not None}
        return output["loss"]
