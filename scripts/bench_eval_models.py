"""What scripts/bench_eval.py measures: LAVIS's model and ours on made-up data, without weights to download."""

from __future__ import annotations

from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

CAPTION_WORDS = ("a", "red", "blue", "green", "small", "big", "large", "circle", "square", "star", "triangle", "ring")


@dataclass
class Workload:
    """Sizes of one row of the table: side in pixels, frames of a video or 0."""

    side: int
    frames: int


KINDS = {"images": Workload(384, 0), "videos": Workload(224, 16)}


class FakeRetrievalDataset(Dataset):
    """What retrieval reads of LAVIS's RetrievalEvalDataset; a picture's number stands in its first pixel."""

    def __init__(self, count: int, frames: int, key: str) -> None:
        rng = np.random.default_rng(0)
        # With [CLS] and [SEP] 8 to 16 tokens, the length of most captions of COCO.
        self.text = [" ".join(rng.choice(CAPTION_WORDS, rng.integers(6, 15))) for _ in range(count)]
        self.image = list(range(count))
        self.shape, self.key = (3, max(1, frames), 1, 1) if frames else (3, 1, 1), key

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: int) -> dict:
        return {self.key: torch.full(self.shape, float(index)), "index": index}


class RandomTokenEncoder(nn.Module):
    """Stands in for the vision tower: random tokens, the same for the same picture, or frame of a video.

    With ``merge`` as many as BLIP base's 12 layers leave that merge so many each, and the patches of each behind it.
    """

    def __init__(self, tokens: int, frames: int, merge: int = 0) -> None:
        super().__init__()
        self.patches, self.merged = tokens, merge > 0
        for _ in range(12):
            tokens -= min(merge, (tokens - 1) // 2)
        self.tokens, self.frames, self.embed_dim = tokens, frames, 768
        self.precision = nn.Parameter(torch.zeros(()))  # a model in half precision shows by its parameters

    def forward_features(self, pixels: Tensor) -> Tensor:
        """(batch, 3, height, width) to (batch, tokens, 768), or 769."""
        made = []
        for position, seed in enumerate(pixels[:, 0, 0, 0].long().tolist()):
            generator = torch.Generator().manual_seed(1000 * seed + position % self.frames)
            made.append(torch.randn(self.tokens, 768, generator=generator))
        found = torch.stack(made)
        if self.merged:
            found = torch.cat([found, torch.full_like(found[..., :1], self.patches / self.tokens)], dim=2)
        return found.to(pixels.device)


class VideoAsImageModel(nn.Module):
    """LAVIS's model for videos: the tokens of all frames are those of one picture."""

    def __init__(self, tower: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.tower, self.projection = tower, projection

    def forward_features(self, video: Tensor) -> Tensor:
        """(batch, 3, frames, height, width) to (batch, frames * tokens, 768)."""
        frames = self.tower.forward_features(video.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(video), -1))
        self.pooled = frames[:, :, 0].mean(dim=1)
        return frames.flatten(1, 2)

    def forward(self, _first_token: Tensor) -> Tensor:
        """In the place of vision_proj: of the mean, not of the first frame."""
        return self.projection(self.pooled)


def build(kind: Workload, side: str, device: str, merge: int = 0) -> nn.Module:
    """BLIP base with random weights and an active adapter, as LAVIS's model or as ours; the same for both.

    Args:
        merge: ``model.token_merging`` of ours.
    """
    from lavis.models import BlipRetrieval
    from lavis.models.med import XBertEncoder
    from lavis.models.vit import VisionTransformerEncoder
    from omegaconf import OmegaConf

    from lavis_aurora.adapters.merging import merged_weights
    from lavis_aurora.common.paths import package_file
    from lavis_aurora.encoders.towers import build_tokenizer
    from lavis_aurora.models.blip_retrieval_aurora import BlipRetrievalAurora

    vocabulary = package_file("configs/models/tiny")
    cfg = OmegaConf.load(BlipRetrievalAurora.default_config_path("base")).model
    own = {"pretrained": None, "queue_size": 0, "image_size": kind.side, "tokenizer": vocabulary}
    cfg = OmegaConf.merge(cfg, own, {"token_merging": merge})
    torch.manual_seed(0)
    ours = BlipRetrievalAurora.from_config(cfg)
    for factor in ours.mode_approx.sets["default"].V.values():
        nn.init.normal_(factor, std=0.02)
    for head in (ours.vision_proj, ours.text_proj, ours.itm_head):
        nn.init.normal_(head.weight, std=0.3)
    if side != "lavis":
        return ours.eval().to(device)
    merged = {**ours.state_dict(), **merged_weights(ours, "default")}
    towers = (cls.from_config(cfg) for cls in (VisionTransformerEncoder, XBertEncoder))
    with patch.object(BlipRetrieval, "init_tokenizer", lambda *_: build_tokenizer(vocabulary)):
        lavis = BlipRetrieval(*towers, queue_size=0)
    del lavis.visual_encoder_m, lavis.text_encoder_m
    missing = lavis.load_state_dict({k: v for k, v in merged.items() if k in lavis.state_dict()}, strict=False)
    assert not missing.missing_keys, missing
    return lavis.eval().to(device)
