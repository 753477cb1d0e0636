"""An index brought up to date with its folder: only what is new or has changed is read."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.evaluation.encode import progress
from lavis_aurora.evaluation.rerank import IMAGE_CHUNK
from lavis_aurora.search.files import FileState, Tree, digest_of, kind_of
from lavis_aurora.search.model import SearchModel, Unreadable
from lavis_aurora.search.store import Entry, Store

# Files that are read ahead of the model, and threads that read them.
AHEAD, READERS = 64, min(4, os.cpu_count() or 1)
# What is done is written at the latest after so many seconds, or so many files.
WRITE_SECONDS, WRITE_FILES = 20, 1024


@dataclass
class IndexUpdate:
    """What was done to an index.

    Attributes:
        new, changed: files that went through the model.
        moved: files whose content was known, from another path or from before they were touched.
        removed: entries of files that are there no longer.
        unchanged: files that were not read.
        broken: why files could not be read, by path; those that are known from before too.
        seconds: that it took.
    """

    new: int = 0
    changed: int = 0
    moved: int = 0
    removed: int = 0
    unchanged: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def changes(self) -> int:
        """Entries that are not what they were."""
        return self.new + self.changed + self.moved + self.removed


class _Read(NamedTuple):
    """A file that was looked at: its pixels, unless its content is known or it is broken."""

    path: str
    state: FileState
    pixels: Tensor | None = None
    why: str = ""


def update_store(store: Store, model: SearchModel, root: Path, tree: Tree, retry: bool) -> IndexUpdate:
    """Bring the entries of a folder up to date; killed anywhere, the next call goes on.

    Args:
        store: of the index.
        model: whose features its entries have.
        root: the folder.
        tree: what it holds now.
        retry: files that could not be read are tried again, also if they have not changed.
    """
    start = time.monotonic()
    known, broken = store.states(), store.broken()
    if known and not tree.files:
        raise AuroraError(
            f"{root} holds no picture or clip, and its index {store.place} has {len(known)}; is its disk there? If "
            f"all are to be forgotten, remove the index"
        )
    done = IndexUpdate(broken=dict(tree.unreadable))
    same = {path for path, state in known.items() if path in tree.files and state.looks_like(tree.files[path])}
    if not retry:
        again = {path: why for path, (state, why) in broken.items() if _is(tree.files.get(path), state)}
        done.broken.update(again)
        same |= again.keys()
    done.unchanged = len(same - done.broken.keys())
    writer = _Writer(store, known, broken, done)
    todo = [path for path in sorted(tree.files) if path not in same]
    with torch.no_grad(), progress(len(todo), "indexing", "file") as bar:
        for batch in _batches(_read_ahead(model, root, [(path, tree.files[path]) for path in todo], writer)):
            writer.add(batch, model)
            bar.update(len(batch))
    writer.write()
    gone = [path for path in known if path not in tree.files and not tree.hides(path)]
    store.remove(gone)
    store.remove((path for path in broken if path not in tree.files and not tree.hides(path)), broken=True)
    done.removed = len(gone)
    if todo or gone:
        store.tidy()
    done.seconds = time.monotonic() - start
    return done


def _is(now: FileState | None, before: FileState) -> bool:
    return now is not None and before.looks_like(now)


class _Writer:
    """Entries on their way into the store."""

    def __init__(
        self,
        store: Store,
        known: dict[str, FileState],
        broken: dict[str, tuple[FileState, str]],
        done: IndexUpdate,
    ) -> None:
        self._store, self._known, self._broken, self._done = store, known, broken, done
        self.contents = {(str(kind_of(path)), state.digest) for path, state in known.items()}
        # Features of contents whose entries were replaced: another file may have them now.
        self._replaced: dict[tuple[str, str], NDArray[np.float32]] = {}
        self._entries: list[Entry] = []
        self._same: list[_Read] = []
        self._bad: list[_Read] = []
        self._written = time.monotonic()

    def add(self, batch: list[_Read], model: SearchModel) -> None:
        """Files of one kind: all with pixels of one shape, or all without."""
        first = batch[0]
        if first.pixels is not None:
            pixels = torch.stack([one.pixels for one in batch if one.pixels is not None])
            _, feats = model.model.image_features({"image" if pixels.dim() == 4 else "video": pixels})
            features = feats.float().cpu().numpy()
            self._entries += [
                Entry(one.path, str(kind_of(one.path)), one.state, features[i]) for i, one in enumerate(batch)
            ]
        for one in batch:
            if one.why:
                self._done.broken[one.path] = one.why
                self._bad.append(one)
            elif one.pixels is None:
                self._same.append(one)
                self._done.moved += 1
            elif one.path in self._known:
                self._done.changed += 1
            else:
                self._done.new += 1
        waiting = len(self._entries) + len(self._same) + len(self._bad)
        if waiting >= WRITE_FILES or time.monotonic() - self._written > WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        """All that has come since the last time."""
        store, known = self._store, self._known
        paths = [*(entry.path for entry in self._entries), *(one.path for one in (*self._same, *self._bad))]
        replaced = {known[path].digest for path in paths if path in known}
        found = store.features(replaced | {one.state.digest for one in self._same})
        self._replaced |= {content: feature for content, feature in found.items() if content[1] in replaced}
        for path, state, *_ in self._same:
            content = str(kind_of(path)), state.digest
            feature = found.get(content, self._replaced.get(content))
            assert feature is not None
            self._entries.append(Entry(path, content[0], state, feature))
        store.put(self._entries)
        store.remove((entry.path for entry in self._entries if entry.path in self._broken), broken=True)
        # What could not be read at all may be readable the next time.
        store.put_broken([(one.path, one.state, one.why) for one in self._bad if one.state.digest])
        store.remove(one.path for one in self._bad if one.path in known)
        self._entries, self._same, self._bad, self._written = [], [], [], time.monotonic()


def _read_ahead(
    model: SearchModel, root: Path, files: Iterable[tuple[str, FileState]], writer: _Writer
) -> Iterator[_Read]:
    """Files in order, read by threads while the model is busy with those before."""
    waiting: deque[Future[_Read]] = deque()
    with ThreadPoolExecutor(READERS) as pool:
        try:
            for path, state in files:
                waiting.append(pool.submit(_read, model, root, path, state, writer.contents))
                if len(waiting) == AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for one in waiting:
                one.cancel()


def _read(model: SearchModel, root: Path, path: str, state: FileState, known: set[tuple[str, str]]) -> _Read:
    try:
        state = state._replace(digest=digest_of(root / path))
    except OSError as error:
        return _Read(path, state, why=error.strerror or str(error))
    if (kind_of(path), state.digest) in known:
        return _Read(path, state)
    try:
        return _Read(path, state, model.read(root / path))
    except Unreadable as error:
        return _Read(path, state, why=str(error))


def _batches(files: Iterator[_Read]) -> Iterator[list[_Read]]:
    """Neighbours that can go through the model together; a clip counts as many pictures as it has frames."""
    batch: list[_Read] = []
    for one in files:
        shape = None if one.pixels is None else one.pixels.shape
        frames = 1 if shape is None or len(shape) == 3 else shape[1]
        before = batch[0].pixels.shape if batch and batch[0].pixels is not None else None
        if batch and (shape != before or (len(batch) + 1) * frames > IMAGE_CHUNK):
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch
