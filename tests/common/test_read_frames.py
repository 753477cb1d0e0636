"""Frames of videos are those that a viewer shows, in order, whatever the container; or the video is refused."""

from __future__ import annotations

import gc
import os
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from distributed import run_apart
from tiny_video import OFFSET, STEP, frame_numbers, write_clip

from lavis_aurora.common.media import BrokenVideo, read_frames

COUNT, RATE = 30, 10
# Frames of most refer to earlier ones; of h264, mpeg4 and mpeg2 to later ones too.
FORMATS = {
    "h264.mp4": ("libx264", "yuv420p"),
    "a.mp4": ("mpeg4", "yuv420p"),
    "a.mkv": ("mpeg4", "yuv420p"),
    "a.avi": ("mpeg4", "yuv420p"),
    "a.wmv": ("wmv2", "yuv420p"),
    "a.ts": ("mpeg2video", "yuv420p"),
    "a.mpg": ("mpeg2video", "yuv420p"),
    "a.flv": ("flv", "yuv420p"),
    "a.mov": ("mjpeg", "yuvj420p"),
    "a.gif": ("gif", "rgb8"),
}


def encode(path: Path, frames: list[np.ndarray], times: list[int] | None = None) -> Path:
    """Write RGB frames as the name says, ten a second or, in tenths of a second, when ``times`` says."""
    codec, pixels = FORMATS[path.name]
    rate = 25 if codec == "mpeg2video" else RATE
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.gop_size = pixels, 8
        if codec != "gif":
            stream.bit_rate = 2_000_000
        if codec in ("libx264", "mpeg4", "mpeg2video"):
            stream.max_b_frames = 2
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = times[i] if times else i, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def gray(count: int = COUNT, size: tuple[int, int] = (64, 48)) -> list[np.ndarray]:
    """Frames whose brightness tells their number."""
    return [np.full((*size[::-1], 3), STEP * i + OFFSET, np.uint8) for i in range(count)]


def numbers(path: Path, *chosen: int) -> list[int]:
    """Which frames are read, all in order or those chosen."""
    frames = read_frames(str(path), lambda length: torch.tensor(chosen) if chosen else torch.arange(length))
    return frame_numbers(frames.numpy())


@pytest.mark.parametrize("name", FORMATS)
def test_frames_are_those_chosen(tmp_path: Path, name: str) -> None:
    path = encode(tmp_path / name, gray())
    assert numbers(path) == list(range(COUNT))
    for chosen in ([0], [17], [COUNT - 1], [1, 5, 9, 13, 16, 20, 24, 28], [29, 29, 0], [7, 8]):
        assert numbers(path, *chosen) == chosen


def test_frames_of_uneven_length_are_counted(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", gray(12), times=[*range(6), *range(6, 36, 5)])
    assert numbers(path) == list(range(12)) and numbers(path, 3, 8) == [3, 8]


@pytest.mark.parametrize("size", [(48, 48), (34, 62), (16, 16)])
def test_narrow_videos_are_read(tmp_path: Path, size: tuple[int, int]) -> None:
    path = encode(tmp_path / "a.mp4", gray(4, size))
    assert numbers(path) == [0, 1, 2, 3]
    assert read_frames(str(path), torch.arange).shape == (4, 3, *size[::-1])


# Cut without re-encoding: frames stay in the file for others to refer to, and an edit list hides them


def box(data: bytes, *names: str) -> int:
    """Place of a box of an mp4."""
    start, end = 0, len(data)
    for name in names:
        place = start
        while data[place + 4 : place + 8] != name.encode():
            place += struct.unpack(">I", data[place : place + 4])[0]
            assert place < end, name
        start, end = place + 8, place + struct.unpack(">I", data[place : place + 4])[0]
    return place


def cut(path: Path, start: float, seconds: float) -> None:
    """Another edit list, as ``ffmpeg -ss START -t SECONDS -c copy`` leaves it."""
    data = bytearray(path.read_bytes())
    (movie,) = struct.unpack(">I", data[box(data, "moov", "mvhd") + 20 :][:4])
    (media,) = struct.unpack(">I", data[box(data, "moov", "trak", "mdia", "mdhd") + 20 :][:4])
    edits = box(data, "moov", "trak", "edts", "elst")
    (offset,) = struct.unpack(">i", data[edits + 20 :][:4])  # by which frames that others refer to come earlier
    struct.pack_into(">IIi", data, edits + 12, 1, int(seconds * movie), int(start * media) + offset)
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["h264.mp4", "a.mp4", "earlier_only.mp4"])
@pytest.mark.parametrize(("start", "seconds"), [(1.0, 2.0), (1.3, 1.7), (0.5, 1.0), (2.0, 0.5), (0.0, 1.5)])
def test_clips_cut_without_re_encoding(tmp_path: Path, start: float, seconds: float, name: str) -> None:
    path = tmp_path / name
    encode(path, gray()) if name in FORMATS else write_clip(path, COUNT)
    cut(path, start, seconds)
    expected = [i for i in range(COUNT) if start - 1e-6 <= i / RATE < start + seconds - 1e-6]
    assert numbers(path) == expected
    eight = (2 * torch.arange(8) + 1) * len(expected) // 16
    assert numbers(path, *eight.tolist()) == [expected[i] for i in eight.tolist()]


