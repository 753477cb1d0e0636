"""Several adapters over one index: what each is, its own index beside the first, and the demo's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lavis_aurora.adapters.config import read_adapter
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.files import read_json
from lavis_aurora.common.paths import data_root, package_file
from lavis_aurora.demo.pictures import generate_pictures
from lavis_aurora.search.answering import ARCH as ANSWERS
from lavis_aurora.search.index import PictureIndex
from lavis_aurora.search.model import adapter_hash

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


@dataclass(frozen=True)
class Views:
    """What a page shows.

    Attributes:
        indexes: of the backbone or adapter of the index first, then of each adapter of retrieval, by name.
        views: of all adapters by name, those of answers too.
        captions: of the demo's pictures, with the file of each; none of one's own pictures.
    """

    indexes: dict[str, PictureIndex]
    views: dict[str, View]
    captions: dict[str, str]

    @property
    def first(self) -> PictureIndex:
        """The index that was named."""
        return next(iter(self.indexes.values()))


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


def open_views(place: str | None, given: Sequence[str], device: str) -> Views:
    """The index and one for each adapter of retrieval; those that are empty are made, and all of the demo.

    Args:
        place: an index or the folder that it is in; the demo without.
        given: of :func:`named_adapters`.
        device: of :class:`PictureIndex`.

    Raises:
        AuroraError: what is named cannot be used.
    """
    adapters, model_type, captions = named_adapters(given), None, dict[str, str]()
    if place is None:
        place, captions = demo_pictures()
        adapters, model_type = {"tuned": package_file("configs/models/tiny/adapter"), **adapters}, "tiny"
    views = {name: view(name, folder) for name, folder in adapters.items()}
    first = PictureIndex(place, model_type=model_type, device=device)
    own = first.model.source.adapter
    name = FROZEN if own is None else Path(own).name
    views, indexes = {name: view(name, own), **views}, {name: first}
    # Backbone and picture size as the index has them.
    source = {key: getattr(first.model.source, key) for key in ("pretrained", "tokenizer", "med_config_path")}
    for name, folder in adapters.items():
        if views[name].arch == ANSWERS:
            continue
        beside = f"{first.place}.{adapter_hash(folder)[:12]}"
        indexes[name] = PictureIndex(first.root, beside, adapter=folder, device=device, **source)
        share_weights(first.model.model, indexes[name].model.model)
    for index in indexes.values():
        if model_type is not None or not len(index):
            index.update()
    return Views(indexes, views, captions)


def share_weights(kept: torch.nn.Module, other: torch.nn.Module) -> None:
    """Let ``other`` have the tensors of ``kept`` where they are equal: models of one backbone hold it once."""
    own = dict(kept.named_parameters())
    for name, parameter in other.named_parameters():
        twin = own.get(name)
        if twin is not None and twin.shape == parameter.shape and torch.equal(twin, parameter):
            parameter.data = twin.data
