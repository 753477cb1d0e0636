"""What the page of ``lavis-aurora app`` shows: adapters, the demo's pictures, and pictures at its size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageOps

from lavis_aurora.adapters.config import read_adapter
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.files import read_json
from lavis_aurora.common.paths import data_root
from lavis_aurora.data.samples import read_visual
from lavis_aurora.demo.pictures import generate_pictures

# Pixels of a side at most, of pictures that are sent to the browser.
SHOWN_SIDE = 480
FROZEN = "frozen"
DEMO_PICTURES = 200


@dataclass(frozen=True)
class View:
    """The backbone with one adapter.

    Attributes:
        name: as shown.
        adapter: folder; None for the backbone alone.
        parameters: trained ones, of heads and gates among them.
        megabytes: that its file takes.
        arch: registered name of its model.
    """

    name: str
    adapter: str | None = None
    parameters: int = 0
    megabytes: float = 0.0
    arch: str | None = None

    @property
    def label(self) -> str:
        """Name, parameters and size."""
        if self.adapter is None:
            return f"{self.name} (no adapter)"
        return f"{self.name} ({self.parameters:,} parameters, {self.megabytes:.2f} MB)"


def named_adapters(given: Sequence[str]) -> dict[str, str]:
    """Folders by name, from NAME=FOLDER or FOLDER.

    Raises:
        AuroraError: two have one name.
    """
    found: dict[str, str] = {}
    for one in given:
        name, _, folder = one.rpartition("=")
        name = name or Path(folder).name
        if name in found or name == FROZEN:
            raise AuroraError(f"--adapter: {name} is the name of another one; name it otherwise, as NAME={folder}")
        found[name] = folder
    return found


def view(name: str, folder: str | None) -> View:
    """What an adapter is; ``folder`` is None for the backbone alone.

    Raises:
        AuroraError: it cannot be read.
    """
    if folder is None:
        return View(name)
    config, tensors = read_adapter(folder)
    fixed = () if config.model.get("settings", {}).get("train_temp") else ("heads.temp",)
    count = sum(tensor.numel() for key, tensor in tensors.items() if key not in fixed)
    return View(name, folder, count, sum(x.nbytes for x in tensors.values()) / 1e6, config.model.get("arch"))


def demo_pictures() -> tuple[str, dict[str, str]]:
    """The demo's folder of pictures, made on first use, and their captions, with the file of each."""
    folder = data_root() / "demo_app"
    table = folder / "shifted_test.json"
    if not table.is_file():
        generate_pictures(folder, "shifted", {"test": DEMO_PICTURES})
    images = folder / "images"
    return str(images), {text: str(images / row["image"]) for row in read_json(table) for text in row["caption"]}


def share_weights(kept: torch.nn.Module, other: torch.nn.Module) -> None:
    """Let ``other`` have the tensors of ``kept`` where they are equal: models of one backbone hold it once."""
    own = dict(kept.named_parameters())
    for name, parameter in other.named_parameters():
        twin = own.get(name)
        if twin is not None and twin.shape == parameter.shape and torch.equal(twin, parameter):
            parameter.data = twin.data


def sized(picture: Image.Image) -> Image.Image:
    """A copy that is sent to the browser: large ones made small, small ones large enough to be seen."""
    return ImageOps.contain(picture.convert("RGB"), (SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.BICUBIC)


def visual(path: str) -> Image.Image:
    """A picture, or the middle frame of a clip, as it is shown."""
    return sized(Image.fromarray(read_visual(path)))


def overlay(picture: Image.Image, grid: NDArray[np.float32]) -> Image.Image:
    """Attention of a word, (rows, columns), over a picture."""
    span = float(grid.max() - grid.min()) or 1.0
    shades = Image.fromarray((255 * (grid - grid.min()) / span).astype(np.uint8))
    shades = shades.resize(picture.size, Image.Resampling.BICUBIC)
    colors = Image.fromarray((colormaps["inferno"](np.asarray(shades))[..., :3] * 255).astype(np.uint8))
    return Image.blend(picture.convert("RGB"), colors, 0.6)
