"""Pictures and videos on disk: which are there, and which are the same, without reading all of them."""

from __future__ import annotations

import os
import time
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from hashlib import blake2b
from typing import NamedTuple, Optional

import torch
from tqdm import tqdm

from lavis_aurora.common.errors import printable
from lavis_aurora.common.files import regular
from lavis_aurora.common.media import load_picture, read_frames

# Of a larger file, the first, the middle and the last block are compared.
WHOLE, BLOCK = 2**20, 2**18
# Work that takes less has no bar.
PROGRESS_DELAY_SECONDS = 5
DECODED_FRAMES = 8
DECODERS: dict[str, Callable[[str], object]] = {
    "image": load_picture,
    "video": lambda path: read_frames(path, lambda length: torch.linspace(0, length - 1, DECODED_FRAMES).long()),
}


class _Found(NamedTuple):
    """A file: where it is read, its bytes, and what links to it share."""

    place: str
    size: int
    identity: tuple[int, int]


class MediaFiles:
    """Files, each looked at once; the content is compared of those of equal size alone.

    Args:
        paths: all that may be asked about; those that come first are looked at first.
        seconds: for how long to look and compare, at most; None: as long as it takes.

    Attributes:
        total: different paths.
        cut_short: whether time was up.
    """

    def __init__(self, paths: Iterable[str], seconds: Optional[float]) -> None:
        self.deadline = float("inf") if seconds is None else time.monotonic() + seconds
        self.cut_short = False
        unique = dict.fromkeys(paths)
        self.total = len(unique)
        self._found: dict[str, _Found] = {}
        self._why: dict[str, str] = {}
        listed: dict[str, dict[str, str]] = {}
        for path in self._until(unique, "looking at files"):
            try:
                self._found[path] = _look(path)
            except OSError as error:
                self._why[path] = (error.strerror or str(error)) + _spelled_otherwise(path, listed)
        self._digests: dict[str, Optional[bytes]] = {}

    @property
    def looked(self) -> int:
        """How many were looked at."""
        return len(self._found.keys() | self._why.keys())

    @property
    def compared(self) -> int:
        """How many were read."""
        return len(self._digests)

    def decode(self, paths: Iterable[str], kind: str) -> None:
        """Read pictures, or frames all over videos, as a run would; those that cannot be are missing from then on."""
        for path in self._until([path for path in paths if path in self._found], "decoding files"):
            try:
                DECODERS[kind](self._found[path].place)
            except Exception as error:  # decoders have errors of their own
                self._why[path] = printable(str(error)).replace(f"{path}: ", "")

    def missing(self, paths: Iterable[str]) -> dict[str, str]:
        """Those of the paths at which there is no file, an empty one, or one that was not decoded; and why."""
        return {path: self._why[path] for path in paths if path in self._why}

    def shared(self, ones: Iterable[str], others: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
        """What of ``ones`` is among ``others``.

        Returns:
            the path there of each that is the same file, linked or not; and that of each of the same content.
        """
        there: dict[object, str] = {}
        sizes: dict[int, list[str]] = defaultdict(list)
        for path in others:
            found = self._found.get(path)
            there[found.identity if found else path] = path
            if found:
                sizes[found.size].append(path)
        files: dict[str, str] = {}
        rest: dict[str, list[str]] = {}
        for path in ones:
            found = self._found.get(path)
            identity: object = found.identity if found else path
            if identity in there:
                files[path] = there[identity]
            elif found and found.size in sizes:
                rest[path] = sizes[found.size]
        self._read([*rest, *(path for paths in rest.values() for path in paths)])
        contents = {self._digests.get(path): path for paths in rest.values() for path in paths}
        contents.pop(None, None)
        found_there = ((path, contents.get(self._digests.get(path))) for path in rest)
        return files, {path: other for path, other in found_there if other is not None}

    def repeated(self, paths: Iterable[str]) -> dict[str, str]:
        """Those of the paths that are one before them, linked or of the same content; and which."""
        sizes: dict[int, list[str]] = defaultdict(list)
        for path in paths:
            found = self._found.get(path)
            if found:
                sizes[found.size].append(path)
        several = [group for group in sizes.values() if len(group) > 1]
        self._read([path for group in several for path in group])
        first: dict[Optional[bytes], str] = {}
        pairs = ((path, self._digests.get(path)) for group in several for path in group)
        return {path: first[digest] for path, digest in pairs if digest and first.setdefault(digest, path) != path}

    def _read(self, paths: Iterable[str]) -> None:
        new = dict.fromkeys(path for path in paths if path not in self._digests)
        for path in self._until(new, "comparing files"):
            self._digests[path] = _digest(self._found[path])

    def _until(self, paths: Collection[str], what: str) -> Iterator[str]:
        with tqdm(total=len(paths), desc=what, unit="file", mininterval=1, delay=PROGRESS_DELAY_SECONDS) as bar:
            for path in paths:
                if time.monotonic() > self.deadline:
                    self.cut_short = True
                    return
                yield path
                bar.update()


def with_ending(path: str) -> str:
    """Where LAVIS reads a picture: those of SNLI-VE are named without their ending."""
    return next(filter(os.path.exists, (path, f"{path}.jpg")), path)


def _look(path: str) -> _Found:
    """Raises OSError if there is no file, or an empty one."""
    place = with_ending(path)
    found = regular(place).stat()
    if not found.st_size:
        raise OSError("it is empty")
    return _Found(place, found.st_size, (found.st_dev, found.st_ino))


def _spelled_otherwise(path: str, listed: dict[str, dict[str, str]]) -> str:
    """Of a missing path: which file differs from it in case or in the encoding of accents alone, as nobody sees."""
    found = None if os.path.exists(path) else _alike(path, listed)
    if found is None:
        return ""
    same = unicodedata.normalize("NFC", found) == unicodedata.normalize("NFC", path)
    how = "how accents are encoded, Unicode NFC or NFD" if same else "upper and lower case"
    return f"; there is {found}: its name differs in {how}"


def _alike(path: str, listed: dict[str, dict[str, str]]) -> Optional[str]:
    """The path itself, or one of the same letters; ``listed`` keeps the names of each folder by their letters."""
    folder, name = os.path.split(path)
    if os.path.exists(path) or not name:
        return path
    place = _alike(folder, listed)
    if place is None or not os.path.isdir(place or "."):
        return None
    if place not in listed:
        with suppress(OSError):
            listed[place] = {_letters(other): other for other in os.listdir(place or ".")}
    other = listed.get(place, {}).get(_letters(name))
    return None if other is None else os.path.join(place, other)


def _letters(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _digest(file: _Found) -> Optional[bytes]:
    """Of the content; None if it cannot be read."""
    starts = (0,) if file.size <= WHOLE else (0, (file.size - BLOCK) // 2, file.size - BLOCK)
    digest = blake2b(str(file.size).encode())
    try:
        with open(file.place, "rb") as content:
            for start in starts:
                content.seek(start)
                digest.update(content.read(WHOLE if len(starts) == 1 else BLOCK))
    except OSError:
        return None
    return digest.digest()
