"""Progress of a training run as log lines, readable in a terminal and in a file."""

from __future__ import annotations

import logging
import time
from datetime import timedelta


class TrainingProgress:
    """Says epoch, step, losses, learning rate and time left.

    Args:
        epoch: from 0.
        epochs: of the whole run.
        steps: of an epoch.
        first: step at which the epoch goes on, if it was interrupted.
    """

    def __init__(self, epoch: int, epochs: int, steps: int, first: int = 0) -> None:
        self.epoch, self.epochs, self.steps, self.first = epoch, epochs, steps, first
        self.start = time.time()

    def log(self, step: int, losses: dict[str, float], lr: float) -> None:
        """Log a line after ``step`` (from 0)."""
        per_step = (time.time() - self.start) / (step + 1 - self.first)
        left = per_step * (self.steps - step - 1)
        run_left = left + per_step * self.steps * (self.epochs - self.epoch - 1)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
        logging.info(
            "epoch %d/%d  step %d/%d  %s  lr %.3g  %.3f s/step  left: epoch %s, training %s",
            self.epoch + 1,
            self.epochs,
            step + 1,
            self.steps,
            shown,
            lr,
            per_step,
            timedelta(seconds=round(left)),
            timedelta(seconds=round(run_left)),
        )
