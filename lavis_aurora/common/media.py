"""Pictures and frames of videos as a viewer shows them, or an error that says what is wrong with the file."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.files import regular

if TYPE_CHECKING:  # where no video is read, PyAV is not imported
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# Names' endings.
PICTURE_ENDINGS = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
VIDEO_ENDINGS = (
    *(".3g2", ".3gp", ".avi", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".webm", ".wmv"),
)
# Modes without transparency of which PIL's RGB is what viewers show.
PLAIN_MODES = ("1", "L", "RGB", "CMYK", "YCbCr")
# Formats with grey of 16 bits in mode I; in others it has 32, of which nothing says which value is white.
DEEP_FORMATS = ("PNG", "PPM")
# Tags of TIFF.
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
# Formats whose index names every frame's time, so that seeking is exact.
INDEXED = ("mov", "matroska")
# A file is cut off if so large a share of its time is missing, and a second more: durations are often rounded.
MISSING = 0.1
REMEDY = "download it again, or re-encode it (ffmpeg -i VIDEO -pix_fmt yuv420p NEW.mp4)"


# Pictures


def load_picture(source: str | os.PathLike[str] | BinaryIO) -> Image.Image:
    """A picture as a viewer shows it, in RGB with 8 bits a channel.

    Orientation tags are obeyed, transparency is laid over white, values of 16 bits become 8, an animation gives its
    first frame. Colour profiles are not applied.

    Args:
        source: a path, or an open file.

    Raises:
        AuroraError: it is no picture, or not a whole one; the message names the file.
    """
    if not isinstance(source, (str, os.PathLike)) and not hasattr(source, "read"):
        raise AuroraError(f"load_picture: {type(source).__name__} cannot be read; it takes a path or an open file")
    try:
        return read_picture(source)
    except Exception as error:  # each of PIL's formats has errors of its own
        name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else getattr(source, "name", "the picture")
        raise AuroraError(f"cannot read {name} ({unreadable_because(error)})") from error


def unreadable_because(error: BaseException) -> str:
    """Why a picture cannot be read, without its name: of an error of PIL's or of the system's."""
    if isinstance(error, UnidentifiedImageError):
        return "cannot identify image file: it is no picture, or damaged"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def read_picture(source: str | os.PathLike[str] | BinaryIO) -> Image.Image:
    """As :func:`load_picture`, with PIL's own errors."""
    with whole_pictures(), _opened(source) as opened:
        opened.load()
        turn_upright(opened)
        picture = _eight_bits(opened)
        if picture.has_transparency_data:
            shown = Image.new("RGBA", picture.size, "white")
            shown.alpha_composite(picture.convert("RGBA"))
            picture = shown
        return picture.convert("RGB")


def as_shown(picture: Image.Image, path: str) -> Image.Image:
    """What :func:`load_picture` gives for a path of which LAVIS has opened the picture and made RGB of it.

    Decodes the file only where that has lost something.
    """
    if os.path.exists(path):
        with _opened(path) as header:
            if header.mode not in PLAIN_MODES or "transparency" in header.info:
                return read_picture(path)
    turn_upright(picture)
    return picture


def _opened(source: str | os.PathLike[str] | BinaryIO) -> Image.Image:
    """Its header is read; a pipe or a device is not opened."""
    return Image.open(source if hasattr(source, "read") else regular(os.fspath(source)))


def turn_upright(picture: Image.Image) -> None:
    """Turn or mirror a picture in place as its orientation tag says, if it has a valid one."""
    with suppress(Exception):  # tags that make no sense, PIL raises anything for; viewers ignore them
        ImageOps.exif_transpose(picture, in_place=True)


def _eight_bits(picture: Image.Image) -> Image.Image:
    """A picture of more bits a channel as viewers show it, by its high bytes; any other as it is.

    Raises:
        ValueError: nothing says which of its values is white.
    """
    mode, deep = picture.mode, picture.mode.startswith("I;16")
    if not deep and mode not in ("I", "F"):
        return picture
    if not deep and (mode == "F" or picture.format not in DEEP_FORMATS):
        raise ValueError(f"nothing says which value is white in its mode, {mode}; convert it to 8 bits a channel")
    values = np.asarray(picture)
    tags: Any = getattr(picture, "tag_v2", {})  # of TIFF, which has values of 9 to 15 bits too, and white as zero
    eight = Image.fromarray((values >> tags.get(BITS, (16,))[0] - 8).astype(np.uint8))
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        eight = ImageOps.invert(eight)
    if "transparency" in picture.info:
        eight.putalpha(Image.fromarray(np.where(values == picture.info["transparency"], 0, 255).astype(np.uint8)))
    return eight


_blocks, _allowed, _lock = 0, False, Lock()


@contextmanager
def whole_pictures() -> Iterator[None]:
    """PIL refuses pictures that are cut off inside the block; LAVIS lets it fill them up, for the whole process."""
    global _blocks, _allowed
    with _lock:
        if not _blocks:
            _allowed = ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if not _blocks:
                ImageFile.LOAD_TRUNCATED_IMAGES = _allowed


# Videos


class BrokenVideo(Exception):
    """A video that is missing or cannot be decoded; the message says why, not which."""