# Turned


@pytest.mark.parametrize(
    "matrix", [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (-1, 0, 0, 1), (0, 1, 1, 0)]
)
def test_frames_are_upright(tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Each corner is where the matrix puts it, of a frame wider than high."""
    a, b, c, d = matrix
    corners = {(-1, -1): (250, 0, 0), (1, -1): (0, 250, 0), (-1, 1): (0, 0, 250), (1, 1): (250, 250, 250)}
    picture = np.zeros((64, 96, 3), np.uint8)
    for (x, y), colour in corners.items():
        picture[(y > 0) * 32 :, (x > 0) * 48 :][:32, :48] = colour
    path = encode(tmp_path / "a.mp4", [picture] * 3)
    data = bytearray(path.read_bytes())
    values = [*(value << 16 for value in (a, b, 0, c, d, 0)), 0, 0, 1 << 30]
    struct.pack_into(">9i", data, box(data, "moov", "trak", "tkhd") + 48, *values)
    path.write_bytes(data)
    [frame] = read_frames(str(path), lambda length: torch.tensor([1]))
    height, width = (64, 96) if a else (96, 64)
    assert frame.shape == (3, height, width)
    for (x, y), colour in corners.items():
        to_x, to_y = a * x + c * y, b * x + d * y
        shown = frame[:, height // 4 if to_y < 0 else height * 3 // 4, width // 4 if to_x < 0 else width * 3 // 4]
        assert (shown.int() - torch.tensor(colour)).abs().max() < 40


# Broken


@pytest.mark.parametrize("name", ["a.mkv", "a.avi", "a.flv", "a.mp4", "a.mov"])
def test_half_a_file_is_refused(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(COUNT)]
    path = encode(tmp_path / name, pictures)
    read_frames(str(path), torch.arange)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BrokenVideo, match="download it again, or re-encode it"):
        read_frames(str(path), lambda length: torch.tensor([0]))


def test_a_damaged_frame_and_those_that_need_it_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    path = encode(tmp_path / "a.mp4", [rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(COUNT)])
    data = bytearray(path.read_bytes())
    start = box(data, "mdat") + 8
    place = start + (len(data) - start) // 2
    data[place : place + 100] = b"\x55" * 100
    path.write_bytes(data)
    with pytest.raises(BrokenVideo, match="damaged|Invalid data"):
        read_frames(str(path), torch.arange)
    assert len(read_frames(str(path), lambda length: torch.tensor([0, 1]))) == 2
    assert not capfd.readouterr().err


def test_the_cover_of_a_sound_file_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        sound, cover = container.add_stream("aac", rate=8000), container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = Disposition.attached_pic.value
        container.mux(cover.encode(av.VideoFrame(64, 64, "yuvj420p")))
        container.mux(cover.encode())
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    with pytest.raises(BrokenVideo, match="no video in it"):
        read_frames(str(path), torch.arange)


def more_threads(_rank: int, path: str) -> int:
    """How many the reading of a video leaves behind."""
    gc.disable()  # frames in circles stay
    before = len(os.listdir("/proc/self/task"))
    read_frames(path, torch.arange)
    return len(os.listdir("/proc/self/task")) - before


def test_frames_that_were_read_do_not_hold_up_a_forked_process(tmp_path):
    """Data processes are forked, and may free what the main one has read; threads are not forked with it."""
    path = encode(tmp_path / "h264.mp4", gray(size=(256, 192)))
    assert run_apart(1, more_threads, str(path)) == [0]
