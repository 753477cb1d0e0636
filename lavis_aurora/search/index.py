"""Pictures and clips of a folder, searched by words and by pictures."""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO, Optional

import numpy as np
import torch
from numpy.typing import NDArray

from lavis_aurora.common.errors import AuroraError, require
from lavis_aurora.common.files import writing
from lavis_aurora.common.parsing import parse
from lavis_aurora.config.run import RetrievalRunConfig
from lavis_aurora.evaluation.encode import encode_texts
from lavis_aurora.evaluation.rerank import IMAGE_CHUNK
from lavis_aurora.search.files import look_through
from lavis_aurora.search.model import ModelSource, SearchModel
from lavis_aurora.search.ranking import Hit, Ranker
from lavis_aurora.search.store import Store
from lavis_aurora.search.update import IndexUpdate, update_store

ARCH = "blip_retrieval_aurora"
# Where the index of a folder is unless it is told otherwise.
INSIDE = ".aurora_index"
LOCK = "index.lock"
# Of so many entries all are compared with each query; of more, those that an approximate index finds.
EXACT = 200_000
# The approximate index searches as many of its parts as it takes to find this share of the true best, as measured.
RECALL, MEASURED_TOP, MEASURED_TEXTS = 0.95, 10, 64


@dataclass
class IndexSettings:
    """What an index is of.

    Attributes:
        root: the folder.
        source: what its model is loaded from.
        model: what tells that model from others.
        probes: parts of the approximate index that are searched; None where all entries are compared.
        recall: share of the true 10 best that the approximate index finds, as measured; None where there is none.
        format: of these settings.
    """

    root: str
    source: ModelSource
    model: dict[str, str]
    probes: Optional[int] = None
    recall: Optional[float] = None
    format: int = 1

    def __post_init__(self) -> None:
        require(self.format == 1, "format", self.format, "1; update lavis_aurora")


