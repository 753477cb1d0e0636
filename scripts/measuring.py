"""What the benchmarks measure by: a process of their own for each measurement, its memory, and the machine."""

from __future__ import annotations

import ctypes
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from processes import subprocess_env

from lavis_aurora.common.summary import machine

M_MMAP_THRESHOLD = -3  # of malloc.h


def measure_in_subprocess(program: str, arguments: Sequence[str], threads: int, what: str) -> str:
    """What ``program`` prints in a new process; where it fails, this program ends with its error."""
    env = subprocess_env(threads, HF_HUB_OFFLINE="1")
    done = subprocess.run([sys.executable, program, *arguments], env=env, capture_output=True, text=True)
    if done.returncode:
        killed = " (killed: is there enough memory?)" if done.returncode == -9 else ""
        sys.exit(f"{what} failed{killed}:\n{done.stderr.strip()[-3000:]}")
    return done.stdout


def resident_memory(reset: bool = False) -> tuple[int, int]:
    """(resident memory, its peak) of this process in bytes; ``reset`` starts a new peak where Linux lets us."""
    if reset:
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        except OSError:
            pass
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        values = dict(line.split(":", 1) for line in lines)
        now, peak = (int(values[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
        return now, peak
    except (OSError, KeyError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return peak, peak


def return_freed_memory(threshold: int | None = None) -> None:
    """Let glibc give the memory back that it keeps though it was freed; other systems go on as they do.

    Args:
        threshold: bytes; from here on blocks of so many go back as soon as they are freed, so that a peak is what was
            in use. Else what lies between blocks in use is kept, as much again in a training step.
    """
    try:
        libc = ctypes.CDLL(None)
        if threshold is not None:
            libc.mallopt(M_MMAP_THRESHOLD, threshold)
        libc.malloc_trim(0)
    except (OSError, AttributeError):
        pass


def environment_info(device: str, threads: int) -> dict[str, Any]:
    """What measurements depend on: the device's name, threads, and versions."""
    found = machine(device)
    name = found["gpu"] or found["processor"]
    return {"device": name, "threads": threads, "python": platform.python_version(), "torch": torch.__version__}
