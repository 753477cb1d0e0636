"""Programs of this project in processes of their own, for those that run several of them."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Optional, TypeVar

from lavis_aurora_cli import end_with_parent

ROOT = Path(__file__).resolve().parents[1]
LOG = "output.txt"


def subprocess_env(threads: int = 1, **more: str) -> dict[str, str]:
    """This process's environment with so many threads, in which Python finds this project first, and ``more``."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    threads_of = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return {**os.environ, **threads_of, "PYTHONPATH": path, **more}


class TrainingProcess:
    """A training or an evaluation on one thread.

    Attributes:
        program: what trains, below the project's folder.
        folder: everything that it writes.
        process, start_time: it, and when it was started last.
        seconds: that it took, once it has ended.
        elsewhere: whether another command runs it, as far as :func:`run_all` has seen.
    """

    program: ClassVar[str] = "train.py"
    folder: Path
    process: Optional[subprocess.Popen[bytes]] = None
    start_time: float = 0.0
    seconds: float = 0.0
    elsewhere: bool = False

    @property
    def log(self) -> Path:
        """The file that its output is added to."""
        return self.folder / LOG

    def take(self) -> bool:
        """Whether it may start: nothing else works in its folder, nor will until :meth:`release`."""
        return True

    def is_done(self) -> bool:
        """Whether another command has run it; asked between :meth:`take` and the start."""
        return False

    def release(self) -> None:
        """It has ended, and all of it is kept."""

    def start_run(
        self, cfg_path: str | Path, options: Sequence[str], evaluate: bool, cwd: Path | None = None
    ) -> None:
        """Train, or only evaluate, as a project YAML says, into :attr:`folder`."""
        program = ROOT / ("evaluate.py" if evaluate else self.program)
        self.launch(program, cfg_path, [*options, f"run.output_dir={self.folder}"], cwd)

    def launch(self, program: Path, cfg_path: str | Path, options: Sequence[str], cwd: Path | None = None) -> None:
        """Start ``program --cfg-path ... --options ...``."""
        command = [sys.executable, str(program), "--cfg-path", str(cfg_path), "--options", *options]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.start_time = time.time()
        with self.log.open("a", encoding="utf-8") as log:
            # Ctrl-C reaches this process alone, which tells its children once: told twice, they would not save.
            # Killed, it can tell them nothing: they end with it, or a restart would meet them.
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=subprocess_env(),
                cwd=cwd,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    def poll(self) -> bool:
        """Whether it has ended; asked again only while it has not."""
        if self.process is None or self.process.poll() is None:
            return False
        self.seconds = time.time() - self.start_time
        return True

    @property
    def failed(self) -> bool:
        """Whether it did not end well, or has not ended."""
        return self.process is None or self.process.returncode != 0

    def output(self) -> str:
        """What it has printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def progress(self) -> str:
        """Where it is, from its last progress line."""
        lines = [line for line in self.output().splitlines() if "  step " in line]
        return lines[-1].partition("[INFO] ")[2] if lines else "starting"


Process = TypeVar("Process", bound=TrainingProcess)


def add_jobs_argument(parser: argparse.ArgumentParser, default: int) -> None:
    """The argument ``--jobs`` of programs that call :func:`run_all`."""

    def positive(text: str) -> int:
        if int(text) < 1:
            raise ValueError(text)
        return int(text)

    parser.add_argument(
        "--jobs", type=positive, default=default, help="runs at a time, one thread each (default: %(default)s)"
    )


def add_options_argument(parser: argparse.ArgumentParser, words: str) -> None:
    """The argument ``--options`` of programs that start runs; given twice, both count."""
    parser.add_argument("--options", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help=words)


def run_all(
    processes: Sequence[Process],
    jobs: int,
    start: Callable[[Process], object],
    poll: Callable[[Process], bool],
    on_progress: Callable[[list[Process], int], None],
    interval: float = 20.0,
) -> None:
    """Run all, ``jobs`` at a time. Those that run when this is left, by an error or a signal, are told to stop.

    One that another command runs is passed over, waited for at the end, and started if it is not done then.

    Args:
        processes: in the order in which they start.
        start: starts one.
        poll: whether one has ended; asked until it has, so it may say so, or raise.
        on_progress: given those that run and the number of those that do not yet; called after each end and at least
            every ``interval`` seconds.
    """
    pending, last = list(processes), time.time()
    active: list[Process] = []
    waiting = 0  # for so many runs of other commands, with nothing else to start

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    # A closed terminal too ends by way of the finally, or the runs would go on unseen.
    handlers = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        while pending or active:
            _start_more(pending, active, jobs, start)
            before, waiting = waiting, len(pending) if len(active) < jobs else 0
            if waiting and waiting != before:
                print(f"waiting for runs of other commands ({waiting}), e.g. {pending[0].folder}", flush=True)
            time.sleep(0.2)
            still = []
            for process in active:
                if poll(process):
                    process.release()
                else:
                    still.append(process)
            if len(still) < len(active) or time.time() - last > interval:
                active, last = still, time.time()
                on_progress(active, len(pending))
    finally:
        running = [one.process for one in active if one.process and one.process.poll() is None]
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        for one in active:
            one.release()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _start_more(pending: list[Process], active: list[Process], jobs: int, start: Callable[[Process], object]) -> None:
    """Move what may start from ``pending`` to ``active``, and drop what another command has done."""
    for process in list(pending):
        if len(active) == jobs and not process.elsewhere:
            continue
        process.elsewhere = not process.take()
        if process.elsewhere:
            continue
        if process.is_done():
            pending.remove(process)
            process.release()
        elif len(active) == jobs:
            process.release()  # the other command has failed, and this one has no room for it yet
        else:
            pending.remove(process)
            active.append(process)
            start(process)
