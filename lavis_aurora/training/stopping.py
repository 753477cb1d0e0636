"""Ctrl-C and SIGTERM: heeded where the state can be saved."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

import torch
import torch.distributed as dist
from lavis.common.dist_utils import is_dist_avail_and_initialized


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
        self._before: dict[int, object] = {}

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
