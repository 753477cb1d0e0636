"""Pictures are what a viewer shows, or are refused by name; whatever they are called and LAVIS has told PIL."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFile
from PIL.Image import Transpose

from lavis_aurora import load_picture
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.media import whole_pictures

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
ORIENTATION = 0x0112
# What a camera that notes an orientation has done to what was seen.
STORED = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_90,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_270,
}


@pytest.fixture(autouse=True)
def as_lavis_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)


def seen() -> Image.Image:
    """Four colours; wider than high."""
    picture = Image.new("RGB", (48, 32), WHITE)
    for colour, corner in ((RED, (0, 0)), (GREEN, (24, 0)), (BLUE, (0, 16))):
        picture.paste(colour, (*corner, corner[0] + 24, corner[1] + 16))
    return picture


def difference(picture: Image.Image, expected: Image.Image) -> int:
    assert picture.mode == "RGB" and picture.size == expected.size
    return int(np.abs(np.asarray(picture, int) - np.asarray(expected.convert("RGB"), int)).max())


def noise(mode: str = "RGB", size: tuple[int, int] = (200, 200)) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).convert(mode)


# Orientation


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif", "mpo"])
def test_orientation_tags_are_obeyed(tmp_path: Path, ending: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = seen().transpose(STORED[orientation])
    lossless = {"lossless": True} if ending == "webp" else {"quality": 95, "subsampling": 0}
    more = {"save_all": True, "append_images": [stored]} if ending == "mpo" else {}
    stored.save(tmp_path / f"a.{ending}", exif=exif, **lossless, **more)
    assert difference(load_picture(tmp_path / f"a.{ending}"), seen()) < 10


def test_an_orientation_behind_the_pixels_of_a_png(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    file = io.BytesIO()
    seen().transpose(STORED[6]).save(file, "PNG")
    body = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    data = file.getvalue()
    end = data.rindex(b"IEND") - 4
    assert difference(load_picture(io.BytesIO(data[:end] + chunk + data[end:])), seen()) == 0


@pytest.mark.parametrize("tag", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"", 0, 9, 65535])
def test_tags_that_make_no_sense_are_left_aside(tmp_path: Path, tag: bytes | int) -> None:
    exif: Image.Exif | bytes = tag if isinstance(tag, bytes) else Image.Exif()
    if not isinstance(exif, bytes):
        exif[ORIENTATION] = tag
    seen().save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    assert difference(load_picture(tmp_path / "a.jpg"), seen()) < 10


# Transparency


def glass(mode: str = "RGBA") -> Image.Image:
    """What is white in :func:`seen` is transparent here, and black below that."""
    pixels = np.asarray(seen().convert("RGBA")).copy()
    pixels[(pixels[..., :3] == 255).all(axis=2)] = 0
    return Image.fromarray(pixels).convert(mode)


def palette(alphas: bytes | int) -> tuple[Image.Image, dict]:
    picture = Image.new("P", (48, 32))
    picture.putpalette([*RED, *GREEN, *BLUE, 0, 0, 0])
    picture.putdata([(i % 48 >= 24) + 2 * (i // 48 >= 16) for i in range(48 * 32)])
    return picture, {"transparency": alphas}


def black_for_white(mode: str) -> Image.Image:
    return glass().convert("RGB").convert(mode)


GREY = seen().convert("L")
THROUGH: dict[str, tuple[Callable[[], tuple[Image.Image, dict]], Image.Image]] = {
    "a.png": (lambda: (glass(), {}), seen()),
    "grey_alpha.png": (lambda: (glass("LA"), {}), GREY),
    "palette_bytes.png": (lambda: palette(b"\xff\xff\xff\0"), seen()),
    "palette_index.png": (lambda: palette(3), seen()),
    "colour_key.png": (lambda: (black_for_white("RGB"), {"transparency": (0, 0, 0)}), seen()),
    "grey_key.png": (lambda: (black_for_white("L"), {"transparency": 0}), GREY),
    "a.gif": (lambda: palette(3), seen()),
    "grey.gif": (lambda: (black_for_white("L"), {"transparency": 0}), GREY),
    "a.webp": (lambda: (glass(), {"lossless": True, "exact": True}), seen()),
    "a.tif": (lambda: (glass(), {}), seen()),
    "a.ico": (lambda: (glass(), {"sizes": [(48, 32)]}), seen()),
    "png_named.jpg": (lambda: (glass(), {"format": "PNG"}), seen()),
}


@pytest.mark.parametrize("name", THROUGH)
def test_transparency_is_laid_over_white(tmp_path: Path, name: str) -> None:
    make, expected = THROUGH[name]
    picture, how = make()
    picture.save(tmp_path / name, **how)
    assert difference(load_picture(tmp_path / name), expected) <= 1


def test_half_transparent_is_half_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (200, 0, 0, 128)).save(tmp_path / "a.png")
    assert np.abs(np.asarray(load_picture(tmp_path / "a.png"))[0, 0] - (227, 127, 127)).max() <= 1


@pytest.mark.parametrize("ending", ["gif", "png", "webp"])
def test_an_animation_gives_its_first_frame(tmp_path: Path, ending: str) -> None:
    others = [Image.new("RGBA", (48, 32), colour) for colour in ("black", "yellow")]
    lossless = {"lossless": True} if ending == "webp" else {}
    glass().save(tmp_path / f"a.{ending}", save_all=True, append_images=others, duration=100, **lossless)
    assert difference(load_picture(tmp_path / f"a.{ending}"), seen()) <= 1


# More and fewer bits, other colours


@pytest.mark.parametrize("name", ["a.png", "png_named.jpg", "a.tif", "a.pgm", "big_endian.tif"])
def test_grey_of_16_bits(tmp_path: Path, name: str) -> None:
    """As in 16 bits of colour, and in every viewer, 65535 is white."""
    grey = np.zeros((8, 8), np.uint16)
    grey[:, 2:], grey[:, 4:], grey[:, 6:] = 20000, 200, 65535
    if name == "a.pgm":
        (tmp_path / name).write_bytes(b"P5 8 8 65535\n" + grey.astype(">u2").tobytes())
    elif name == "big_endian.tif":
        Image.fromarray(grey.astype(">u2")).save(tmp_path / name)
    else:
        Image.fromarray(grey).save(tmp_path / name, format="PNG" if "png" in name else None)
    assert np.asarray(load_picture(tmp_path / name))[0, ::2].tolist() == [[v] * 3 for v in (0, 78, 0, 255)]


def test_grey_of_16_bits_with_a_transparent_value(tmp_path: Path) -> None:
    grey = np.full((8, 8), 300, np.uint16)
    grey[:, 4:] = 301
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "PNG")
    data = file.getvalue()
    body = b"tRNS" + struct.pack(">H", 301)
    start = data.index(b"IDAT") - 4
    chunk = struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body))
    pixels = np.asarray(load_picture(io.BytesIO(data[:start] + chunk + data[start:])))
    assert (pixels[:, :4] == 1).all() and (pixels[:, 4:] == 255).all()


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_colours_of_16_bits(tmp_path: Path, ending: str, channels: int) -> None:
    pixels = np.zeros((8, 8, channels), np.uint16)
    pixels[..., 2], pixels[:, 4:, 3:] = 40000, 65535
    cv2.imwrite(str(tmp_path / f"a.{ending}"), pixels)
    left, right = np.asarray(load_picture(tmp_path / f"a.{ending}"))[0, [0, 7]].tolist()
    assert right == [156, 0, 0] and left == ([156, 0, 0] if channels == 3 else [255] * 3)


@pytest.mark.parametrize(("dtype", "mode"), [(np.float32, "F"), (np.int32, "I")])
def test_pictures_without_a_white_are_refused(tmp_path: Path, dtype: type, mode: str) -> None:
    Image.fromarray(np.ones((8, 8), dtype)).save(tmp_path / "a.tif")
    message = f"cannot read {tmp_path}/a.tif .* which value is white in its mode, {mode}; convert it to 8 bits"
    with pytest.raises(AuroraError, match=message):
        load_picture(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
@pytest.mark.parametrize("ending", ["tif", "jpg", "png"])
def test_other_modes_are_as_pil_has_them(tmp_path: Path, ending: str, mode: str) -> None:
    path = tmp_path / f"a.{ending}"
    try:
        noise(mode).save(path)
    except OSError:
        pytest.skip(f"no {ending} has mode {mode}")
    with whole_pictures(), Image.open(path) as opened:
        try:
            expected = opened.convert("RGB")
        except OSError:
            pytest.skip(f"this Pillow cannot read the {ending} of mode {mode} that it writes")  # 11.3, YCbCr in tif
    assert difference(load_picture(path), expected) == 0


# Refused


@pytest.mark.parametrize("ending", ["jpg", "png", "gif", "webp", "bmp", "tif", "ppm"])
def test_half_a_file_is_refused_by_name(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    noise().save(path)
    load_picture(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AuroraError, match=f"^cannot read {path} \\("):
        load_picture(path)
    with pytest.raises(AuroraError, match=f"^cannot read {path} \\("), path.open("rb") as file:
        load_picture(file)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


NO_PICTURES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "No such file"),
    "html": (lambda path: path.write_text("<html>not found</html>"), "cannot identify image file"),
    "empty": (lambda path: path.touch(), "cannot identify image file"),
    "pipe": (os.mkfifo, "it is a pipe, not a file"),
    "folder": (os.mkdir, "it is a folder, not a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "it is a device, not a file"),
    "bomb": (lambda path: Image.new("1", (20_000, 20_000)).save(path), "decompression bomb"),
}


@pytest.mark.parametrize("kind", NO_PICTURES)
def test_what_is_no_picture_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    make, problem = NO_PICTURES[kind]
    make(tmp_path / "a.png")
    with pytest.raises(AuroraError) as caught:
        load_picture(str(tmp_path / "a.png"))
    assert str(caught.value).startswith(f"cannot read {tmp_path}/a.png (") and problem in str(caught.value)


def test_bytes_that_are_no_picture() -> None:
    with pytest.raises(AuroraError, match="^cannot read the picture "):
        load_picture(io.BytesIO(b"no"))


def test_while_any_thread_reads_no_half_file_is_filled_up() -> None:
    first, second = whole_pictures(), whole_pictures()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    second.__exit__(None, None, None)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def tiff(bits: int, photometric: int, data: bytes) -> io.BytesIO:
    """Four by four pixels of grey, as the TIFF specification has them (tags 256 to 279)."""
    start = 8 + len(data)
    tags = {256: 4, 257: 4, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 4, 279: len(data)}
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    return io.BytesIO(b"II*\0" + struct.pack("<I", start) + data + struct.pack("<H", len(tags)) + entries + bytes(4))


@pytest.mark.parametrize(
    ("bits", "photometric", "data", "grey"),
    [
        (16, 1, b"\xff" * 32, 255),
        (16, 0, b"\xff" * 32, 0),
        (16, 0, bytes(32), 255),
        (12, 1, b"\xff" * 24, 255),
        (8, 0, bytes(16), 255),
    ],
)
def test_grey_of_tiff_is_read_by_its_tags(bits, photometric, data, grey):
    assert set(np.asarray(load_picture(tiff(bits, photometric, data))).flat) == {grey}


@pytest.mark.parametrize("source", [None, b"\x89PNG", np.zeros((2, 2, 3), np.uint8), Image.new("RGB", (2, 2))])
def test_what_is_no_file_is_said_in_a_line(source):
    with pytest.raises(AuroraError, match=f"load_picture: {type(source).__name__} cannot be read; it takes a path"):
        load_picture(source)
