"""Scores of all images with all texts: ITC for all, ITM for the best candidates."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lavis.common.dist_utils import get_rank, get_world_size, is_dist_avail_and_initialized
from torch import Tensor
from tqdm import tqdm

# What LAVIS writes for a pair that was not reranked.
NOT_RERANKED = -100.0
TEXT_BATCH = 256
PAIR_BATCH = 128


@dataclass
class RetrievalScores:
    """Scores of a split as numpy arrays; entries that were not reranked are -100, as in LAVIS.

    Attributes:
        itc: cosine similarities, (images, texts).
        i2t: reranked texts of each image, (images, texts).
        t2i: reranked images of each text, (texts, images).
        k_i2t, k_t2i: candidates that were reranked per image and per text.
    """

    itc: np.ndarray
    i2t: np.ndarray
    t2i: np.ndarray
    k_i2t: int
    k_t2i: int


@torch.no_grad()
def retrieval_scores(model, data_loader, k_test: int, itc_weight: float = 1.0) -> RetrievalScores:
    """Score a split: ITM + itc_weight * ITC for the k_test best candidates of each query by ITC.

    Each pair meets the fusion encoder once, for both directions. Several processes share the pairs, by images.

    Args:
        model: a retrieval model with LAVIS's BLIP attributes, in eval mode.
        data_loader: over LAVIS's RetrievalEvalDataset (``text`` and ``image`` lists); not sharded.
        k_test: candidates per query; cut to the number of candidates; 0 scores by ITC alone.
        itc_weight: weight of ITC in the sum.
    """
    dataset = data_loader.dataset
    text_feats, ids, mask = _encode_texts(model, dataset.text)
    images, texts = len(dataset.image), len(dataset.text)
    share = range(*(images * (get_rank() + i) // get_world_size() for i in (0, 1)))
    image_feats, tokens = _encode_images(model, data_loader, share)
    itc = image_feats @ text_feats.t()
    k_i2t, k_t2i = min(k_test, texts), min(k_test, images)
    if k_test == 0:
        plain = itc.cpu().numpy()
        return RetrievalScores(plain, plain, plain.T.copy(), 0, 0)
    wanted_i2t = torch.zeros_like(itc, dtype=torch.bool).scatter_(1, itc.topk(k_i2t, dim=1).indices, True)
    wanted_t2i = torch.zeros_like(wanted_i2t).scatter_(0, itc.topk(k_t2i, dim=0).indices, True)
    wanted = wanted_i2t | wanted_t2i
    pairs = [
        (image, chosen, _match(model, tokens[image], ids[chosen], mask[chosen]))
        for image in tqdm(share, desc="reranking", unit="image", mininterval=5, disable=get_rank() != 0)
        if len(chosen := wanted[image].nonzero()[:, 0])
    ]
    scores = itc_weight * itc
    for image, chosen, itm in _from_all(pairs):
        scores[image, chosen.to(scores.device)] += itm.to(scores.device)
    i2t = scores.masked_fill(~wanted_i2t, NOT_RERANKED).cpu().numpy()
    t2i = scores.masked_fill(~wanted_t2i, NOT_RERANKED).t().contiguous().cpu().numpy()
    return RetrievalScores(itc.cpu().numpy(), i2t, t2i, k_i2t, k_t2i)


def _encode_texts(model, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """ITC features of all texts, and the token ids and masks with which they enter the fusion encoder."""
    feats, ids, masks = [], [], []
    for start in range(0, len(texts), TEXT_BATCH):
        text = model.tokenize(texts[start : start + TEXT_BATCH]).to(model.device)
        hidden = model.text_encoder.forward_text(text).last_hidden_state
        feats.append(F.normalize(model.text_proj(hidden[:, 0]), dim=-1).float())
        ids.append(text.input_ids)
        masks.append(text.attention_mask)
    ids = torch.cat(ids)
    ids[:, 0] = model.tokenizer.enc_token_id
    return torch.cat(feats), ids, torch.cat(masks)


def _encode_images(model, data_loader, share: range) -> tuple[Tensor, dict[int, Tensor]]:
    """ITC features of all images, and the tokens of this process's share, kept in main memory."""
    feats, tokens = [], {}
    start = 0
    for samples in tqdm(data_loader, desc="encoding images", unit="batch", mininterval=5, disable=get_rank() != 0):
        embeds, pooled = model.visual_features(samples)
        feats.append(F.normalize(model.vision_proj(pooled), dim=-1).float())
        for i, one in enumerate(embeds.cpu()):
            if start + i in share:
                tokens[start + i] = one.clone()
        start += len(embeds)
    logging.info("encoded %d images", start)
    return torch.cat(feats), tokens


def _match(model, tokens: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """ITM logit of one image with its texts; padding beyond the longest text is dropped."""
    # One image for all its texts: its keys and values are computed once.
    image = tokens.to(ids.device).unsqueeze(0)
    logits = []
    for part_ids, part_mask in zip(ids.split(PAIR_BATCH), mask.split(PAIR_BATCH)):
        length = int(part_mask.sum(dim=1).max())
        output = model.text_encoder(
            part_ids[:, :length],
            attention_mask=part_mask[:, :length],
            encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(image.shape[:-1], dtype=torch.long, device=ids.device),
            return_dict=True,
        )
        logits.append(model.itm_head(output.last_hidden_state[:, 0])[:, 1].float())
    return torch.cat(logits)


def _from_all(pairs: list[tuple[int, Tensor, Tensor]]) -> list[tuple[int, Tensor, Tensor]]:
    """The pairs of all processes."""
    if not is_dist_avail_and_initialized():
        return pairs
    gathered: list = [None] * get_world_size()
    dist.all_gather_object(gathered, [(image, chosen.cpu(), itm.cpu()) for image, chosen, itm in pairs])
    return [pair for part in gathered for pair in part]
