"""Frames of videos: exactly as many as asked for, reproducible, with BLIP's values; broken files are named so."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lavis.common.registry import registry
from lavis.processors.blip_processors import BlipImageEvalProcessor
from omegaconf import OmegaConf
from PIL import Image
from tiny_video import BREAKS, break_clip, frame_numbers, write_clip

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.media import BrokenVideo, read_frames
from lavis_aurora.data.samples import random_indices, uniform_indices

COUNTS = st.integers(1, 40)
LENGTHS = st.integers(1, 400)


def processor(name: str, **cfg):
    return registry.get_processor_class(name).from_config(OmegaConf.create({"name": name, **cfg}))


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Gray clips of 1 to 30 frames, ``N.mp4``."""
    folder = tmp_path_factory.mktemp("clips")
    for frames in (1, 2, 3, 7, 8, 30):
        write_clip(folder / f"{frames}.mp4", frames)
    return folder


# Which frames


@settings(max_examples=200, deadline=None)
@given(length=LENGTHS, count=COUNTS, seed=st.integers(0, 2**31))
def test_random_frames_are_ordered_and_repeat_only_where_there_are_too_few(length, count, seed):
    torch.manual_seed(seed)
    drawn = random_indices(length, count).tolist()
    assert len(drawn) == count and drawn == sorted(drawn)
    assert drawn[0] >= 0 and drawn[-1] < length
    assert length < count or len(set(drawn)) == count
    torch.manual_seed(seed)
    assert random_indices(length, count).tolist() == drawn


@settings(max_examples=200, deadline=None)
@given(length=LENGTHS, count=COUNTS)
def test_uniform_frames_are_the_middles_of_equal_parts(length, count):
    drawn = uniform_indices(length, count).tolist()
    assert drawn == [int((i + 0.5) * length / count + 1e-9) for i in range(count)]
    assert drawn == sorted(drawn) and drawn[0] >= 0 and drawn[-1] < length
    steps = np.diff(drawn)
    assert len(drawn) == count and (count == 1 or steps.max() - steps.min() <= 1)
    if length >= count:
        assert len(set(drawn)) == count


def test_every_frame_is_drawn_alike():
    torch.manual_seed(0)
    for length, count in ((5, 3), (3, 8)):
        draws = torch.cat([random_indices(length, count) for _ in range(3000)])
        share = torch.bincount(draws, minlength=length) / len(draws)
        assert (share - 1 / length).abs().max() < 0.02


# Reading


@pytest.mark.parametrize("frames", [1, 2, 3, 7, 8, 30])
@pytest.mark.parametrize("count", [1, 2, 5, 8, 16])
@pytest.mark.parametrize("name", ["aurora_video_train", "aurora_video_eval"])
def test_any_clip_gives_exactly_the_frames_asked_for(clips, name, frames, count):
    clip = processor(name, n_frms=count, image_size=16)(str(clips / f"{frames}.mp4"))
    assert clip.shape == (3, count, 16, 16) and clip.dtype == torch.float32 and torch.isfinite(clip).all()


def test_the_frames_are_those_chosen(clips):
    frames = read_frames(str(clips / "30.mp4"), lambda length: uniform_indices(length, 8))
    assert frames.shape == (8, 3, 48, 64) and frames.dtype == torch.uint8
    assert frame_numbers(frames.numpy()) == uniform_indices(30, 8).tolist() == [1, 5, 9, 13, 16, 20, 24, 28]
    again = read_frames(str(clips / "30.mp4"), lambda length: torch.tensor([29, 29, 0]))
    assert frame_numbers(again.numpy()) == [29, 29, 0]


def test_frames_are_red_green_blue(tmp_path):
    import cv2

    path = tmp_path / "red.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, (64, 64))
    for _ in range(4):
        writer.write(np.full((64, 64, 3), (0, 0, 250), dtype=np.uint8))  # OpenCV: blue first
    writer.release()
    red, green, blue = read_frames(str(path), lambda length: torch.tensor([0]))[0].float().mean(dim=(1, 2))
    assert red > 200 and green < 50 and blue < 50


def test_at_test_a_frame_is_a_picture_of_blip(tmp_path):
    """The values of BLIP's own processor, up to the rounding of two resizings of the same kind."""
    path = write_clip(tmp_path / "a.mp4", frames=5, size=(64, 48), seed=0)
    clip = processor("aurora_video_eval", n_frms=5, image_size=32)(str(path))
    blip = BlipImageEvalProcessor(image_size=32)
    for i, frame in enumerate(read_frames(str(path), lambda length: torch.arange(length))):
        picture = blip(Image.fromarray(frame.permute(1, 2, 0).numpy()))
        # One of 255 steps, in units of the standard deviation.
        assert (clip[:, i] - picture).abs().max() < 1.01 / 255 / 0.26


def test_a_training_crop_is_the_same_for_all_frames_and_never_mirrored(tmp_path):
    """A picture that brightens to the right, in every frame."""
    import cv2

    path = tmp_path / "ramp.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, (64, 64))
    for _ in range(6):
        ramp = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
        writer.write(np.stack([ramp] * 3, axis=-1))
    writer.release()
    torch.manual_seed(0)
    train = processor("aurora_video_train", n_frms=4, image_size=32)
    left = set()
    for _ in range(20):
        clip = train(str(path))
        assert (clip - clip[:, :1]).abs().max() < 0.1
        assert (clip[..., 16:].mean() > clip[..., :16].mean()).item()
        left.add(round(clip[0, 0, 0, 0].item(), 1))
    assert len(left) > 3


