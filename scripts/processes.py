"""Programs of this project in processes of their own, for those that run several of them."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Optional, TypeVar

from lavis_aurora_cli import end_with_parent

ROOT = Path(__file__).resolve().parents[1]


def environment(threads: int = 1) -> dict[str, str]:
    """This process's environment with so many threads, in which Python finds this project first."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "PYTHONPATH": path}


class TrainingProcess:
    """A training or an evaluation on one thread.

    Attributes:
        log: file that its output is added to.
        process, started: it, and when it was started last.
    """

    log: Path
    process: Optional[subprocess.Popen] = None
    started: float = 0.0

    def launch(
        self,
        program: Path,
        cfg_path: str | Path,
        options: Sequence[str],
        more: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        """Start ``program --cfg-path ... --options ...``, with ``more`` in its environment."""
        command = [sys.executable, str(program), "--cfg-path", str(cfg_path), "--options", *options]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.started = time.time()
        with self.log.open("a") as log:
            # Ctrl-C reaches this process alone, which tells its children once: told twice, they would not save.
            # Killed, it can tell them nothing: they end with it, or a restart would meet them.
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment(), **(more or {})},
                cwd=cwd,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    def output(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace")

    def progress(self) -> str:
        """Where it is, from its last progress line."""
        lines = [line for line in self.output().splitlines() if "  step " in line]
        return lines[-1].partition("[INFO] ")[2] if lines else "starting"


Process = TypeVar("Process", bound=TrainingProcess)


def add_jobs(parser: argparse.ArgumentParser, default: int) -> None:
    """The argument ``--jobs`` of programs that call :func:`run_all`."""

    def positive(text: str) -> int:
        if int(text) < 1:
            raise ValueError(text)
        return int(text)

    parser.add_argument(
        "--jobs", type=positive, default=default, help="runs at a time, one thread each (default: %(default)s)"
    )


def run_all(
    processes: Sequence[Process],
    jobs: int,
    start: Callable[[Process], None],
    ended: Callable[[Process], bool],
    report: Callable[[list[Process], int], None],
    every: float = 20.0,
) -> None:
    """Run all, ``jobs`` at a time. Those that run when this is left, by an error or a signal, are told to stop.

    Args:
        processes: in the order in which they start.
        start: starts one.
        ended: whether one has ended; asked until it has, so it may say so, or raise.
        report: says where the given ones are, and how many wait; after each end and every so many seconds.
    """
    waiting, active, last = list(processes), [], time.time()

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    # A closed terminal too ends by way of the finally, or the runs would go on unseen.
    handlers = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                active.append(waiting.pop(0))
                start(active[-1])
            time.sleep(0.2)
            still = [process for process in active if not ended(process)]
            if len(still) < len(active) or time.time() - last > every:
                active, last = still, time.time()
                report(active, len(waiting))
    finally:
        running = [one.process for one in active if one.process and one.process.poll() is None]
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)
