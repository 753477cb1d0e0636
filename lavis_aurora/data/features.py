"""Tokens of pictures on disk, in place of the pictures: each known by its file as it was (``run.cache_features``)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import safetensors.torch
import torch
from lavis.common.dist_utils import is_main_process
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.files import atomic_write, write_text, writing

ABOUT, PIXEL, ENDING = "about.json", "pixel.png", ".safetensors"
# Whose tokens a file of the cache says that it holds.
OWNER = "features"


def entry_name(path: str) -> str:
    """What the tokens of a picture's file are known by: a file that was changed or replaced has another name.

    Raises:
        OSError: there is no such file.
    """
    state = os.stat(path)
    said = [os.path.realpath(path), state.st_size, state.st_mtime_ns]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]


def _checksum(tokens: Tensor) -> str:
    return f"{crc32(tokens.contiguous().view(torch.uint8).numpy()):08x}"


class FeatureCache:
    """Tokens of pictures in a folder, a few to each safetensors file, read from there when they are needed.

    What they are of stands in ``about.json``; its hash names the folder and stands in each file. A file of another
    hash, or one that cannot be read, is not used, and the log says so. Checksums of the tokens stand there too, each
    compared whenever they are read; files of older versions have none.

    Args:
        root: folder of all caches.
        about: all that the tokens of a picture's file depend on, JSON values.
        shape: of a picture's tokens.
        dtype: in which they are kept.

    Attributes:
        folder: of this cache.
        pixel: a picture of one pixel, for datasets that open one where tokens take its place.
    """

    def __init__(self, root: Path, about: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> None:
        said = json.dumps({**about, "shape": list(shape), "dtype": str(dtype)}, indent=1, sort_keys=True)
        self.key = hashlib.sha256(said.encode()).hexdigest()
        self.root, self.folder, self.shape, self.dtype = root, root / self.key[:16], tuple(shape), dtype
        self.pixel = str((self.folder / PIXEL).absolute())
        self._files: dict[str, Path] = {}
        self._seen: set[tuple[Path, int]] = set()
        self._opened: dict[Path, Any] = {}
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        if is_main_process():
            write_text(self.folder / ABOUT, said)
            with atomic_write(self.pixel) as file:
                Image.new("RGB", (1, 1)).save(file, "PNG")
        self.scan()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, entry: object) -> bool:
        return entry in self._files

    @property
    def entry_bytes(self) -> int:
        """Of a picture."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize

    def scan(self) -> None:
        """Take in the files that are new."""
        for path in sorted(self.folder.glob(f"*{ENDING}")):
            try:
                # A damaged one may have been written anew, by this process or another.
                state = path, path.stat().st_mtime_ns
                if state in self._seen:
                    continue
                self._seen.add(state)
                with safe_open(path, "pt") as file:
                    names = list(file.keys())
                    parts = [file.get_slice(name) for name in names]
                    fits = (file.metadata() or {}).get(OWNER) == self.key
                    fits &= all(tuple(part.get_shape()) == self.shape for part in parts)
            except (SafetensorError, OSError) as error:
                logging.warning("run.cache_features: %s cannot be read (%s) and is not used", path, error)
                continue
            if fits:
                self._files.update(dict.fromkeys(names, path))
            else:
                logging.warning("run.cache_features: %s is of other features and is not used", path)

    def write(self, entries: Mapping[str, Tensor]) -> None:
        """Keep tokens by their entry, in one file, which is there as a whole or not at all."""
        name = hashlib.sha256("".join(sorted(entries)).encode()).hexdigest()[:24]
        checksums = {entry: _checksum(tokens) for entry, tokens in entries.items()}
        content = safetensors.torch.save(dict(entries), {**checksums, OWNER: self.key})
        with atomic_write(self.folder / f"{name}{ENDING}") as file:
            file.write(content)

    def read(self, path: str) -> Tensor:
        """The tokens of a picture's file as it is now.

        Raises:
            AuroraError: it is not there: the picture was changed since the run began, or the cache was; or it is
                damaged.
        """
        entry = entry_name(path)
        file = self._files.get(entry)
        if file is None:
            raise AuroraError(f"{path} was changed while the run was at work; start the run again (run.resume=auto)")
        try:
            if file not in self._opened:
                self._opened[file] = safe_open(file, "pt").__enter__()
            tokens: Tensor = self._opened[file].get_tensor(entry)
            checksum = self._opened[file].metadata().get(entry)
        except (SafetensorError, OSError) as error:
            raise AuroraError(f"run.cache_features: {file} is gone or damaged ({error}); start again") from error
        if checksum not in (None, _checksum(tokens)):
            raise AuroraError(
                f"run.cache_features: {file} is damaged: tokens of {path} have another checksum than when they were "
                f"written; remove the file, and start the run again (run.resume=auto)"
            )
        return tokens
