"""Features of a split's images and texts: each process encodes its share, within a memory budget."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_rank, get_world_size, is_dist_avail_and_initialized
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm
from transformers import BatchEncoding

T = TypeVar("T")
# Texts of 35 tokens that take as much room in their tower as a picture of 384 pixels, 577 tokens, takes in its own.
TEXTS_PER_PICTURE = 16
# Work that takes less has no bar.
PROGRESS_DELAY_SECONDS = 5


class RetrievalModel(Protocol):
    """What an evaluation asks of a model that scores images or videos with texts.

    Attributes:
        device: where it computes.
        feature_size: width of the features that ITC compares.
        image_size: pixels of a side of its images.
    """

    @property
    def device(self) -> torch.device: ...

    @property
    def feature_size(self) -> int: ...

    @property
    def image_size(self) -> int: ...

    def tokenize(self, texts: Sequence[str]) -> BatchEncoding:
        """``input_ids`` and ``attention_mask`` of texts, padded alike whatever the texts, (texts, length)."""

    def text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Normalised ITC features of texts (texts, length) on any device: (texts, feature_size), float32."""

    def image_features(self, samples: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Tokens for the fusion encoder, (images, tokens, d), and normalised ITC features, (images, feature_size).

        Args:
            samples: a batch with ``image`` or ``video``.
        """

    def match_logits(self, ids: Tensor, lengths: Tensor, image: Tensor) -> Tensor:
        """ITM logits (no match, match), (texts, 2), of one image, (tokens, d), with texts of rising length."""


def rank_indices(total: int) -> range:
    """What of ``total`` things this process takes: every n-th, so that neighbours of unequal cost are shared."""
    return range(get_rank(), total, get_world_size())


def all_gather_rows(places: Tensor, rows: Tensor, total: int) -> Tensor:
    """The rows of all processes in one tensor, in main memory; a row that no process gave is NaN.

    Args:
        places: where the rows of this process belong, (rows,).
        rows: (rows, ...); processes may have any number.
        total: rows of the result.
    """
    parts = [(places.cpu(), rows.cpu())]
    if is_dist_avail_and_initialized():
        gathered: list = [None] * get_world_size()
        dist.all_gather_object(gathered, parts[0])
        parts = gathered
    result = torch.full((total, *rows.shape[1:]), float("nan"))
    for where, values in parts:
        result[where] = values
    return result


def broadcast(value: T) -> T:
    """The main process's ``value``, on all processes."""
    values = [value]
    if is_dist_avail_and_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def progress(total: int, what: str, unit: str) -> tqdm:
    """A bar with the time left, on the main process."""
    delay = PROGRESS_DELAY_SECONDS
    return tqdm(total=total, desc=what, unit=unit, mininterval=5, delay=delay, disable=get_rank() != 0)


@dataclass
class Texts:
    """A split's texts as they enter the fusion encoder, all in main memory.

    Attributes:
        ids: token ids, padded to the longest, (texts, longest).
        lengths: tokens of each, (texts,).
        feats: normalised ITC features, (texts, d).
    """

    ids: Tensor
    lengths: Tensor
    feats: Tensor


def encode_texts(model: RetrievalModel, texts: Sequence[str], at_once: int) -> Texts:
    """Tokenize all texts and encode this process's share, ``at_once`` of similar length together."""
    batches = [model.tokenize(texts[i : i + at_once]) for i in range(0, len(texts), at_once)]
    ids = torch.cat([batch.input_ids for batch in batches])
    mask = torch.cat([batch.attention_mask for batch in batches])
    lengths = mask.sum(dim=1)
    share = lengths.argsort(stable=True)[rank_indices(len(texts))]
    feats = [torch.empty(0, model.feature_size)]
    with progress(len(share), "encoding texts", "text") as bar:
        for part in share.split(at_once) if len(share) else ():
            longest = int(lengths[part].max())
            feats.append(model.text_features(ids[part, :longest], mask[part, :longest]).cpu())
            bar.update(len(part))
    return Texts(ids[:, : int(lengths.max())].clone(), lengths, all_gather_rows(share, torch.cat(feats), len(texts)))


class _Chosen(Sampler[int]):
    """Indices that are set before each pass."""

    def __init__(self) -> None:
        self.indices: Sequence[int] = ()

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class ImageEncoder:
    """Encodes any of a split's images or videos; a batch of the split's loader is a pass through the vision tower.

    Args:
        model: the retrieval model.
        data_loader: over the whole split; its batch size, workers and collation are used.
    """

    def __init__(self, model: RetrievalModel, data_loader: DataLoader) -> None:
        # On a GPU, LAVIS's runner puts a loader of its own around torch's.
        loader = getattr(data_loader, "loader", data_loader)
        self.model, self._chosen = model, _Chosen()
        self.loader = DataLoader(
            loader.dataset,
            batch_size=loader.batch_size,
            sampler=self._chosen,
            num_workers=min(loader.num_workers, len(loader.dataset)),
            pin_memory=loader.pin_memory,
            collate_fn=loader.collate_fn,
            generator=torch.Generator(),  # the random numbers of training stay as they are
        )

    def encode(self, indices: Sequence[int], what: str) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Index, tokens (tokens, d) and normalised ITC feature (d,) of some images, in the order given.

        Args:
            indices: into the split.
            what: says the progress bar.
        """
        if not indices:
            return
        self._chosen.indices = indices
        position = 0
        with progress(len(indices), what, "it") as bar:
            for samples in self.loader:
                bar.unit = "video" if "video" in samples else "image"
                tokens, feats = self.model.image_features(samples)
                for one, feat in zip(tokens, feats):
                    yield indices[position], one, feat
                    position += 1
                bar.update(len(tokens))


class ImageTokens:
    """Tokens of this process's images for the fusion encoder; those beyond the budget are encoded when needed.

    Args:
        model: the retrieval model.
        data_loader: over the whole split.
        budget_gb: 10^9 bytes of main memory for the tokens that this process keeps.
        dtype: to which all tokens are rounded, kept or not.

    Attributes:
        feats: normalised ITC features of all images, (images, d), in main memory.
        local_indices: this process's images.
    """

    def __init__(self, model: RetrievalModel, data_loader: DataLoader, budget_gb: float, dtype: torch.dtype) -> None:
        self.encoder, self.dtype, self.budget_gb = ImageEncoder(model, data_loader), dtype, budget_gb
        total = len(data_loader.dataset)
        self.local_indices = list(rank_indices(total))
        self._cache: dict[int, Tensor] = {}
        self._tower_dtype = torch.float32
        left = budget_gb * 1e9
        feats = [torch.empty(0, model.feature_size)]
        for image, tokens, feat in self.encoder.encode(self.local_indices, "encoding"):
            feats.append(feat.cpu().unsqueeze(0))
            self._tower_dtype = tokens.dtype
            left -= tokens.numel() * dtype.itemsize
            if left >= 0:
                # A copy: the tokens are a view of the whole batch.
                self._cache[image] = tokens.to("cpu", dtype, copy=True)
        self.feats = all_gather_rows(torch.tensor(self.local_indices, dtype=torch.long), torch.cat(feats), total)

    def iter_tokens(self, images: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Each of these images of this process, with its tokens (tokens, d) in the vision tower's dtype.

        Cached tokens are dropped on the way.
        """
        again = [image for image in images if image not in self._cache]
        for image in images:
            if image in self._cache:
                yield image, self._cache.pop(image).to(self._tower_dtype)
        if again:
            logging.info(
                "the tokens of %d of %d images or videos are beyond run.token_budget_gb (%g): encoded again",
                len(again),
                len(images),
                self.budget_gb,
            )
            for image, tokens, _ in self.encoder.encode(again, "encoding again"):
                yield image, tokens.to(self.dtype).to(self._tower_dtype)
