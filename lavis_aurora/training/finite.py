"""Losses and gradients that are no numbers."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from lavis.common.dist_utils import get_rank
from torch import Tensor

from lavis_aurora.errors import AuroraError

# What LAVIS's samples say of themselves.
NAMES = ("instance_id", "image_id", "question_id", "text_input")
# So many in a row are no single bad batch.
MOST_IN_A_ROW = 10


class FiniteGuard:
    """Stops a run at the first step whose gradient is not finite, or skips such steps and counts them.

    On a GPU a step's outcome is read while the next one is computed, unless steps are to be skipped: then each step
    waits for it.

    Args:
        folder: where the samples of the bad batch are written.
        skip: leave the step out instead of stopping.
    """

    def __init__(self, folder: Path, skip: bool) -> None:
        self.folder, self.skip = folder, skip
        self.skipped = self._in_a_row = 0
        self._pending: tuple[Tensor, dict] | None = None

    def accepts(self, norm: Tensor, losses: Iterable[Tensor], samples: dict) -> bool:
        """Whether the step may be taken.

        Args:
            norm: of the gradient, the same on all processes.
            losses: of this process.
            samples: the batch, with ``epoch`` and ``iters`` from 0.

        Raises:
            AuroraError: the numbers are not finite and the step is not to be skipped.
        """
        finite = torch.isfinite(torch.stack([norm.detach().float(), *(x.detach().float() for x in losses)]))
        # Processes agree on the gradient alone.
        flag = finite[0] if self.skip else finite.all()
        if flag.device.type == "cpu" or self.skip:
            return self._judge(flag, samples)
        self.flush()
        self._pending = flag, samples
        return True

    def flush(self) -> None:
        """Read the outcome that is still pending; to be called before anything is saved."""
        if self._pending is not None:
            (flag, samples), self._pending = self._pending, None
            self._judge(flag, samples)

    def _judge(self, flag: Tensor, samples: dict) -> bool:
        if flag:
            self._in_a_row = 0
            return True
        epoch, step = samples["epoch"], samples["iters"]
        path = self.folder / f"not_finite_epoch_{epoch}_step_{step}_process_{get_rank()}.json"
        batch = {key: _plain(samples[key]) for key in NAMES if key in samples}
        path.write_text(json.dumps({"epoch": epoch, "step": step, **batch}, indent=1), encoding="utf-8")
        message = f"epoch {epoch + 1}, step {step + 1}: loss or gradient is not finite; the batch is named in {path}"
        self.skipped += 1
        self._in_a_row += 1
        if not self.skip:
            raise AuroraError(f"{message}; lower run.init_lr, or set run.skip_nonfinite: true")
        if self._in_a_row > MOST_IN_A_ROW:
            raise AuroraError(f"{message}; so were the {MOST_IN_A_ROW} before it; lower run.init_lr")
        logging.warning("%s; the step is skipped", message)
        return False


def _plain(value: object) -> object:
    return value.tolist() if isinstance(value, Tensor) else [str(entry) for entry in value]
