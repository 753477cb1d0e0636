"""Pictures and clips of a folder tree: which are there, whether they have changed, and what is in them."""

from __future__ import annotations

import os
from collections.abc import Collection
from hashlib import blake2b
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

from lavis_aurora.common.errors import AuroraError, printable
from lavis_aurora.common.files import regular
from lavis_aurora.common.media import PICTURE_ENDINGS, VIDEO_ENDINGS

PICTURE, CLIP = "picture", "clip"
BLOCK = 2**20


class FileState(NamedTuple):
    """What tells that a file may have changed.

    Attributes:
        size: bytes.
        mtime_ns: when it was written, in nanoseconds.
        digest: of its content, in hexadecimal; empty where it was not read.
    """

    size: int
    mtime_ns: int
    digest: str = ""

    def looks_like(self, other: FileState) -> bool:
        """Whether size and time are the same."""
        return self[:2] == other[:2]


class Tree(NamedTuple):
    """What a folder holds.

    Attributes:
        files: state of each picture and clip, not read, by its path below the folder, with ``/`` between names.
        unreadable: paths of folders and files below it that could not be looked at, and why.
    """

    files: dict[str, FileState]
    unreadable: dict[str, str]

    def hides(self, path: str) -> bool:
        """Whether the path may be there all the same: it could not be looked at."""
        return any(path == one or path.startswith(f"{one}/") for one in self.unreadable)


def kind_of(path: str) -> str | None:
    """``picture`` or ``clip``, by the name's ending; None for anything else."""
    ending = os.path.splitext(path)[1].lower()
    return PICTURE if ending in PICTURE_ENDINGS else CLIP if ending in VIDEO_ENDINGS else None


def look_through(root: Path, without: Collection[Path] = ()) -> Tree:
    """All pictures and clips below ``root``; links are followed, names that begin with a dot are left out.

    Args:
        root: the folder.
        without: folders that are left out.

    Raises:
        AuroraError: there is no such folder, or it cannot be looked into.
    """
    tree, seen = Tree({}, {}), {_identity(one) for one in without if one.exists()}
    try:
        _look_into(root, "", tree, seen)
    except OSError as error:
        raise AuroraError(f"{root}: {error.strerror or error}; name a folder of pictures or clips") from error
    return tree


def _identity(folder: Path) -> tuple[int, int]:
    """The same for all links to a folder."""
    found = folder.stat()
    return found.st_dev, found.st_ino


def _look_into(folder: Path, below: str, tree: Tree, seen: set[tuple[int, int]]) -> None:
    identity = _identity(folder)
    if identity in seen:  # a link that leads back, or the index itself
        return
    seen.add(identity)
    with os.scandir(folder) as entries:
        shown = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in shown:
        path = f"{below}{entry.name}"
        try:
            if entry.is_dir():
                _look_into(Path(entry.path), f"{path}/", tree, seen)
            elif kind_of(path):
                path.encode()
                found = entry.stat()
                if S_ISREG(found.st_mode):
                    tree.files[path] = FileState(found.st_size, found.st_mtime_ns)
        except OSError as error:
            tree.unreadable[path] = error.strerror or str(error)
        except UnicodeEncodeError:
            tree.unreadable[printable(path)] = "its name is not in UTF-8; rename it"


def digest_of(path: Path) -> str:
    """Of a file's whole content.

    Raises:
        OSError: it cannot be read.
    """
    digest = blake2b(digest_size=20)
    with regular(path).open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
