"""Files that are written whole or not at all, and json with errors that name the file."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from lavis_aurora.common.errors import AuroraError


@contextmanager
def written_whole(path: str | Path, previous: str | Path | None = None) -> Iterator[BinaryIO]:
    """A file to write beside ``path``; renamed once it is complete, so that no interrupted write leaves a broken one.

    Args:
        path: where.
        previous: where an older file of that name is kept.

    Raises:
        AuroraError: the file cannot be written; the older one is still there.
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
        if isinstance(error, (OSError, RuntimeError)):  # torch's zip writer tells of a full disk by a RuntimeError
            raise AuroraError(f"cannot write {path} ({error}); free some space or name another folder") from error
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
