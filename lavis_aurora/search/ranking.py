"""Queries of words and pictures, and the ranking of what an index finds for one: by ITC, the best of it by ITM."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lavis_aurora.common.errors import AuroraError, shown
from lavis_aurora.evaluation.encode import encode_texts
from lavis_aurora.evaluation.rerank import IMAGE_CHUNK
from lavis_aurora.search.files import FileState
from lavis_aurora.search.model import SearchModel, Unreadable
from lavis_aurora.search.store import Entry


@dataclass(frozen=True)
class Hit:
    """A picture or clip that was found.

    Attributes:
        path: of the file.
        kind: picture or clip.
        itc: cosine similarity with the query.
        itc_rank: its place by that alone, from 1.
        itm: of a reranked one, the probability that it matches all texts and none of ``minus``; else None.
        score: of a reranked one, ITM logits + itc_weight * ``itc``, as in an evaluation; else ``itc``. Reranked ones
            stand before the others.
    """

    path: str
    kind: str
    itc: float
    itc_rank: int
    itm: float | None
    score: float


class Query(NamedTuple):
    """A query: its feature (d,), and token ids of its texts, (texts, length), wanted (True) or not."""

    feature: NDArray[np.float32]
    ids: Tensor
    lengths: Tensor
    wanted: list[bool]


class Ranker:
    """Scores what an index finds; not for several threads at once.

    Args:
        model: of the index.
        budget_gb: 10^9 bytes of main memory for tokens of pictures, those used last.
    """

    def __init__(self, model: SearchModel, budget_gb: float) -> None:
        self._model, self._left = model, budget_gb * 1e9
        self._tokens = OrderedDict[tuple[str, FileState], Tensor]()

    def query(self, wanted: Sequence[str], unwanted: Sequence[str], image: str | Path | BinaryIO | None) -> Query:
        """The normalised sum of the features of texts and a picture or clip, less those of unwanted texts.

        Raises:
            AuroraError: there is neither a text nor a picture, one cannot be read, or nothing is left.
        """
        model = self._model.model
        words = [*(self._model.words(one) for one in wanted), *(self._model.words(one, "minus") for one in unwanted)]
        if not wanted and image is None:
            raise AuroraError("nothing to search for; give words, or an image")
        total = torch.zeros(model.feature_size)
        ids, lengths, signs = torch.empty(0, 0, dtype=torch.long), torch.empty(0, dtype=torch.long), []
        if words:
            encoded = encode_texts(model, words, IMAGE_CHUNK)
            order = encoded.lengths.argsort(stable=True)
            sign = torch.tensor([1.0] * len(wanted) + [-1.0] * len(unwanted))
            total += (encoded.feats * sign[:, None]).sum(dim=0)
            ids, lengths, signs = encoded.ids[order], encoded.lengths[order], (sign[order] > 0).tolist()
        if image is not None:
            try:
                pixels = self._model.read(image)
            except Unreadable as error:
                name = getattr(image, "name", image)
                raise AuroraError(f"cannot read {name} ({error})") from error
            total += self._encode(pixels)[1]
        size = total.norm()
        if not size > 1e-4:
            raise AuroraError(f"nothing is left of {shown(list(wanted))} without {shown(list(unwanted))}")
        return Query((total / size).numpy(), ids, lengths, signs)

    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (tokens, d) and feature (feature_size,) of a picture or clip, in main memory."""
        key = "image" if pixels.dim() == 3 else "video"
        tokens, feats = self._model.model.image_features({key: pixels.unsqueeze(0)})
        return tokens[0].cpu(), feats[0].float().cpu()

    def rank(self, entries: Sequence[Entry], query: Query, root: Path, rerank: int, itc_weight: float) -> list[Hit]:
        """Hits, best first; files that are gone are left out, which the log says.

        Args:
            entries: with the largest ITC, in any order.
            query: what they were found for.
            root: the folder of their files.
            rerank: how many of them get their ITM computed.
            itc_weight: of ITC in their scores.
        """
        hits: list[Hit] = []
        gone, changed = [], []
        for place, entry in enumerate(best_first(entries, query.feature), 1):
            path = root / entry.path
            try:
                found = path.stat()
                now = FileState(found.st_size, found.st_mtime_ns)
                itm = self._itm(path, now, query) if place <= rerank else None
            except (OSError, Unreadable):
                gone.append(entry.path)
                continue
            if not entry.state.looks_like(now):
                changed.append(entry.path)
            itc = float(entry.feature @ query.feature)
            likely, score = (None, itc) if itm is None else (itm[0], itm[1] + itc_weight * itc)
            hits.append(Hit(str(path), entry.kind, itc, place, likely, score))
        for which, what in ((gone, "cannot be read any more and are left out"), (changed, "have changed since")):
            if which:
                logging.warning("%d files found %s (e.g. %s); update the index", len(which), what, shown(which[0]))
        return sorted(hits, key=lambda hit: (hit.itm is None, -hit.score, hit.itc_rank))

    def _itm(self, path: Path, now: FileState, query: Query) -> tuple[float, float]:
        """Probability of a match with all texts and of none with those not wanted, and the sum of these logits."""
        model, key = self._model.model, (str(path), now)
        tokens = self._tokens.get(key)
        if tokens is None:
            tokens, _ = self._encode(self._model.read(path))
            self._left -= tokens.nbytes
            self._tokens[key] = tokens
            while self._left < 0:
                self._left += self._tokens.popitem(last=False)[1].nbytes
        else:
            self._tokens.move_to_end(key)
        logits = model.match_logits(query.ids, query.lengths, tokens.to(model.device)).cpu()
        column = torch.tensor(query.wanted).long()[:, None]
        return float(logits.softmax(dim=1).gather(1, column).prod()), float(logits.gather(1, column).sum())


def best_first(entries: Sequence[Entry], query: NDArray[np.float32]) -> list[Entry]:
    """By cosine similarity; of equal ones, by path."""
    return sorted(entries, key=lambda entry: (-float(entry.feature @ query), entry.path))
