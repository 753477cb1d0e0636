"""``run.cache_features``: tokens of pictures where the frozen part of the vision tower ends, kept on disk.

They are there before the first step, for all epochs, evaluations, and adapters on the same backbone.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import lavis
import PIL
import torch
import torch.distributed as dist
import torchvision
from lavis.common.dist_utils import get_rank, get_world_size, is_dist_avail_and_initialized
from lavis.models.vit import VisionTransformer
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.data.features import ENDING, FeatureCache, entry_name
from lavis_aurora.data.samples import CheckedDataset
from lavis_aurora.encoders.fused import drops
from lavis_aurora.encoders.towers import frozen_part, frozen_tokens
from lavis_aurora.evaluation.encode import broadcast, progress
from lavis_aurora.training.order import random_state, seeded

FORMAT = 1
# Pictures of a file: what a run that is killed has to compute again, at most.
FILE_PICTURES = 64


def cached_splits(run: DictConfig, datasets: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, Any]]:
    """Dataset, split and data of those that a run trains on or evaluates, and that hold pictures.

    Raises:
        AuroraError: it trains on others.
    """
    for name, splits in datasets.items():
        for split, data in splits.items():
            entries = getattr(data, "annotation", None) or [{}]
            if isinstance(data, CheckedDataset) and isinstance(entries[0].get("image"), str):
                yield name, split, data
            elif split == "train" and not run.evaluate:
                raise AuroraError(
                    f"run.cache_features: it is for pictures, a file each, and {name} trains on others; leave it out"
                )
            else:
                logging.info("run.cache_features: %s of %s has no single pictures and is not kept", split, name)


def use_features(config: Any, model: nn.Module, datasets: Mapping[str, Mapping[str, Any]]) -> None:
    """Compute the tokens that are not there yet, and let the datasets of a run give tokens in place of pictures.

    All processes call it, and share the work.

    Args:
        config: LAVIS's, of the run.
        model: on its device, not wrapped.
        datasets: by name and split.

    Raises:
        AuroraError: the model or its tuning has no such part, something is drawn at random, or there is no room.
    """
    run, root = config.run_cfg, Path(config.run_cfg.cache_features).expanduser()
    tower = _tower(model, config.model_cfg.arch)
    about = {"format": FORMAT, "backbone": _described(tower), "versions": _versions()}
    with torch.no_grad():
        size = tower.patch_embed.img_size
        blank = torch.zeros(1, 3, *size, dtype=tower.pos_embed.dtype, device=tower.pos_embed.device)
        shape = tuple(frozen_tokens(tower, blank).tokens.shape[1:])
    caches: dict[str, FeatureCache] = {}
    wanted: dict[str, list[_Pictures]] = {}
    for name, split, data in cached_splits(run, datasets):
        key = f"{name}.vis_processor.{'train' if split == 'train' else 'eval'}"
        processor = data.inner.vis_processor
        preprocessing = {
            "class": f"{type(processor).__module__}.{type(processor).__qualname__}",
            "keys": OmegaConf.to_container(OmegaConf.create({"_": OmegaConf.select(config.datasets_cfg, key)})),
        }
        about_pictures, dtype = {**about, "preprocessing": preprocessing}, getattr(torch, run.cache_dtype)
        try:
            cache = FeatureCache(root, about_pictures, shape, dtype)
        except AuroraError as error:
            raise AuroraError(f"run.cache_features: {error}") from error
        cache = caches.setdefault(cache.key, cache)
        wanted.setdefault(cache.key, []).append(_Pictures(data, cache, f"datasets.{key}"))
        data.features = cache
    missing = {key: _missing(parts, caches[key]) for key, parts in wanted.items()}
    _check_room(root, run.cache_limit_gb, [(caches[key], sum(map(len, parts))) for key, parts in missing.items()])
    for key, parts in missing.items():
        _fill(tower, caches[key], parts, run)
    if is_dist_avail_and_initialized():
        dist.barrier()
    for key, cache in caches.items():
        cache.scan()
        lacking = sum(entry not in cache for part in wanted[key] for entry, _ in part.entries())
        if lacking:
            raise AuroraError(
                f"run.cache_features: {cache.folder} has no tokens of {lacking} pictures once it is filled; all "
                f"processes must see one folder, and no picture may change meanwhile; start the run again"
            )


def _tower(model: nn.Module, arch: str) -> VisionTransformer:
    """The vision tower; an AuroraError where it has no frozen part, or one that draws."""
    if not getattr(model, "takes_tokens", False):
        raise AuroraError(
            f"run.cache_features: {arch} cannot be given tokens; it is for blip_retrieval_aurora and blip_vqa_aurora"
        )
    tower = model.visual_encoder
    found = frozen_part(tower)
    if found is None or not found[1]:
        raise AuroraError(
            "run.cache_features: every layer of the vision tower is tuned, so that there is nothing to keep; set "
            "model.mode_approx.layers, e.g. {last: 6}, or leave it out"
        )
    if drops(found[0]):
        raise AuroraError(
            "run.cache_features: model.vit_drop_path_rate drops at random, so that no picture is alike in two "
            "epochs; set it to 0, or leave run.cache_features out"
        )
    return tower


def _described(tower: VisionTransformer) -> dict[str, Any]:
    """What decides what the frozen part computes: its weights, and what these do not show."""
    found = frozen_part(tower)
    assert found is not None
    first, depth = found
    digest = hashlib.sha256()
    for name, value in first.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    blocks = [
        [block.attn.num_heads, block.norm1.eps, type(block.mlp.act).__name__, getattr(block, "r", 0)]
        for block in first.blocks
    ]
    return {"sha256": digest.hexdigest(), "layer": depth, "size": list(tower.patch_embed.img_size), "blocks": blocks}


def _versions() -> dict[str, str]:
    """Of what makes tokens of a picture."""
    libraries = {"torch": torch, "torchvision": torchvision, "PIL": PIL, "lavis": lavis}
    return {name: getattr(library, "__version__", "") for name, library in libraries.items()}


class _Watched:
    """A processor that notes whether it drew at random."""

    drew = False

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, picture: Image.Image) -> Tensor:
        with seeded(0):
            before, made = random_state(), self.processor(picture)
            after = random_state()
        self.drew = before["python"] != after["python"] or not torch.equal(before["torch"], after["torch"])
        self.drew |= not torch.equal(before["numpy"][1], after["numpy"][1]) or before["numpy"][2] != after["numpy"][2]
        return made


class _Pictures(Dataset[tuple[str, Tensor]]):
    """The pictures of a split, each once.

    Args:
        data: the split.
        cache: where their tokens belong.
        key: of the split's processor, for messages.

    Attributes:
        indices: into the split, of those to compute.
    """

    def __init__(self, data: CheckedDataset, cache: FeatureCache, key: str) -> None:
        self.key, self.watched = key, _Watched(data.inner.vis_processor)
        self.data, self.data.features = copy(data), None
        self.data.inner = copy(data.inner)
        self.data.inner.vis_processor = self.watched
        self.indices: list[int] = []

    def entries(self) -> Iterator[tuple[str, int]]:
        """Entry and index of each picture; an AuroraError where there is none."""
        seen: set[str] = set()
        for index in range(len(self.data)):
            path = self.data.file(index)
            if path not in seen:
                seen.add(path)
                try:
                    yield entry_name(path), index
                except OSError as error:
                    raise AuroraError(f"{self.data.name}: cannot read {path} ({error.strerror})") from error

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[str, Tensor]:
        index = self.indices[place]
        entry = entry_name(self.data.file(index))
        picture = self.data[index]["image"]
        if self.watched.drew:
            raise AuroraError(
                f"run.cache_features: {self.key} draws at random (crops, flips, colours), so that no picture is "
                f"alike in two epochs; name a processor that does not, e.g. {self.key}.name=blip_image_eval, or "
                f"leave run.cache_features out"
            )
        return entry, picture


def _missing(parts: Iterable[_Pictures], cache: FeatureCache) -> list[_Pictures]:
    """The pictures whose tokens are not there, each in one part; of each part one is looked at first."""
    known: set[str] = set()
    left = []
    for part in parts:
        found = list(part.entries())
        part.indices = [found[0][1]]
        part[0]
        # The main process's choice: another may look later, when there is more.
        part.indices = broadcast([i for entry, i in found if entry not in cache and entry not in known])
        known |= {entry for entry, _ in found}
        left += [part] * bool(part.indices)
    return left


def _check_room(root: Path, limit_gb: float, news: Sequence[tuple[FeatureCache, int]]) -> None:
    """Say what is there and what will be; an AuroraError where limit or disk have no room for it."""
    held = sum(path.stat().st_size for path in root.rglob(f"*{ENDING}"))
    more = sum(cache.entry_bytes * count for cache, count in news)
    for cache, count in news:
        logging.info(
            "run.cache_features: %s holds %d pictures; %d more, of %s numbers in %s, take %.3g GB",
            *(cache.folder, len(cache), count, " x ".join(map(str, cache.shape)), cache.dtype),
            cache.entry_bytes * count / 1e9,
        )
    free = shutil.disk_usage(root).free
    if more and held + more > limit_gb * 1e9:
        raise AuroraError(
            f"run.cache_features: {root} holds {held / 1e9:.3g} GB, and {more / 1e9:.3g} GB more would be beyond "
            f"run.cache_limit_gb, {limit_gb:g}; raise that, name another folder, or remove what is not needed there"
        )
    if more > free:
        raise AuroraError(
            f"run.cache_features: {more / 1e9:.3g} GB do not fit the {free / 1e9:.3g} GB that are free at {root}; "
            f"name another folder, or leave it out"
        )


@torch.no_grad()
def _fill(tower: VisionTransformer, cache: FeatureCache, parts: Iterable[_Pictures], run: DictConfig) -> None:
    """Compute this process's share of what is missing; a run that is killed loses one file of it at most."""
    device, dtype = tower.pos_embed.device, tower.pos_embed.dtype
    parts = list(parts)
    with progress(sum(map(len, parts)), "run.cache_features", "image") as bar:
        for part in parts:
            part.indices = part.indices[get_rank() :: get_world_size()]
            workers = min(run.num_workers, len(part))
            entries: dict[str, Tensor] = {}
            # Of its own generator: the random numbers of training stay as they are.
            loader = DataLoader(part, run.batch_size_eval, num_workers=workers, generator=torch.Generator())
            for names, pictures in loader:
                tokens = frozen_tokens(tower, pictures.to(device, dtype)).tokens.to("cpu", cache.dtype)
                if not tokens.isfinite().all():
                    raise AuroraError(
                        f"run.cache_dtype: {run.cache_dtype} cannot hold the tokens of these pictures; set float32"
                    )
                entries.update(zip(names, tokens.clone()))
                if len(entries) >= FILE_PICTURES:
                    cache.write(entries)
                    entries = {}
                bar.update(len(names) * get_world_size())
            if entries:
                cache.write(entries)