def read_frames(path: str, choose: Callable[[int], Tensor]) -> Tensor:
    """Decode some frames of a video, upright and in the order of showing; those that are not shown do not count.

    Args:
        path: the video.
        choose: the frames of a video of a given length.

    Returns:
        uint8 RGB, (frames, 3, height, width).

    Raises:
        BrokenVideo: it is missing, cut off, or a chosen frame cannot be decoded.
    """
    import av

    if not os.path.exists(path):
        raise BrokenVideo("no such file")
    try:
        file = str(regular(path))
        frames = _sought(file, choose) or _counted(file, choose)
        return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        remedy = f"; {REMEDY}" if isinstance(error, av.FFmpegError) else ""
        raise BrokenVideo(" ".join(f"{reason}{remedy}".split())) from error


@contextmanager
def _video(path: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Its container and its stream. A file may not make ffmpeg fetch another one."""
    import av
    from av.stream import Disposition
    from av.video.stream import VideoStream

    with av.open(path, container_options={"protocol_whitelist": "file"}, metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream) or Disposition.attached_pic in stream.disposition:
            raise BrokenVideo("no video in it")
        if stream.codec_context is None:
            raise BrokenVideo(f"ffmpeg cannot decode it; {REMEDY}")
        stream.codec_context.thread_count = 1  # loaders have processes of their own
        yield container, stream


def _sought(path: str, choose: Callable[[int], Tensor]) -> list[NDArray[np.uint8]] | None:
    """The chosen frames, each found by its time; None where times are not exact, or one is not met or damaged."""
    with _video(path) as (container, stream):
        packets = _packets(container, stream)
        times = sorted({time for time, _ in packets if time is not None})
        exact = container.format.name.startswith(INDEXED) and len(times) == len(packets)
        if not exact or not times:
            return None
        wanted = [times[i] for i in choose(len(times)).tolist()]
        keys = sorted(time for time, key in packets if key and time is not None)
        found: dict[int, NDArray[np.uint8]] = {}
        frames: Iterator[VideoFrame] = iter(())
        now = None
        for time in sorted(set(wanted)):
            place = bisect_right(keys, time) - 1
            if place < 0:
                return None
            if now is None or keys[place] > now:
                container.seek(keys[place], stream=stream)
                frames = container.decode(stream)
            for frame in frames:
                now = frame.pts
                if now is None or now >= time or frame.is_corrupt:
                    break
            if now != time or frame.is_corrupt:
                return None
            found[time] = _pixels(frame)
        return [found[time] for time in wanted]


def _counted(path: str, choose: Callable[[int], Tensor]) -> list[NDArray[np.uint8]]:
    """The chosen frames; the whole video is decoded to count them, and then again."""
    with _video(path) as (container, stream):
        count = sum(1 for _ in _sound(container.decode(stream)))
    if not count:
        raise BrokenVideo("no frames")
    wanted = choose(count).tolist()
    with _video(path) as (container, stream):
        frames = enumerate(islice(_sound(container.decode(stream)), max(wanted) + 1))
        found = {i: _pixels(frame) for i, frame in frames if i in wanted}
    return [found[i] for i in wanted]


def _packets(container: InputContainer, stream: VideoStream) -> list[tuple[int | None, bool]]:
    """Time of every frame that is shown, as its index says, and whether it can be decoded without others.

    Raises:
        BrokenVideo: the file is cut off.
    """
    shown: list[tuple[int | None, bool]] = []
    end = 0.0
    for packet in container.demux():
        if packet.is_corrupt:
            raise BrokenVideo(f"it is cut off; {REMEDY}")
        time = packet.dts if packet.pts is None else packet.pts
        if packet.size and time is not None:
            end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
        # An edit list, as a cut without re-encoding leaves it, has frames that others need but that are not shown.
        if packet.size and packet.stream is stream and not packet.is_discard:
            shown.append((packet.pts, packet.is_keyframe))
    length = (container.duration or 0) / 1e6  # microseconds
    if end < (1 - MISSING) * length - 1:
        raise BrokenVideo(f"it is cut off: {end:.1f} of {length:.1f} seconds are there; {REMEDY}")
    return shown


def _sound(frames: Iterator[VideoFrame]) -> Iterator[VideoFrame]:
    """Frames; behind a damaged one those that need it are damaged too.

    Raises:
        BrokenVideo: at a damaged one.
    """
    for frame in frames:
        if frame.is_corrupt:
            raise BrokenVideo(f"its frame at {frame.time or 0:.2f} s is damaged; {REMEDY}")
        yield frame


def _pixels(frame: VideoFrame) -> NDArray[np.uint8]:
    """RGB, (height, width, 3), turned and mirrored as the file says (phones note how they were held)."""
    import av

    # One thread, as before PyAV 17: freed after a fork, a frame would wait for threads that are not there.
    threads: dict[str, Any] = {"threads": 1} if int(av.__version__.partition(".")[0]) >= 17 else {}
    pixels = np.asarray(frame.to_ndarray(format="rgb24", **threads), np.uint8)
    notes: Any = frame.side_data
    if "DISPLAYMATRIX" not in notes:
        return pixels
    # (x, y) of the frame is (a x + c y, b x + d y) on the screen.
    (a, b, _), (c, d, _), _ = np.frombuffer(notes["DISPLAYMATRIX"], np.int32).reshape(3, 3).tolist()
    if abs(a) < abs(b):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
