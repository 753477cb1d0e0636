"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lavis_aurora.errors import AuroraError


@contextmanager
def written_whole(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write beside ``path``; renamed once it is complete, so that no interrupted write leaves a broken one.

    Raises:
        AuroraError: the file cannot be written.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise AuroraError(f"cannot write {path} ({error}); free some space or choose another folder") from error
    finally:
        partial.unlink(missing_ok=True)
