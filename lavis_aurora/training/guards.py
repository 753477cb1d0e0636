"""What ends a step or a run: NaN and infinite numbers, features that have collapsed, Ctrl-C and SIGTERM."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_rank, is_dist_avail_and_initialized
from torch import Tensor

from lavis_aurora.common.errors import Diverged
from lavis_aurora.common.files import write_text
from lavis_aurora.data.samples import SET

# What LAVIS's samples say of themselves.
NAMES = (SET, "instance_id", "image_id", "question_id", "text_input")
PLACE = ("epoch", "iters")
# So many in a row are no single bad batch.
MAX_CONSECUTIVE_SKIPS = 10
# In half precision the scale of the loss is found by halving it, about ten times at the start.
MAX_OVERFLOWS = 25
# Shares of the loss of chance: below the one, a model tells pairs apart; above the other, it does not.
LEARNED, AT_CHANCE = 0.9, 0.99
CHECK_EVERY, MAX_CHECKS = 25, 2  # steps; such checks in a row
MIN_PAIRS = 8  # with fewer, a loss is too noisy to be judged


class _Step(NamedTuple):
    """The batches whose gradients make a step.

    Attributes:
        finite: (batches, 2), whether the gradient after each batch is finite, and whether its losses are.
        batches: what names each.
    """

    finite: Tensor
    batches: list[dict[str, Any]]

    def agreed(self) -> Tensor:
        """``finite`` of all processes together, which must all ask for it."""
        finite = self.finite.int()
        if is_dist_avail_and_initialized():
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        return finite.bool()


class FiniteGuard:
    """Stops a run at the first step whose gradient is not finite, or skips such steps and counts them.

    On a GPU a step's outcome is read while the next one is computed, unless steps may be skipped: then each step
    waits for it. Of a step whose gradient is accumulated, the first batch that spoilt it is named.

    Args:
        folder: where the samples of the bad batch are written.
        skip: leave the step out instead of stopping.
    """

    def __init__(self, folder: Path, skip: bool) -> None:
        self.folder, self.skip = folder, skip
        self.skipped = self._consecutive = 0
        self._finite: list[Tensor] = []
        self._batches: list[dict[str, Any]] = []
        self._pending: tuple[Tensor, _Step] | None = None

    def start_epoch(self) -> None:
        """Count the skipped steps of an epoch from 0; those in a row go on."""
        self.skipped = 0

    def note(self, norm: Tensor, losses: Iterable[Tensor], samples: dict[str, Any]) -> None:
        """Keep what :meth:`accepts` must know of a batch that is not the last of its step; arguments are its own.

        Args:
            norm: of the gradient that is accumulated so far, on this process.
        """
        finite = torch.isfinite(torch.stack([norm.detach().float(), *(x.detach().float() for x in losses)]))
        self._finite.append(torch.stack([finite[0], finite[1:].all()]))
        # Not the pictures.
        self._batches.append({key: samples[key] for key in (*PLACE, *NAMES) if key in samples})

    def accepts(self, norm: Tensor, losses: Iterable[Tensor], samples: dict[str, Any], scaled: bool = False) -> bool:
        """Whether the step may be taken.

        Args:
            norm: of the gradient, the same on all processes.
            losses: of this process.
            samples: the step's last batch, with ``epoch`` and ``iters`` from 0.
            scaled: the loss was scaled, for half precision, in which a gradient may overflow: such a step is left
                out and counted, while the losses of all its batches are finite.

        Raises:
            Diverged: the numbers are not finite and the step is not to be skipped, or too many were in a row.
        """
        self.note(norm, losses, samples)
        step = _Step(torch.stack(self._finite), self._batches)
        self._finite, self._batches = [], []
        gradient, loss = step.finite[-1, 0], step.finite[:, 1].all()
        if scaled and (self.skip or loss):
            # The scaler waits for the gradient too: to read it costs nothing more.
            return self._judge(gradient, step, scaled=True)
        # Processes agree on the gradient alone.
        flag = gradient if self.skip else gradient & loss
        if flag.device.type == "cpu" or self.skip or scaled:
            return self._judge(flag, step)
        self.flush()
        self._pending = flag, step
        return True

    def flush(self) -> None:
        """Read the outcome that is still pending; to be called before anything is saved."""
        if self._pending is not None:
            (flag, step), self._pending = self._pending, None
            self._judge(flag, step)

    def _judge(self, flag: Tensor, step: _Step, scaled: bool = False) -> bool:
        """Whether the step may be taken, ``flag``; too many overflows of scaled losses in a row are no overflows."""
        most = MAX_OVERFLOWS if scaled else MAX_CONSECUTIVE_SKIPS
        if flag:
            self._consecutive = 0
            return True
        # All processes are here if the gradient is not finite, and only then.
        finite = step.finite if step.finite[-1, 0] else step.agreed()
        overflow = scaled and bool(finite[:, 1].all())
        samples = step.batches[int(finite.all(dim=1).int().argmin())]
        self.skipped += 1
        self._consecutive += 1
        epoch, batch = samples["epoch"], samples["iters"]
        place = f"epoch {epoch + 1}, step {batch + 1}"
        if overflow and self._consecutive <= most:
            logging.info("%s: the gradient overflows in half precision; the step is skipped", place)
            return False
        path = self.folder / f"not_finite_epoch_{epoch}_step_{batch}_process_{get_rank()}.json"
        names = {key: _plain(samples[key]) for key in NAMES if key in samples}
        write_text(path, json.dumps({"epoch": epoch, "step": batch, **names}, indent=1))
        message = f"{place}: loss or gradient is not finite; the batch is named in {path}"
        if not self.skip and not overflow:
            raise Diverged(f"{message}; lower run.init_lr, or set run.skip_nonfinite: true")
        if self._consecutive > most:
            remedy = "lower run.init_lr, or set run.amp: false" if scaled else "lower run.init_lr"
            raise Diverged(f"{message}; so were the {most} before it; {remedy}")
        logging.warning("%s; the step is skipped", message)
        return False


def _plain(value: Any) -> list[Any]:
    return value.tolist() if isinstance(value, Tensor) else [str(entry) for entry in value]


class CollapseGuard:
    """Stops a run whose model told pairs apart, and gives all of them the same score now.

    Features that are alike for all samples have an ITC loss of ln(pairs) whatever the targets, and little gradient
    to leave it by. A run that starts there, from random weights, is let go on. Of each ``CHECK_EVERY`` batches the
    mean over processes is read, and that of the first one, before anything is trained.

    Args:
        run: the ``run:`` part of the YAML, with ``stop_collapsed`` and ``init_lr``.
    """

    def __init__(self, run: Mapping[str, Any]) -> None:
        self.enabled, self.rate = bool(run["stop_collapsed"]), float(run["init_lr"])
        self._shares: list[Tensor] = []
        self._learned, self._first, self._at_chance = False, True, 0

    def note(self, in_batch: tuple[Tensor, int] | None, place: str) -> None:
        """Look at the ITC loss among the pairs of a batch, and how many these are; there may be none.

        Raises:
            Diverged: it was below ``LEARNED`` of the loss of chance, and has been above ``AT_CHANCE`` of it.
        """
        if not self.enabled or in_batch is None or in_batch[1] < MIN_PAIRS:
            return
        loss, pairs = in_batch
        self._shares.append((loss.detach().float() / math.log(pairs)).nan_to_num(1.0))
        if len(self._shares) < CHECK_EVERY and not self._first:
            return
        mean = torch.stack(self._shares).mean()
        self._shares, self._first = [], False
        if is_dist_avail_and_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        share = float(mean)
        self._learned |= share < LEARNED
        self._at_chance = self._at_chance + 1 if share > AT_CHANCE else 0
        if self._learned and self._at_chance >= MAX_CHECKS:
            raise Diverged(
                f"{place}: for {MAX_CHECKS * CHECK_EVERY} steps the ITC loss among the pairs of a batch has been "
                f"that of chance, ln({pairs}) = {math.log(pairs):.2f}, after it was lower: the features have "
                f"collapsed; lower run.init_lr ({self.rate:g}), or that of the heads (run.lr_scales.heads=0.1); "
                f"run.stop_collapsed: false goes on"
            )


class Stopped(BaseException):
    """A signal asks to stop; like KeyboardInterrupt it is no Exception, which whoever reads files may catch.

    Attributes:
        signum: which.
    """

    def __init__(self, signum: int, message: str = "") -> None:
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name}" + (f"; {message}" if message else ""))
        self.signum = signum


class StopRequest:
    """Context that turns SIGINT and SIGTERM into a request, which training heeds after the step.

    Outside of steps, as in an evaluation, and at the second signal, the exception comes at once. In a thread
    other than the main one signals stay as they are.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.stepping = False
        self._signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._before = {signum: signal.signal(signum, self._handle) for signum in self.SIGNALS}
        return self

    def __exit__(self, *_error: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a data loader's worker, which its parent ends
        if not self.stepping or self._signum is not None:
            raise Stopped(signum)
        self._signum = signum

    def signum(self) -> int | None:
        """The signal that any process got, the same answer on all of them. To be asked once a step."""
        if not is_dist_avail_and_initialized():
            return self._signum
        # On the CPU: nothing waits for a GPU.
        signum = torch.tensor(self._signum or 0)
        dist.all_reduce(signum, dist.ReduceOp.MAX)
        return int(signum) or None
