"""Programs of this project in processes of their own, for those that run several of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Optional

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
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env={**environment(), **(more or {})}, cwd=cwd
            )

    def output(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace")

    def progress(self) -> str:
        """Where it is, from its last progress line."""
        lines = [line for line in self.output().splitlines() if "  step " in line]
        return lines[-1].partition("[INFO] ")[2] if lines else "starting"
