"""Pictures and videos through the vision encoder."""

from __future__ import annotations

from typing import NamedTuple

from lavis.models.vit import VisionTransformer
from torch import Tensor

from lavis_aurora.errors import AuroraError


class VisualFeatures(NamedTuple):
    """What the vision encoder makes of pictures or videos of ``frames`` frames.

    Attributes:
        tokens: of all frames, one after the other, for cross-attention: (batch, frames * tokens, d).
        pooled: mean of the frames' [CLS], for ITC: (batch, d).
    """

    tokens: Tensor
    pooled: Tensor


def visual_input(samples: dict) -> Tensor:
    """``image`` (batch, 3, height, width) or ``video`` (batch, 3, frames, height, width) of a batch.

    Raises:
        AuroraError: there is neither, or its shape is another.
    """
    for key, dimensions, shape in (
        ("image", 4, "batch, 3, height, width"),
        ("video", 5, "batch, 3, frames, height, width"),
    ):
        if key in samples:
            visual = samples[key]
            if visual.dim() != dimensions or visual.shape[1] != 3:
                raise AuroraError(f"samples: {key} has shape {tuple(visual.shape)}; it must be ({shape})")
            return visual
    raise AuroraError(f"samples: there is neither image nor video, only {', '.join(sorted(samples))}")


def encode_visual(encoder: VisionTransformer, visual: Tensor) -> VisualFeatures:
    """Encode pictures, or videos frame by frame (paper D.3); a video of one frame is a picture.

    Args:
        encoder: LAVIS's ViT.
        visual: as :func:`visual_input` gives it.
    """
    if visual.dim() == 4:
        tokens = encoder.forward_features(visual)
        return VisualFeatures(tokens, tokens[:, 0])
    batch = visual.shape[0]
    frames = encoder.forward_features(visual.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, -1))
    return VisualFeatures(frames.flatten(1, 2), frames[:, :, 0].mean(dim=1))
