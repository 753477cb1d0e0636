"""Files that are written whole or not at all, and files that are read with an error for what is wrong with them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile, ZipFile

import torch

from lavis_aurora.errors import AuroraError


@contextmanager
def written_whole(path: str | Path, previous: str | Path | None = None) -> Iterator[BinaryIO]:
    """A file to write beside ``path``; renamed once it is complete, so that no interrupted write leaves a broken one.

    Args:
        path: where.
        previous: where an older file of that name is kept.

    Raises:
        AuroraError: the system refuses the file; the older one is still there. Whatever else goes wrong in the block
            is raised as it is.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
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
            raise AuroraError(f"cannot write {path} ({refusal}); free some space or name another folder") from error
        raise


def load_torch(path: str | Path) -> Any:
    """What ``torch.save`` wrote, on the CPU; tensors and plain values only are unpickled.

    Raises:
        MemoryError: there is no room for it.
        Exception: torch, pickle and zipfile each have errors of their own for a file that is damaged or no such file.
    """
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\3\4"  # by which torch tells it from its older format, without checksums
        if zipped:
            with ZipFile(file) as archive:
                damaged = archive.testzip()  # torch itself compares no checksum
            if damaged is not None:
                raise BadZipFile(f"damaged: the checksum of its part {damaged!r} is another")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except RuntimeError as error:
        if zipped and "can't allocate memory" in str(error):
            raise MemoryError(f"{path}: {error}") from error
        raise


def read_json(path: str | Path, key: str = "") -> Any:
    """Content of a json file.

    Args:
        path: of it.
        key: the YAML key that names it, for messages.

    Raises:
        AuroraError: it cannot be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AuroraError(f"{f'{key}: ' * bool(key)}{path} is not readable json ({error})") from error
