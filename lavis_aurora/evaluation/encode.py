"""Features of a split's images and texts: each process encodes its share, within a memory budget."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lavis.common.dist_utils import get_rank, get_world_size, is_dist_avail_and_initialized
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from transformers import BatchEncoding

from lavis_aurora.encoders.towers import encode_visual, visual_input

# Texts of 35 tokens that take as much room in their tower as a picture of 384 pixels, 577 tokens, takes in its own.
TEXTS_PER_PICTURE = 16
# Work that takes less has no bar.
BAR_AFTER_SECONDS = 5


def own_share(total: int) -> range:
    """What of ``total`` things this process takes: every n-th, so that neighbours of unequal cost are shared."""
    return range(get_rank(), total, get_world_size())


def gather_rows(places: Tensor, rows: Tensor, total: int) -> Tensor:
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


def agreed(value):
    """The main process's ``value``, on all processes."""
    values = [value]
    if is_dist_avail_and_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def progress(total: int, what: str, unit: str) -> tqdm:
    """A bar with the time left, on the main process."""
    delay = BAR_AFTER_SECONDS
    return tqdm(total=total, desc=what, unit=unit, mininterval=5, delay=delay, disable=get_rank() != 0)


@dataclass
class Texts:
    """A split's texts as they enter the fusion encoder, all in main memory.

    Attributes:
        ids: token ids, [ENC] first, padded to the longest, (texts, longest).
        lengths: tokens of each, (texts,).
        feats: normalised ITC features, (texts, d).
    """

    ids: Tensor
    lengths: Tensor
    feats: Tensor


def encode_texts(model, texts: Sequence[str], at_once: int) -> Texts:
    """Tokenize all texts and encode this process's share, ``at_once`` of similar length together."""
    batches = [model.tokenize(texts[i : i + at_once]) for i in range(0, len(texts), at_once)]
    ids = torch.cat([batch.input_ids for batch in batches])
    mask = torch.cat([batch.attention_mask for batch in batches])
    lengths = mask.sum(dim=1)
    share = lengths.argsort(stable=True)[own_share(len(texts))]
    feats = [torch.empty(0, model.text_proj.out_features)]
    with progress(len(share), "encoding texts", "text") as bar:
        for part in share.split(at_once) if len(share) else ():
            longest = int(lengths[part].max())
            batch = {"input_ids": ids[part, :longest], "attention_mask": mask[part, :longest]}
            hidden = model.text_encoder.forward_text(BatchEncoding(batch).to(model.device)).last_hidden_state
            feats.append(F.normalize(model.text_proj(hidden[:, 0]).float(), dim=-1).cpu())
            bar.update(len(part))
    ids = ids[:, : int(lengths.max())].clone()
    ids[:, 0] = model.tokenizer.enc_token_id
    return Texts(ids, lengths, gather_rows(share, torch.cat(feats), len(texts)))


def encode_images(model, data_loader, indices: Sequence[int], what: str) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Index, tokens (tokens, d) and normalised ITC feature (d,) of some images or videos, in the order given.

    A batch of the loader is a pass through the vision tower.

    Args:
        model: the retrieval model.
        data_loader: over the whole split; its batch size, workers and collation are used.
        indices: into the split.
        what: says the progress bar.
    """
    # On a GPU, LAVIS's runner puts a loader of its own around torch's.
    loader = getattr(data_loader, "loader", data_loader)
    part = DataLoader(
        Subset(loader.dataset, indices),
        batch_size=loader.batch_size,
        num_workers=min(loader.num_workers, len(indices)),
        pin_memory=loader.pin_memory,
        collate_fn=loader.collate_fn,
        generator=torch.Generator(),  # the random numbers of training stay as they are
    )
    position = 0
    with progress(len(indices), what, "it") as bar:
        for samples in part:
            visual = visual_input(samples)
            bar.unit = "video" if visual.dim() == 5 else "image"
            features = encode_visual(model.visual_encoder, visual.to(model.device))
            feats = F.normalize(model.vision_proj(features.pooled).float(), dim=-1)
            for tokens, feat in zip(features.tokens, feats):
                yield indices[position], tokens, feat
                position += 1
            bar.update(len(visual))


class ImageTokens:
    """Tokens of this process's images for the fusion encoder; those beyond the budget are encoded when needed.

    Args:
        model: the retrieval model.
        data_loader: over the whole split.
        budget_gb: 10^9 bytes of main memory for the tokens that this process keeps.
        dtype: to which all tokens are rounded, kept or not.

    Attributes:
        feats: normalised ITC features of all images, (images, d), in main memory.
        share: this process's images.
    """

    def __init__(self, model, data_loader, budget_gb: float, dtype: torch.dtype) -> None:
        self.model, self.data_loader, self.dtype, self.budget_gb = model, data_loader, dtype, budget_gb
        total = len(data_loader.dataset)
        self.share = list(own_share(total))
        self._kept: dict[int, Tensor] = {}
        self._given = torch.float32
        left = budget_gb * 1e9
        feats = [torch.empty(0, model.vision_proj.out_features)]
        for image, tokens, feat in encode_images(model, data_loader, self.share, "encoding"):
            feats.append(feat.cpu().unsqueeze(0))
            self._given = tokens.dtype
            left -= tokens.numel() * dtype.itemsize
            if left >= 0:
                # A copy: the tokens are a view of the whole batch.
                self._kept[image] = tokens.to("cpu", dtype, copy=True)
        self.feats = gather_rows(torch.tensor(self.share, dtype=torch.long), torch.cat(feats), total)

    def of(self, images: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Each of these images of the share, with its tokens (tokens, d) in the vision tower's dtype.

        What is kept is given up on the way.
        """
        again = [image for image in images if image not in self._kept]
        for image in images:
            if image in self._kept:
                yield image, self._kept.pop(image).to(self._given)
        if again:
            logging.info(
                "the tokens of %d of %d images or videos are beyond run.token_budget_gb (%g): encoded again",
                len(again),
                len(images),
                self.budget_gb,
            )
            for image, tokens, _ in encode_images(self.model, self.data_loader, again, "encoding again"):
                yield image, tokens.to(self.dtype).to(self._given)
