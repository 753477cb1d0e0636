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
from lavis_aurora.files import write_text

# What LAVIS's samples say of themselves.
NAMES = ("instance_id", "image_id", "question_id", "text_input")
# So many in a row are no single bad batch.
MOST_IN_A_ROW = 10
# In half precision the scale of the loss is found by halving it, about ten times at the start.
MOST_OVERFLOWS = 25


class FiniteGuard:
    """Stops a run at the first step whose gradient is not finite, or skips such steps and counts them.

    On a GPU a step's outcome is read while the next one is computed, unless steps may be skipped: then each step
    waits for it.

    Args:
        folder: where the samples of the bad batch are written.
        skip: leave the step out instead of stopping.
    """

    def __init__(self, folder: Path, skip: bool) -> None:
        self.folder, self.skip = folder, skip
        self.skipped = self._in_a_row = 0
        self._pending: tuple[Tensor, dict] | None = None

    def accepts(self, norm: Tensor, losses: Iterable[Tensor], samples: dict, scaled: bool = False) -> bool:
        """Whether the step may be taken.

        Args:
            norm: of the gradient, the same on all processes.
            losses: of this process.
            samples: the batch, with ``epoch`` and ``iters`` from 0.
            scaled: the loss was scaled, for half precision, in which a gradient may overflow: such a step is left
                out and counted, while its loss is finite.

        Raises:
            AuroraError: the numbers are not finite and the step is not to be skipped, or too many were in a row.
        """
        finite = torch.isfinite(torch.stack([norm.detach().float(), *(x.detach().float() for x in losses)]))
        if scaled and (self.skip or finite[1:].all()):
            # The scaler waits for the gradient too: to read it costs nothing more.
            return self._judge(finite[0], samples, scaled=True, overflow=bool(finite[1:].all()))
        # Processes agree on the gradient alone.
        flag = finite[0] if self.skip else finite.all()
        if flag.device.type == "cpu" or self.skip or scaled:
            return self._judge(flag, samples)
        self.flush()
        self._pending = flag, samples
        return True

    def flush(self) -> None:
        """Read the outcome that is still pending; to be called before anything is saved."""
        if self._pending is not None:
            (flag, samples), self._pending = self._pending, None
            self._judge(flag, samples)

    def _judge(self, flag: Tensor, samples: dict, scaled: bool = False, overflow: bool = False) -> bool:
        """Whether the step may be taken, ``flag``; too many overflows of scaled losses in a row are no overflows."""
        most = MOST_OVERFLOWS if scaled else MOST_IN_A_ROW
        if flag:
            self._in_a_row = 0
            return True
        self.skipped += 1
        self._in_a_row += 1
        epoch, step = samples["epoch"], samples["iters"]
        place = f"epoch {epoch + 1}, step {step + 1}"
        if overflow and self._in_a_row <= most:
            logging.info("%s: the gradient overflows in half precision; the step is skipped", place)
            return False
        path = self.folder / f"not_finite_epoch_{epoch}_step_{step}_process_{get_rank()}.json"
        batch = {key: _plain(samples[key]) for key in NAMES if key in samples}
        write_text(path, json.dumps({"epoch": epoch, "step": step, **batch}, indent=1))
        message = f"{place}: loss or gradient is not finite; the batch is named in {path}"
        if not self.skip and not overflow:
            raise AuroraError(f"{message}; lower run.init_lr, or set run.skip_nonfinite: true")
        if self._in_a_row > most:
            remedy = "lower run.init_lr, or set run.amp: false" if scaled else "lower run.init_lr"
            raise AuroraError(f"{message}; so were the {most} before it; {remedy}")
        logging.warning("%s; the step is skipped", message)
        return False


def _plain(value: object) -> object:
    return value.tolist() if isinstance(value, Tensor) else [str(entry) for entry in value]
