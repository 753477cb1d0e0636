"""A model as search and answers use it: how it is loaded again, what it reads, and what tells it from others."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, Optional

import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf
from torch import Tensor

from lavis_aurora.adapters.companions import adapter_parameters, persistent_buffers
from lavis_aurora.adapters.config import read_adapter_config, tensors_hash
from lavis_aurora.adapters.switching import SETS, disable_adapter, find_adapters
from lavis_aurora.common.errors import AuroraError, require, shown
from lavis_aurora.common.media import BrokenVideo, load_picture, unreadable_because
from lavis_aurora.common.paths import relocated
from lavis_aurora.config.run import VideoProcessorConfig
from lavis_aurora.data.samples import VideoEvalProcessor, VideoProcessor
from lavis_aurora.models.loading import SOURCES, load_model_and_preprocess
from lavis_aurora.search.files import CLIP, kind_of


@dataclass(frozen=True)
class ModelSource:
    """What to load a model from; arguments of :func:`lavis_aurora.load_model_and_preprocess`.

    Attributes:
        model_type: one of the model's types; that of the adapter, or the default one, without.
        adapter: folder of an adapter.
        pretrained, tokenizer, med_config_path: instead of the type's own.
        frames: of a clip; as many as the adapter was tuned with, or 8, without.
    """

    model_type: Optional[str] = None
    adapter: Optional[str] = None
    pretrained: Optional[str] = None
    tokenizer: Optional[str] = None
    med_config_path: Optional[str] = None
    frames: Optional[int] = None

    def __post_init__(self) -> None:
        require(self.frames is None or self.frames > 0, "frames", self.frames, "1 or more")

    def overlaid(self, given: ModelSource) -> ModelSource:
        """This, with what another one says in place of its own."""
        return replace(self, **{key: value for key, value in vars(given).items() if value is not None})

    def absolute(self) -> ModelSource:
        """The same from any folder."""
        paths = {key: os.path.expanduser(path) for key, path in self._paths().items()}
        absolute = {key: os.path.abspath(path) for key, path in paths.items() if os.path.exists(path)}
        changed: dict[str, Any] = {**paths, **absolute}
        return replace(self, **changed)

    def relocated(self) -> ModelSource:
        """The same, with this package's file for one of a package that was elsewhere."""
        found: dict[str, Any] = {key: relocated(path) for key, path in self._paths().items()}
        return replace(self, **found)

    def check_local(self, index: str, given: ModelSource) -> None:
        """Refuse what an index names that is not on this machine: an index decides nothing that others fetch.

        Args:
            index: where it is.
            given: what the user names in place of it, which is not looked at here.
        """
        for key, path in self._paths().items():
            if getattr(given, key) is None and not os.path.exists(path):
                option = f"--{key.replace('_', '-')}"
                raise AuroraError(
                    f"{index} was made with {option} {path}, which is no file here; say where it is by {option}"
                )

    def _paths(self) -> dict[str, str]:
        return {key: value for key in ("adapter", *SOURCES) if (value := getattr(self, key)) is not None}


class SearchModel:
    """A model with what it reads, in eval mode.

    Args:
        arch: registered name, blip_retrieval_aurora or blip_vqa_aurora.
        source: what to load it from.
        device: cpu, cuda, or auto: a GPU where there is one.

    Attributes:
        model: the model.
        identity: what its results depend on, by name; hashes of the backbone and of the adapter among it.
    """

    def __init__(self, arch: str, source: ModelSource, device: str = "auto") -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        given = {one.name: getattr(source, one.name) for one in fields(source) if one.name != "frames"}
        self.source = source
        self.model: Any
        self.model, vis, txt = load_model_and_preprocess(arch, is_eval=True, device=device, **given)
        self._text, vis = txt["eval"], vis["eval"]
        self._clip, self._picture = _processors(vis, self.model.settings.image_size, source.frames)
        self.identity = {
            "arch": arch,
            "backbone": backbone_hash(self.model),
            "adapter": adapter_hash(source.adapter),
            "image_size": str(self.model.settings.image_size),
            "frames": str(self._clip.choose.keywords["count"]),
            "normalised": str([*_normalised(vis)]),
        }

    def read(self, path: str | Path | BinaryIO) -> Tensor:
        """A picture, (3, height, width), or a clip, (3, frames, height, width); of an open file, a picture.

        Raises:
            Unreadable: it cannot be read.
        """
        try:
            if isinstance(path, (str, Path)) and kind_of(str(path)) == CLIP:
                clip: Tensor = self._clip(str(path))
                return clip
            picture: Tensor = self._picture(load_picture(path))
            return picture
        except BrokenVideo as error:
            raise Unreadable(str(error)) from error
        except AuroraError as error:
            raise Unreadable(unreadable_because(error.__cause__ or error)) from error

    def words(self, text: str, key: str = "text") -> str:
        """A text as the model was taught to read it; one that is too long for it is cut, which the log says.

        Raises:
            AuroraError: nothing is left of it.
        """
        words: str = self._text(text)
        require(bool(words.strip()), key, text, "a text with words")
        count, most = len(self.model.tokenizer.tokenize(words)) + 2, self.model.max_txt_len  # with [CLS] and [SEP]
        if count > most:
            logging.warning("%s: of %s, %d tokens, the model reads the first %d alone", key, shown(text), count, most)
        return words


class Unreadable(Exception):
    """A picture or clip that cannot be read; the message says why, not which."""


def _processors(vis: Any, size: int, frames: int | None) -> tuple[VideoProcessor, Any]:
    """Of clips and of pictures, from the one that a model's type or adapter has."""
    mean, std = _normalised(vis)
    if isinstance(vis, VideoProcessor):
        cfg = OmegaConf.create({"name": "blip_image_eval", "image_size": size, "mean": mean, "std": std})
        picture = registry.get_processor_class(cfg.name).from_config(cfg)
        frames = frames or vis.choose.keywords["count"]
    else:
        picture = vis
    clip = {"image_size": size, "n_frms": frames or VideoProcessorConfig.n_frms, "mean": mean, "std": std}
    return VideoEvalProcessor.from_config(OmegaConf.create(clip)), picture


def _normalised(vis: Any) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of a processor of pictures or clips."""
    normalize = vis.transform.transforms[-1] if isinstance(vis, VideoProcessor) else vis.normalize
    return [float(x) for x in normalize.mean], [float(x) for x in normalize.std]


def backbone_hash(model: Any) -> str:
    """sha256 of all weights but the adapter's, heads as the backbone has them, and those of training alone."""
    own = {id(parameter) for _, parameter in adapter_parameters(model)}
    with disable_adapter(model) if find_adapters(model) is not None else nullcontext():
        tensors: Iterable[tuple[str, Tensor]] = (*model.named_parameters(), *persistent_buffers(model).items())
        held = {
            name: tensor
            for name, tensor in tensors
            if id(tensor) not in own and not _of_training(name.partition(".")[0])
        }
        return tensors_hash(held)


def _of_training(name: str) -> bool:
    return name in SETS or name.endswith("_m") or "queue" in name


def adapter_hash(folder: str | None) -> str:
    """sha256 of an adapter's tensors and of the settings that they are read with; ``none`` without one."""
    if folder is None:
        return "none"
    config = read_adapter_config(folder)
    said = [config.kind, asdict(config.settings), config.tensors_sha256, config.model.get("settings")]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
