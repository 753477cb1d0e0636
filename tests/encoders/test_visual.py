"""Pictures and videos through the vision encoder."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.encoders.towers import encode_visual, visual_input


@pytest.fixture(scope="module")
def encoder():
    return tiny_model().eval().visual_encoder


def test_a_video_is_its_frames_one_by_one(encoder):
    video = torch.randn(2, 3, 4, 48, 48)
    with torch.no_grad():
        features = encode_visual(encoder, video)
        for clip, tokens, pooled in zip(video, *features):
            frames = [encoder.forward_features(clip[:, t].unsqueeze(0))[0] for t in range(4)]
            torch.testing.assert_close(tokens, torch.cat(frames), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(pooled, sum(frame[0] for frame in frames) / 4, atol=1e-5, rtol=1e-5)


def test_a_video_of_one_frame_is_a_picture(encoder):
    image = torch.randn(3, 3, 48, 48)
    with torch.no_grad():
        for one, other in zip(encode_visual(encoder, image.unsqueeze(2)), encode_visual(encoder, image)):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"text_input": ["a"]}, "neither image nor video, only text_input"),
        ({"image": torch.zeros(2, 3, 4, 48, 48)}, r"image has shape \(2, 3, 4, 48, 48\)"),
        ({"video": torch.zeros(2, 4, 3, 48, 48)}, r"video has shape .* must be \(batch, 3, frames"),
    ],
)
def test_other_input_is_refused(samples, message):
    with pytest.raises(AuroraError, match=message):
        visual_input(samples)
