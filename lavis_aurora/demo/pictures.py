"""Captioned pictures of shapes in two domains, so that the demo needs no download.

Files are in the format of LAVIS's retrieval datasets; :mod:`lavis_aurora.demo.scenes` says what they show.

    python -m lavis_aurora.demo.pictures FOLDER --domain shifted --train 2500 --val 300 --test 500
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import textwrap
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from lavis_aurora.common.media import load_picture
from lavis_aurora.demo.scenes import (
    DOMAINS,
    RGB,
    SHAPE_COUNTS,
    SPLITS,
    Domain,
    Scene,
    caption_of,
    check_splits,
    domain_of,
    iter_scenes,
)

# Writes files into a folder, (folder, split, rng) -> name and caption of each once it is written, without end.
WriteSamples = Callable[[Path, str, np.random.Generator], Iterator[tuple[str, str]]]


def _write_split(
    folder: Path, domain: str, split: str, count: int, seed: int, kind: str, samples: WriteSamples
) -> None:
    """Writes `folder/<domain>_<split>.json` and what it names under `folder/<kind>s`."""
    rng = np.random.default_rng(zlib.crc32(f"{seed}/{domain}/{split}".encode()))
    place = Path(domain) / split
    (folder / f"{kind}s" / place).mkdir(parents=True)
    written = samples(folder / f"{kind}s" / place, split, rng)
    rows = []
    for index in tqdm(range(count), desc=f"{domain} {split}", unit=kind):
        name, caption = next(written)
        rows.append(
            {
                kind: (place / name).as_posix(),
                # LAVIS reads an evaluation caption as a list; a plain string it would split into letters
                "caption": caption if split == "train" else [caption],
                f"{kind}_id": f"{domain}_{split}_{index:05d}",
            }
        )
    (folder / f"{domain}_{split}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def write_splits(
    folder: str | Path, domain: str, counts: Mapping[str, int], seed: int, kind: str, samples: WriteSamples
) -> dict[str, Path]:
    """Writes splits of one domain in the format of LAVIS's retrieval datasets.

    A split is `folder/<domain>_<split>.json` and files in `folder/<kind>s/<domain>/<split>`. A json row has `<kind>`
    (relative to `folder/<kind>s`), `<kind>_id` and `caption`: a string for train, a list of one string for val and
    test. A json is in place only when its files are; splits that stand already are replaced, others left alone.

    Args:
        folder: made if missing.
        domain: "clean" or "shifted".
        counts: split ("train", "val", "test") -> number of samples.
        seed: of what `samples` draws.
        kind: "image" or "video".
        samples: writes them.

    Returns:
        The path of each split's json.

    Raises:
        ValueError: for an unknown domain, an unknown split, or a negative count.
    """
    domain_of(domain)
    check_splits([*counts])
    for split, count in counts.items():
        if count < 0:
            raise ValueError(f"count of {split!r} is {count}: give 0 or more")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    done = {}
    # inside `folder`, so that moving is a rename on one file system
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished_") as unfinished:
        for split, count in counts.items():
            _write_split(Path(unfinished), domain, split, count, seed, kind, samples)
        for split in counts:
            done[split] = folder / f"{domain}_{split}.json"
            # the json goes first and comes last: where one stands, its files are complete
            done[split].unlink(missing_ok=True)
            place = Path(f"{kind}s") / domain / split
            shutil.rmtree(folder / place, ignore_errors=True)
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (Path(unfinished) / place).rename(folder / place)
            (Path(unfinished) / done[split].name).rename(done[split])
    return done


SIDE = 64  # pixels of a finished picture
_SCALE = 4  # drawn this much larger, then averaged down: smooth edges without a slow renderer
_CELL = SIDE / 3
_DIRECTIONS = 8  # of the background gradient


def _regular(corners: int, inner: float | None = None, turn: float = 0.0) -> np.ndarray:
    """Polygon (n, 2) of radius 1, the first corner up; with `inner`, a star of 2 * corners points."""
    n = corners if inner is None else 2 * corners
    angles = 2 * np.pi * (np.arange(n) / n) + turn - np.pi / 2
    radii = np.where(np.arange(n) % 2 == 1, inner or 1.0, 1.0)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x / 16, -(y + 2.5) / 14.5], axis=1)


_ARM = np.array([(-1, -1), (-1, -3), (1, -3)]) / 3  # of the cross; turned three times it is the whole
# polygons of radius about 1, y down; a second polygon is a hole
_OUTLINES: dict[str, tuple[np.ndarray, ...]] = {
    "circle": (_regular(48) * 0.95,),
    "triangle": (_regular(3) * 1.1 + (0, 0.2),),
    "star": (_regular(5, 0.42) * 1.12,),
    "square": (_regular(4, turn=np.pi / 4) * 1.2,),
    "cross": (np.concatenate([_ARM @ np.linalg.matrix_power([[0, 1], [-1, 0]], k) for k in range(4)]),),
    "diamond": (_regular(4) * (0.68, 1.12),),
    "ring": (_regular(48), _regular(48) * 0.55),
    "heart": (_heart(),),
    "bar": (np.array([(-1.1, -0.36), (1.1, -0.36), (1.1, 0.36), (-1.1, 0.36)]),),
}


@cache
def _fill(color: RGB, stripes: float) -> Image.Image:
    """A cached tile of the color, with slanted stripes of a darker one; drawing scale."""
    side = SIDE * _SCALE
    y, x = np.mgrid[:side, :side]
    dark = ((x + y) // (3 * _SCALE)) % 2 * stripes
    return Image.fromarray((np.array(color) * (1 - dark[..., None])).astype(np.uint8))


@cache
def _backdrop(color: RGB, gradient: float, direction: int) -> Image.Image:
    """A cached background that fades towards grey in one of `_DIRECTIONS` directions; drawing scale."""
    y, x = np.mgrid[-1 : 1 : SIDE * _SCALE * 1j, -1 : 1 : SIDE * _SCALE * 1j]
    angle = 2 * np.pi * direction / _DIRECTIONS
    way = x * np.cos(angle) + y * np.sin(angle)
    fade = gradient * (way - way.min()) / (way.max() - way.min())
    base, grey = np.array(color, float), 110.0
    return Image.fromarray((base + fade[..., None] * (grey - base)).astype(np.uint8))


@cache
def _noise(deviation: float) -> np.ndarray:
    """A cached int16 plane of noise (4 * SIDE, 4 * SIDE, 3): windows of it are faster than drawing anew."""
    draw = np.random.default_rng(0).standard_normal((4 * SIDE, 4 * SIDE, 3))
    return (draw * deviation).round().astype(np.int16)


def render(
    scene: Scene, domain: Domain, rng: np.random.Generator, shift: tuple[float, float] = (0.0, 0.0)
) -> Image.Image:
    """Draws a scene: an RGB picture of SIDE x SIDE. `rng` decides what the caption does not tell.

    `shift` moves its shapes, by so many cells down and to the right.
    """
    direction = int(rng.integers(_DIRECTIONS)) if domain.gradient else 0
    picture = _backdrop(domain.backgrounds[scene.background], domain.gradient, direction).copy()
    for shape in scene.shapes:
        row, column = np.add(divmod(shape.cell, 3), shift)
        x, y = (np.array((column, row)) + 0.5) * _CELL + rng.uniform(-domain.jitter, domain.jitter, 2)
        angle = np.deg2rad(rng.uniform(-domain.rotation, domain.rotation))
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        radius = domain.sizes[shape.size] * _SCALE
        half = int(1.3 * radius) + 1
        mask = Image.new("L", (2 * half, 2 * half))
        for index, outline in enumerate(_OUTLINES[shape.shape]):
            points = outline @ turn * radius + half
            ImageDraw.Draw(mask).polygon(points.ravel().tolist(), fill=0 if index else 255)
        left, top = int(x * _SCALE) - half, int(y * _SCALE) - half
        phase = int(rng.integers(6 * _SCALE)) if domain.stripes else 0
        tile = _fill(domain.colors[shape.color], domain.stripes).crop((phase, 0, phase + 2 * half, 2 * half))
        picture.paste(tile, (left, top), mask)
    picture = picture.reduce(_SCALE)
    if domain.noise:
        top, left = rng.integers(3 * SIDE, size=2)
        noisy = np.asarray(picture) + _noise(domain.noise)[top : top + SIDE, left : left + SIDE]
        picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    return picture


def generate_pictures(
    folder: str | Path,
    domain: str,
    counts: Mapping[str, int],
    seed: int = 0,
    shape_counts: Sequence[float] = SHAPE_COUNTS,
) -> dict[str, Path]:
    """Writes captioned pictures of one domain in the format of LAVIS's retrieval datasets.

    JPEGs of 64 x 64 pixels in `folder/images`, and json files as `write_splits` has them. No scene, and so no
    caption, comes twice in a split or in two splits.

    Args:
        folder: made if missing.
        domain: "clean" or "shifted".
        counts: split ("train", "val", "test") -> number of pictures.
        seed: the same seed gives the same files.
        shape_counts: how often a picture has one, two and three shapes.

    Returns:
        The path of each split's json.

    Raises:
        ValueError: for an unknown domain, an unknown split, or a negative count.
    """

    def samples(place: Path, split: str, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
        spec = domain_of(domain)
        for index, scene in enumerate(iter_scenes(domain, split, seed, shape_counts)):
            name = f"{index:05d}.jpg"
            # full-resolution color: the usual halved one would smear shapes this small
            render(scene, spec, rng).save(place / name, quality=95, subsampling=0)
            yield name, caption_of(scene, spec)

    return write_splits(folder, domain, counts, seed, "image", samples)


def contact_sheet(
    json_path: str | Path, images_root: str | Path, out_png: str | Path, rows: int = 3, columns: int = 4
) -> Path:
    """Draws the first rows x columns pictures of a json with their captions into a PNG; returns its path."""
    # imported here: the generator itself needs no matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries = json.loads(Path(json_path).read_text(encoding="utf-8"))[: rows * columns]
    figure = Figure(figsize=(2.6 * columns, 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for axis in figure.subplots(rows, columns, squeeze=False).flat:
        axis.set_axis_off()
    for axis, entry in zip(figure.axes, entries):
        caption = entry["caption"] if isinstance(entry["caption"], str) else entry["caption"][0]
        axis.imshow(load_picture(Path(images_root) / entry["image"]))
        axis.set(xticks=[], yticks=[])
        axis.set_axis_on()  # a frame, or a white picture has no edge
        axis.set_title(textwrap.fill(caption, 30), fontsize=8)
    out_png = Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png, dpi=110, bbox_inches="tight")
    return out_png


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `generate_pictures`; a split with 0 pictures is left as it is."""
    parser = argparse.ArgumentParser(description="Generate captioned pictures in LAVIS's retrieval format.")
    parser.add_argument("folder", help="where the json files and images/ go")
    parser.add_argument("--domain", choices=[*DOMAINS], default="shifted", help="default: %(default)s")
    for split, count in (("train", 2500), ("val", 300), ("test", 500)):
        parser.add_argument(f"--{split}", type=int, default=count, help="0: left out (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--contact-sheet", metavar="PNG", help="also draw pictures of the last split here")
    args = parser.parse_args(argv)
    counts = {split: getattr(args, split) for split in SPLITS if getattr(args, split)}
    if not counts:
        parser.error("nothing to do: give --train, --val or --test a number above 0")
    try:
        paths = generate_pictures(args.folder, args.domain, counts, args.seed)
    except ValueError as error:
        parser.error(str(error))
    for split, path in paths.items():
        print(f"{split}: {counts[split]} pictures, {path}")
    if args.contact_sheet:
        print(contact_sheet([*paths.values()][-1], Path(args.folder) / "images", args.contact_sheet))


if __name__ == "__main__":
    main()
