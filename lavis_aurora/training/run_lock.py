"""One process at a time works in a folder."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.files import writing


class FolderInUse(AuroraError):
    """Another process works in a run's folder, or may do so."""


LOCK = "run.lock"
TOUCH, STALE = 60.0, 600.0  # seconds


class RunLock:
    """Context that holds the lock of at most one folder, e.g. of a run by its main process.

    The system gives a lock back when its process ends, however that comes about, and so nobody waits for the dead.
    The file says who holds it, and is removed at an orderly end. Such a lock belongs to the process (``lockf``): one
    of ``flock`` would live on in workers of data loaders, which outlive a killed process by seconds.

    Its owner touches the file each minute: one on another machine, of which the system tells nothing, is taken for
    dead after ten without.

    Args:
        named_by: the key or argument that names the folder, for messages.
    """

    _file: TextIO | None = None

    def __init__(self, named_by: str = "run.output_dir") -> None:
        self._named_by = named_by

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_error: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the folder back, if there is one."""
        if self._file is not None:
            self._ended.set()
            self._fresh.join()
            Path(self._file.name).unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def take(self, folder: Path) -> None:
        """Lock a folder, unless this one is locked already.

        Raises:
            FolderInUse: another process holds it, or one that cannot be seen from here may do so.
            AuroraError: the folder cannot be written to.
        """
        if self._file is not None:
            return
        path, own = folder / LOCK, _this_process()
        try:
            file, certain = _open_locked(path)
        except BlockingIOError as error:
            raise FolderInUse(f"{self._named_by}: {folder} is in use by {error}; wait for it, or stop it") from error
        except OSError as error:
            raise AuroraError(f"{self._named_by}: cannot write to {folder} ({error}); name another folder") from error
        # One that was killed has left its name. Not every shared file system passes locks on to other hosts.
        before = _owner(file)
        elsewhere = before.get("boot") != own["boot"] and before.get("host") != own["host"]
        age = time.time() - os.fstat(file.fileno()).st_mtime
        stale = before.get("touched") is True and age > STALE
        if before and (elsewhere or not certain) and not stale:
            file.close()
            raise FolderInUse(
                f"{self._named_by}: {folder} is in use by {_described(before)}, which cannot be seen from here; "
                f"if it does not run any more, remove {path}"
            )
        if before:
            reason = f"which has not touched it for {age / 60:.0f} minutes" if elsewhere else "which has ended"
            logging.info("%s was left behind by %s, %s", path, _described(before), reason)
        with writing(path):
            file.truncate(0)
            os.write(file.fileno(), json.dumps(own).encode())
        self._file, self._ended = file, threading.Event()
        self._fresh = threading.Thread(target=_keep_fresh, args=(file.fileno(), self._ended), daemon=True)
        self._fresh.start()


def _keep_fresh(file: int, ended: threading.Event) -> None:
    """Touch an owner's file until the end."""
    while not ended.wait(TOUCH):
        try:
            os.utime(file)
        except OSError as error:  # the next time may do
            logging.warning("%s cannot be touched (%s)", LOCK, error)


def _open_locked(path: Path) -> tuple[TextIO, bool]:
    """The open file, and whether it is locked: a file system may have no locks, which the log says.

    Raises:
        BlockingIOError: another process has locked it, which the message describes.
    """
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # systems differ in which
            with file:
                raise BlockingIOError(_described(_owner(file))) from error
        except OSError as error:
            logging.warning("%s: the file system has no locks (%s); start no second run in that folder", path, error)
            return file, False
        try:
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file, True
        except FileNotFoundError:
            pass
        file.close()  # its owner has removed it in between


def _this_process() -> dict[str, Any]:
    # Containers on one machine have hosts' names of their own, and one kernel.
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "boot": boot.read_text(encoding="utf-8").strip() if boot.is_file() else "",
        "touched": True,  # once a minute, other than by older versions
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _owner(file: TextIO) -> dict[str, Any]:
    """What an owner has written; empty if there is none. To close another handle of a locked file would unlock it."""
    file.seek(0)
    try:
        owner = json.load(file)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _described(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    return f"process {owner.get('process')} on {owner.get('host')} since {owner.get('since')}"
