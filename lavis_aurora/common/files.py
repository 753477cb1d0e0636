"""Files that are written whole or not at all, and files that are read with an error for what is wrong with them."""

from __future__ import annotations

import codecs
import fcntl
import glob
import io
import json
import locale
import logging
import os
import pickle
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor

from lavis_aurora.common.errors import AuroraError

STALE = 3600.0  # seconds; an unfinished file that nobody has written to since then was left by a killed process
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def regular(path: str | Path) -> Path:
    """The path of a file. Anything else of that name, such as a pipe, might be read for ever.

    Raises:
        OSError: there is no file.
    """
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind != stat.S_IFREG:
        raise OSError(f"it is {KINDS.get(kind, 'a device')}, not a file")
    return Path(path)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """What the system says of a file or folder that is written inside the block, in one line.

    Raises:
        AuroraError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: str | Path, error: Exception) -> AuroraError:
    remedy = "free some space or name another folder"
    if isinstance(error, FileNotFoundError):
        remedy = "its folder is not there, or no longer; leave it in place while it is written to"
    return AuroraError(f"cannot write {path} ({getattr(error, 'strerror', None) or error}); {remedy}")


@contextmanager
def appended(path: str | Path) -> Iterator[None]:
    """Around what is appended to a file inside the block; what cannot be written whole is taken back.

    Raises:
        AuroraError: it cannot be written; the file is as it was.
    """
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    try:
        with writing(path):
            yield
    except AuroraError:
        if os.path.isfile(path):
            os.truncate(path, size)
        raise


def use_utf8() -> None:
    """Let ``open`` without an encoding, as LAVIS calls it, take UTF-8 whatever the locale, and print what can be.

    What a terminal cannot show is escaped.
    """
    if codecs.lookup(locale.getpreferredencoding(False)).name != "utf-8":
        with suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def write_text(path: str | Path, text: str) -> None:
    """A text, written whole or not at all; see :func:`atomic_write`."""
    with atomic_write(path) as file:
        file.write(text.encode())


@contextmanager
def atomic_write(path: str | Path, previous: str | Path | None = None) -> Iterator[BinaryIO]:
    """A file to write beside ``path``; renamed once it is complete, so that no interrupted write leaves a broken one.

    Of several who write one path at once, each has a file of its own, and the last one's stays.

    Args:
        path: where.
        previous: where an older file of that name is kept.

    Raises:
        AuroraError: the system refuses the file; the older one is still there. Whatever else goes wrong in the block
            is raised as it is.
    """
    path = Path(path)
    partial = _unfinished(path)
    try:
        with partial.open("xb") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if previous is not None and path.exists():
                path.replace(previous)
            partial.replace(path)
    except BaseException as error:
        try:
            partial.unlink(missing_ok=True)
        except OSError:
            logging.warning("%s is left behind, unfinished", partial)
        # torch's zip writer, refused a write, goes on to an error of its own; one without that is about no file.
        refusal = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(refusal, OSError):
            raise _cannot_write(path, refusal) from error
        raise


def _unfinished(path: Path) -> Path:
    """A name beside PATH that nobody else has; what killed writers have left there goes."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
        with suppress(OSError):
            if time.time() - os.lstat(left).st_mtime < STALE or _is_locked(left):
                continue
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")


def _is_locked(path: Path) -> bool:
    with suppress(OSError), regular(path).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # NFS gives readers no other
        except BlockingIOError:
            return True
    return False


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill, which gets its name once the block is through; of a block that fails nothing is left.

    Raises:
        AuroraError: something is there already, or the system refuses the folder.
    """
    path = Path(path).expanduser()
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise AuroraError(f"{path} is there already; name another folder")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _unfinished(path)
        partial.mkdir()
        try:
            yield partial
            partial.replace(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def load_torch(path: str | Path) -> Any:
    """What ``torch.save`` wrote, on the CPU; tensors and plain values only are unpickled.

    Raises:
        MemoryError: there is no room for it.
        Exception: torch, pickle and zipfile each have errors of their own for a file that is damaged or no such file;
            :func:`why_unreadable` says what was wrong.
    """
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\3\4"  # by which torch tells it from its older format, without checksums
        if zipped:
            with ZipFile(file) as archive:
                damaged = archive.testzip()  # torch itself compares no checksum
            if damaged is not None:
                raise BadZipFile(f"damaged: the checksum of its part {damaged!r} is another")
    try:
        with open(path, "rb") as file:  # of a path, torch would go by the name's ending
            return torch.load(file, map_location="cpu", weights_only=True)
    except RuntimeError as error:
        if zipped and "can't allocate memory" in str(error):
            raise MemoryError(f"{path}: {error}") from error
        raise


# Of a safetensors file, the most bytes of its header.
LONGEST_HEADER = 10**8


def tensor_format(path: str | Path) -> str:
    """``safetensors``, ``torch`` (of ``torch.save``), or what else a file begins with; its name may say otherwise.

    Raises:
        OSError: there is no file.
    """
    with regular(path).open("rb") as file:
        head = file.read(40)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= LONGEST_HEADER:
        return "safetensors"
    # A zip, or pickles one after the other.
    return "torch" if head[:4] == b"PK\3\4" or head[:1] == b"\x80" else repr(head)


def why_unreadable(error: Exception) -> str:
    """What was wrong when tensors were read; torch's own words may advise to run what a file holds."""
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return (
            "it is damaged, or holds more than tensors and is not unpickled, since that could run code; ask for a "
            "file of tensors alone, such as .safetensors"
        )
    return str(error)


def is_finite(x: Tensor) -> bool:
    """Whether all are numbers; in one pass without copies, of which ``isfinite`` makes several."""
    if not x.is_floating_point() or not x.numel():
        return True
    bounds = torch.aminmax(x if x.dtype.itemsize > 1 else x.float())
    return all(bool(bound.isfinite()) for bound in bounds)


def read_json(path: str | Path, key: str = "") -> Any:
    """Content of a json file.

    Args:
        path: of it.
        key: the YAML key that names it, for messages.

    Raises:
        AuroraError: it cannot be read.
    """
    try:
        text = regular(path).read_text(encoding="utf-8")
        if text.startswith("\ufeff"):  # LAVIS, which may read the file too, does not take it
            raise ValueError("it begins with a byte order mark; save it as UTF-8 without one")
        return json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        remedy = "; save it as UTF-8" if isinstance(error, UnicodeError) else ""
        raise AuroraError(f"{f'{key}: ' * bool(key)}{path} is not readable json ({error}){remedy}") from error