class PictureIndex:
    """An index of a folder's pictures and clips, as a model of this package sees them.

    An index is bound to its model: backbone, adapter and picture size are told by hashes, and another is refused.
    Several threads may use one; what else uses its model holds ``lock``.

    Examples:
        >>> index = PictureIndex("holiday", adapter="output/RUN/adapter_best")
        >>> index.update()
        >>> for hit in index.search("two dogs on a beach", minus="people", top=5):
        ...     print(f"{hit.score:.3f} {hit.path}")

    Args:
        folder: of pictures and clips; or an index.
        index: where the index is; ``.aurora_index`` in the folder without. An address of object storage that LanceDB
            knows, e.g. ``s3://bucket/index``, is one too.
        model_type, adapter, pretrained, tokenizer, med_config_path: as of
            :func:`lavis_aurora.load_model_and_preprocess`; what the index was made with where they are left out.
        frames: of each clip; likewise.
        device: cpu, cuda, or auto: a GPU where there is one.
        token_budget_gb: 10^9 bytes of main memory for what reranking keeps of pictures, the last used ones.

    Raises:
        AuroraError: there is neither a folder nor an index, or the model is not that of the index.
    """

    def __init__(
        self,
        folder: str | Path,
        index: str | Path | None = None,
        *,
        model_type: str | None = None,
        adapter: str | Path | None = None,
        pretrained: str | Path | None = None,
        tokenizer: str | Path | None = None,
        med_config_path: str | Path | None = None,
        frames: int | None = None,
        device: str = "auto",
        token_budget_gb: float = 1.0,
    ) -> None:
        paths = {"adapter": adapter, "pretrained": pretrained, "tokenizer": tokenizer}
        paths["med_config_path"] = med_config_path
        given = {key: str(value) for key, value in paths.items() if value is not None}
        source = ModelSource(model_type=model_type, frames=frames, **given).absolute()
        self.place, root = find_places(folder, index)
        self._store = Store(self.place)
        self._settings = self._written()
        if self._settings is not None:
            self._settings.source.check_local(self.place, source)
            source = self._settings.source.overlaid(source)
        elif root is None:
            raise AuroraError(f"{folder} is neither a folder nor an index; make one by lavis-aurora index FOLDER")
        self.root = Path(self._settings.root) if root is None and self._settings is not None else Path(root or "")
        self.model = SearchModel(ARCH, source, device)
        self._check(self._settings)
        self.lock = threading.RLock()
        self._ranker = Ranker(self.model, token_budget_gb)

    def _written(self) -> IndexSettings | None:
        """What the index is of by now; None where there is none yet."""
        said = self._store.settings()
        if said is None:
            return None
        settings = parse(IndexSettings, said, f"the index {self.place}")
        settings.source = settings.source.relocated()
        return settings

    def _check(self, written: IndexSettings | None) -> None:
        """Refuse a model or a folder that is not that of the index."""
        if written is None:
            return
        there, here = written.model, self.model.identity
        differing = [key for key in here if there.get(key) != here[key]]
        if differing:
            told = ", ".join(f"{key} {there.get(key, '?')[:12]} there and {here[key][:12]} here" for key in differing)
            raise AuroraError(
                f"the index {self.place} is of another model ({told}); name the model it was made with, or another "
                f"place for this one's (--out)"
            )
        before = Path(written.root)
        if before != self.root and before.is_dir() and not before.samefile(self.root):
            raise AuroraError(f"the index {self.place} is of {before}, not {self.root}; name another place (--out)")

    def __len__(self) -> int:
        return 0 if self._settings is None else len(self._store)

    @property
    def recall(self) -> float:
        """Share of the true best that a search finds: 1 where all entries are compared, else as measured."""
        settings = self._settings
        return 1.0 if settings is None or settings.probes is None else settings.recall or 0.0

    def broken(self) -> dict[str, str]:
        """The files that could not be read, below the folder, and why."""
        return {} if self._settings is None else {path: why for path, (_, why) in self._store.broken().items()}

    def update(self, retry_broken: bool = False) -> IndexUpdate:
        """Take in what is new or has changed in the folder, and forget what is gone; goes on where one was killed.

        Args:
            retry_broken: files that could not be read before are tried again, also if they have not changed.

        Raises:
            AuroraError: the folder is not there, another process updates the index, or has made it of another model
                since this was opened, or it cannot be written.
        """
        inside = () if "://" in self.place else (Path(self.place),)
        tree = look_through(self.root, inside)
        with self._locked():
            before = self._written()  # another process may have made it, or measured it anew
            self._check(before)
            self._settings = before
            self._store.create(self.model.model.feature_size)
            settings = IndexSettings(str(self.root.resolve()), self.model.source, self.model.identity)
            if before is not None:
                settings.probes, settings.recall = before.probes, before.recall
            if settings != before:
                self._write(settings)
            with self.lock:
                done = update_store(self._store, self.model, self.root, tree, retry_broken)
            known = settings.recall is not None  # tried before: found to be too little, or out of date now
            if len(self) > EXACT and (not known or (settings.probes is not None and done.changes)):
                self._approximate(settings)
        return done

    def _write(self, settings: IndexSettings) -> None:
        self._store.write_settings(asdict(settings))
        self._settings = settings

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Of an index on this machine, no other process writes meanwhile."""
        if "://" in self.place:
            yield
            return
        with writing(self.place):
            Path(self.place).mkdir(parents=True, exist_ok=True)
            file = (Path(self.place) / LOCK).open("a", encoding="utf-8")
        with file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise AuroraError(f"{self.place} is being updated by another process; wait for it") from error
            yield

    def _approximate(self, settings: IndexSettings) -> None:
        """The engine's approximate index, and how many of its parts must be searched; all, if it finds too little."""
        fresh = settings.probes is None
        if fresh:
            self._store.build_index(len(self))
        probes, recall = self._measured()
        if recall < RECALL and not fresh:  # it was built of other entries than there are now
            self._store.build_index(len(self))
            probes, recall = self._measured()
        self._write(replace(settings, probes=probes if recall >= RECALL else None, recall=recall))

    def _measured(self) -> tuple[int, float]:
        """The fewest parts that reach :data:`RECALL`, or all, and the recall with them."""
        queries = self._measuring_queries()
        true = [{entry.path for entry in self._store.nearest(query, MEASURED_TOP)} for query in queries]
        probes = 8
        while True:
            found = [self._store.nearest(query, MEASURED_TOP, probes=probes) for query in queries]
            hits = sum(entry.path in right for right, entries in zip(true, found) for entry in entries)
            recall = hits / sum(map(len, true))
            if recall >= RECALL or probes >= self._store.parts(len(self)):
                return probes, recall
            probes *= 2

    def _measuring_queries(self) -> NDArray[np.float32]:
        """Features of texts, which lie elsewhere than those of pictures: of words of the vocabulary."""
        words = [word for word in self.model.model.tokenizer.get_vocab() if word.isalpha() and len(word) > 2]
        chosen = sorted(words)[:: max(1, len(words) // MEASURED_TEXTS)][:MEASURED_TEXTS]
        texts = [f"a picture of {word}" for word in chosen]
        with self.lock, torch.no_grad():
            return encode_texts(self.model.model, texts, IMAGE_CHUNK).feats.numpy()

    def search(
        self,
        text: str = "",
        image: str | Path | BinaryIO | None = None,
        *,
        plus: str | Sequence[str] = (),
        minus: str | Sequence[str] = (),
        top: int = 10,
        rerank: int = 32,
        itc_weight: float = RetrievalRunConfig.itc_weight,
        where: str | None = None,
    ) -> list[Hit]:
        """The entries nearest to a query, best first.

        The query is the sum of the features of ``text``, ``image`` and each of ``plus``, less those of ``minus``.
        All entries are ranked by ITC, and the best ``rerank`` of them by ITM and ITC if there are words.

        Args:
            text: words.
            image: a picture or clip; of an open file, a picture.
            plus, minus: a text, or several.
            top: hits.
            rerank: candidates whose ITM is computed; 0 ranks by ITC alone.
            itc_weight: of ITC in the score of a reranked candidate, ITM + itc_weight * ITC.
            where: a condition in SQL on ``path`` (below the folder), ``kind``, ``size`` and ``mtime_ns``.

        Returns:
            Hits whose files are still there.

        Raises:
            AuroraError: there is no index yet, its folder is not there, there is no query, or a part of it cannot be
                read.
        """
        require(top > 0, "top", top, "1 or more")
        require(rerank >= 0, "rerank", rerank, "0 or more")
        if self._settings is None:
            raise AuroraError(f"{self.root} has no index; make it by update(), or lavis-aurora index {self.root}")
        if not self.root.is_dir():
            raise AuroraError(
                f"the index {self.place} is of {self.root}, which is not there; if that has moved, tell the index by "
                f"lavis-aurora index FOLDER --out {self.place}"
            )
        texts = [text] if text else []
        wanted = [*texts, *([plus] if isinstance(plus, str) else plus)]
        unwanted = [minus] if isinstance(minus, str) else [*minus]
        with self.lock, torch.no_grad():
            query = self._ranker.query(wanted, unwanted, image)
            rerank = rerank if query.wanted else 0
            # A condition may leave too few entries in the parts that would be searched.
            probes = self._settings.probes if where is None else None
            entries = self._store.nearest(query.feature, max(top, rerank), where, probes)
            return self._ranker.rank(entries, query, self.root, rerank, itc_weight)[:top]


def find_places(folder: str | Path, index: str | Path | None) -> tuple[str, Path | None]:
    """Where the index is, and its folder of pictures, unless the index has to say.

    Raises:
        AuroraError: there is no such folder.
    """
    if index is not None:
        return _place(index), Path(folder).expanduser().absolute()
    if "://" in str(folder):
        return str(folder), None
    place = Path(folder).expanduser().absolute()
    if not place.is_dir():
        raise AuroraError(f"{folder}: no such folder; name a folder of pictures, or an index")
    if place.name == INSIDE:
        return str(place), place.parent
    if (place / "about.lance").is_dir():
        return str(place), None
    return str(place / INSIDE), place


def _place(index: str | Path) -> str:
    return str(index) if "://" in str(index) else str(Path(index).expanduser().absolute())