def test_a_crop_keeps_the_share_asked_for(tmp_path):
    path = write_clip(tmp_path / "a.mp4", frames=2, size=(64, 64), seed=3)
    whole = processor("aurora_video_train", n_frms=2, image_size=32, min_scale=1.0, max_scale=1.0)
    plain = processor("aurora_video_eval", n_frms=2, image_size=32)
    torch.manual_seed(0)
    assert any((whole(str(path)) - plain(str(path))).abs().max() < 1e-5 for _ in range(20))


def test_mean_and_std_can_be_set(clips):
    plain = processor("aurora_video_eval", n_frms=2, image_size=16)(str(clips / "7.mp4"))
    raw = processor("aurora_video_eval", n_frms=2, image_size=16, mean=[0, 0, 0], std=[1, 1, 1])(str(clips / "7.mp4"))
    assert raw.min() >= 0 and raw.max() <= 1
    mean, std = torch.tensor((0.48145466, 0.4578275, 0.40821073)), torch.tensor((0.26862954, 0.26130258, 0.27577711))
    torch.testing.assert_close((raw - mean.view(3, 1, 1, 1)) / std.view(3, 1, 1, 1), plain)


def test_torch_alone_decides_what_is_drawn(clips):
    train = processor("aurora_video_train", n_frms=4, image_size=16)
    torch.manual_seed(5)
    first, second = train(str(clips / "30.mp4")), train(str(clips / "30.mp4"))
    torch.manual_seed(5)
    random.seed(1), np.random.seed(1)
    assert torch.equal(train(str(clips / "30.mp4")), first) and not torch.equal(first, second)


# Broken files and settings


@pytest.mark.parametrize("how", BREAKS)
def test_a_broken_video_is_an_error_and_never_a_picture(tmp_path, capfd, how):
    path = write_clip(tmp_path / "a.mp4", frames=30, seed=0)
    read_frames(str(path), lambda length: uniform_indices(length, 8))
    break_clip(path, how)
    with pytest.raises(BrokenVideo) as caught:
        read_frames(str(path), lambda length: uniform_indices(length, 8))
    assert str(caught.value) and "\n" not in str(caught.value)
    assert len(capfd.readouterr().err.splitlines()) <= 1


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"n_frms": 0}, "vis_processor.n_frms: 0 cannot be used; it must be 1 or more"),
        ({"n_frames": 8}, "vis_processor.n_frames: unknown key; did you mean 'n_frms'"),
        ({"image_size": 0}, "vis_processor.image_size: 0"),
        ({"min_scale": 0}, "vis_processor.min_scale: 0"),
        ({"min_scale": 0.9, "max_scale": 0.5}, "vis_processor.max_scale: 0.5"),
        ({"mean": [0.5]}, "vis_processor.mean: .* three numbers"),
        ({"n_frms": "many"}, "vis_processor.n_frms: "),
    ],
)
def test_settings_that_cannot_be_used(cfg, message):
    with pytest.raises(AuroraError, match=message):
        processor("aurora_video_train", **cfg)


# Other frames, other crops


@pytest.mark.parametrize("crop", ["none", "center"])
@pytest.mark.parametrize("name", ["aurora_video_train", "aurora_video_eval"])
def test_frames_at_random_without_a_random_crop(tmp_path, name, crop):
    """As the authors' released code has them: what a plain resizing makes of frames that torch's generator draws."""
    path = write_clip(tmp_path / "a.mp4", frames=9, size=(64, 48), seed=0)
    mean, std = ([0.0] * 3, [1.0] * 3) if crop == "center" else (None, None)
    made = processor(name, n_frms=4, image_size=32, frames="random", crop=crop, mean=mean, std=std)
    torch.manual_seed(3)
    clip = made(str(path)).transpose(0, 1)
    torch.manual_seed(3)
    frames = read_frames(str(path), lambda length: random_indices(length, 4))
    for frame, picture in zip(clip, frames.permute(0, 2, 3, 1).numpy()):
        image = Image.fromarray(picture)
        if crop == "none":
            expected = BlipImageEvalProcessor(image_size=32)(image)
        else:  # 64 x 48 to 42 x 32, of which the middle is kept
            resized = np.asarray(image.resize((42, 32), Image.BICUBIC))
            expected = torch.from_numpy(resized[:, 5:37].copy()).permute(2, 0, 1) / 255
        assert frame.shape == (3, 32, 32) and (frame - expected).abs().max() < 0.03


@pytest.mark.parametrize(
    ("name", "more"), [("aurora_video_eval", {}), ("aurora_video_train", {"crop": "center"})], ids=["none", "center"]
)
@pytest.mark.parametrize("scale", [{"min_scale": 0.9}, {"max_scale": 0.6}])
def test_the_scale_of_a_crop_is_refused_without_one(name, more, scale):
    [key] = scale
    with pytest.raises(AuroraError, match=f"vis_processor.{key}: it is of a random crop alone, and crop is"):
        processor(name, **more, **scale)
    processor(name, **{"crop": "random"}, **scale)


def test_what_a_processor_draws_and_crops_may_be_said():
    with pytest.raises(AuroraError, match="frames.*did you mean 'random'"):
        processor("aurora_video_eval", frames="randm")
    with pytest.raises(AuroraError, match="crop.*did you mean 'center'"):
        processor("aurora_video_train", crop="centre")
