"""Load a model with its processors, as LAVIS does, with a default type and clear errors."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lavis.models
import torch
from lavis.common.dist_utils import download_cached_file
from lavis.common.registry import registry
from lavis.common.utils import is_url
from lavis.models import load_preprocess
from lavis.models.vit import interpolate_pos_embed
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn

from lavis_aurora.adapters.config import CONFIG, TENSORS, of_adapter, read_adapter_config
from lavis_aurora.common.errors import AuroraError, abbreviated, did_you_mean, shown
from lavis_aurora.common.files import is_finite, load_torch, tensor_format, why_unreadable
from lavis_aurora.common.paths import use_weights_folder
from lavis_aurora.config.adapter_settings import adapter_settings, check_preprocess, check_towers, type_settings
from lavis_aurora.models.hugging_face import from_hugging_face, is_hugging_face, residual_scale

POS_EMBED = "visual_encoder.pos_embed"
# Under which a file may hold the state dict, beside the optimizer and the like.
WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
# What torch.compile, DistributedDataParallel and trainers put before names of weights.
COMPILED, PREFIXES = "_orig_mod.", ("module.", "model.")
# What a run's checkpoint holds besides, see lavis_aurora.training.checkpoints.
RUN_ENTRIES = {"optimizer", "best_metric", "best_epoch"}


def read_state_dict(source: str, key: str) -> dict[str, Tensor]:
    """Weights from a URL or file, of safetensors or torch; nothing that could run code is unpickled.

    Args:
        source: URL or path.
        key: the YAML key that names it, for messages.

    Raises:
        AuroraError: there is no such file, or it holds no state dict.
    """
    return _state_dict(read_content(source, key), source, key)


def _state_dict(content: Any, source: str, key: str) -> dict[str, Tensor]:
    while isinstance(content, dict):
        inner = next((content[name] for name in WRAPPERS if isinstance(content.get(name), dict)), None)
        if inner is None:
            break
        content = inner
    tensors = isinstance(content, dict) and all(isinstance(value, Tensor) for value in content.values())
    if not tensors or not all(isinstance(name, str) for name in content):
        raise AuroraError(f"{key}: {source} holds no state dict of tensors")
    return dict(content)


def read_content(source: str, key: str) -> Any:
    """All that a file holds, tensors and plain values; arguments and errors as of :func:`read_state_dict`."""
    path = _local_file(source, key)
    try:
        found = tensor_format(path)
        if found == "safetensors":
            return load_file(path)
        if found == "torch":
            return load_torch(path)
        raise ValueError(f"neither of safetensors nor of torch.save: it begins with {found}")
    except MemoryError:
        raise
    except Exception as error:  # torch, pickle, zipfile and safetensors each have errors of their own
        raise AuroraError(f"{key}: {path} is not a readable checkpoint ({why_unreadable(error)})") from error


def _local_file(source: str, key: str) -> str:
    """A file on this machine: a URL's is fetched, and of a folder of Hugging Face's it is that of the weights."""
    path = os.path.expanduser(source)
    if is_url(source):
        use_weights_folder()
        try:
            path = download_cached_file(source, check_hash=False, progress=True)
        except OSError as error:
            raise AuroraError(
                f"{key}: cannot download {source} ({error}); download it elsewhere and name the local file"
            ) from error
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    if os.path.isfile(os.path.join(folder, CONFIG)) and (folder == path or path.endswith(TENSORS)):
        raise AuroraError(f"{key}: {folder} is an adapter, not a backbone; name it by model.adapter, or adapter=")
    inside = (os.path.join(path, name) for name in ("model.safetensors", "pytorch_model.bin"))
    path = next((file for file in inside if os.path.isfile(file)), path)
    if not os.path.isfile(path):
        if folder == path:
            raise AuroraError(f"{key}: a folder; name the file of weights in it: {path}")
        raise AuroraError(f"{key}: no such file: {path}; name it where it is")
    return path


def blip_weights(content: Any, source: str, key: str, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a file under the names of LAVIS's models, whoever wrote it.

    Args:
        content: of the file.
        source, key: as of :func:`read_state_dict`.
        own: the state dict of the model that takes them.
    """
    state = without_prefixes(_state_dict(content, source, key), own.keys())
    if not is_hugging_face(state):
        return state
    logging.info("%s %s has Hugging Face's names, and no temp: that of the ITC loss stays as it is", key, source)
    return from_hugging_face(state, own, residual_scale(_local_file(source, key)))


def without_prefixes(state: dict[str, Tensor], known: Collection[str]) -> dict[str, Tensor]:
    """A state dict under the names of a model's weights, without what wrappers have put before them.

    Args:
        state: as read.
        known: the names; as long as one of them is there, nothing is taken away.
    """
    state = {name.replace(COMPILED, ""): value for name, value in state.items()}
    while not state.keys() & set(known):
        prefix = next((one for one in PREFIXES if any(name.startswith(one) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def other_kind(content: Any) -> str:
    """What a file is that is no whole backbone, and the remedy, as text; empty if its content does not tell."""
    if isinstance(content, dict) and content.keys() >= RUN_ENTRIES:
        return (
            "; it is a run's checkpoint, which holds what was trained alone: take the run's adapter_best by "
            "model.adapter, evaluate it by run.resume_ckpt_path, or make a backbone by lavis-aurora merge"
        )
    if any("vision_model." in name for name in _state_dict(content, "", "")):
        return "; its names are those of another model of Hugging Face's: take one of BLIP of this kind"
    return ""


def _fit(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """BLIP's position embeddings stretched to this image size."""
    state = dict(state)
    if POS_EMBED in state and state[POS_EMBED].shape != model.visual_encoder.pos_embed.shape:
        state[POS_EMBED] = interpolate_pos_embed(state[POS_EMBED], model.visual_encoder)
    return state


def check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that are NaN or infinite."""
    spoiled = sorted(name for name, x in state.items() if not is_finite(x))
    if spoiled:
        raise AuroraError(f"{source} holds NaN or infinite weights: {abbreviated(spoiled)}; take another checkpoint")


def load_backbone(model: nn.Module, state: dict[str, Tensor], source: str, new_keys: set[str]) -> None:
    """Load weights of BLIP; afterwards the missing keys are exactly ``new_keys`` or fewer.

    Args:
        model: a model with ``visual_encoder`` and text towers.
        state: the checkpoint.
        source: its name, for messages.
        new_keys: keys that a plain BLIP checkpoint does not hold (the adapter's, the queue's, the teacher's).

    Raises:
        AuroraError: a key is missing, has another shape, belongs to a layer that the model does not have, or holds
            NaN.
    """
    check_finite(state, source)
    own = model.state_dict()
    # Queues and their pointer belong to a run, not to the weights; their size is the YAML's.
    transient = {key for key in own if "queue" in key}
    # Momentum copies follow the weights that they are copies of.
    state = {key: value for key, value in state.items() if not key.partition(".")[0].endswith("_m")}
    state = {key: value for key, value in _fit(state, model).items() if key not in transient}
    shapes = {
        f"{key} is {tuple(state[key].shape)} there and {tuple(own[key].shape)} here"
        for key in state.keys() & own.keys()
        if state[key].shape != own[key].shape
    }
    if shapes:
        raise AuroraError(
            f"{source} does not fit the model: {abbreviated(sorted(shapes))}; check vit, image_size, med_config_path"
        )
    missing = own.keys() - state.keys() - new_keys - transient
    missing = {key for key in missing if not key.endswith("position_ids")}
    if missing:
        raise AuroraError(f"{source} lacks {len(missing)} weights of the model: {abbreviated(sorted(missing))}")
    unknown = state.keys() - own.keys()
    towers = {name for name, _ in model.named_children() if not name.endswith("_m")}
    foreign = {key for key in unknown if key.partition(".")[0] in towers}
    if foreign:
        raise AuroraError(
            f"{source} has {len(foreign)} weights that the model has no place for: {abbreviated(sorted(foreign))}"
        )
    model.load_state_dict({key: value for key, value in state.items() if key in own}, strict=False)
    parts = sorted({key.partition(".")[0] for key in unknown})
    ignored = f"; not needed here: {abbreviated(parts)}" if unknown else ""
    logging.info("loaded %d weights from %s%s", len(state) - len(unknown), source, ignored)


def load_checked(model: nn.Module, load: Callable[[str], Any], source: str, key: str) -> Any:
    """Let a model of LAVIS load a checkpoint in any form that :func:`read_state_dict` reads.

    LAVIS takes what has the names of its weights, and leaves the others as they are.

    Args:
        model: of LAVIS.
        load: its own method, which takes a path.
        source: URL or path.
        key: the YAML key that names it, for messages.

    Raises:
        AuroraError: none of the model's weights are there, or the file is of another kind.
    """
    content, own = read_content(source, key), model.state_dict()
    state = blip_weights(content, source, key, own)
    # Momentum copies start as the weights, of which some of LAVIS's loaders ask for copies.
    copies = {name: re.sub(r"^(\w+)_m\.", r"\1.", name) for name in own.keys() - state.keys()}
    state |= {name: state[original] for name, original in copies.items() if original in state}
    with TemporaryDirectory() as folder:
        path, as_lavis = os.path.expanduser(source), content.get("model")
        if not isinstance(as_lavis, dict) or as_lavis.keys() != state.keys() or path.endswith(".safetensors"):
            path = os.path.join(folder, "checkpoint.pth")
            torch.save({"model": state}, path)
        try:
            message = load(path)
        except (KeyError, RuntimeError) as error:
            raise AuroraError(f"{key} {source} does not fit the model ({error}){other_kind(content)}") from error
    later = re.compile(r"\w+_m\.|mode_approx\.|.*(queue|position_ids)")
    wanted = {name for name in own if not later.match(name)}
    missing = wanted & set(getattr(message, "missing_keys", ()))
    lacks = f"{key} {source} lacks {len(missing)} of {len(wanted)} weights of the model"
    parts = abbreviated(sorted({name.partition(".")[0] for name in missing}))
    if missing and (missing == wanted or other_kind(content)):
        raise AuroraError(f"{lacks}: {parts}{other_kind(content)}")
    if missing:
        logging.warning("%s, which stay as they are: %s", lacks, parts)
    return message


SOURCES = ("pretrained", "tokenizer", "med_config_path")


def load_model_and_preprocess(
    name: str,
    model_type: str | None = None,
    is_eval: bool = False,
    device: str | torch.device = "cpu",
    adapter: str | Path | None = None,
    pretrained: str | Path | None = None,
    tokenizer: str | Path | None = None,
    med_config_path: str | Path | None = None,
) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """Load a model registered with LAVIS and its processors.

    Args:
        name: registered name, e.g. ``blip_retrieval_aurora``.
        model_type: one of the model's types; the models of this package have a default. For ``mode_approx``, the
            name and type of the model inside, e.g. ``blip_vqa/vqav2``.
        is_eval: put the model in eval mode.
        device: where to put it.
        adapter: folder of an adapter to load; type, settings and processors are then those that it was tuned with.
            It is data: nothing of what follows is taken from it.
        pretrained: file or URL of the backbone instead of the type's own; for models of this package.
        tokenizer: hub name or folder of the tokenizer, likewise.
        med_config_path: configuration of the text tower, likewise.

    Returns:
        model, vision processors and text processors (both by ``train`` and ``eval``).

    Raises:
        AuroraError: no such name or type, or the weights cannot be loaded.

    Examples:
        >>> model, vis, txt = load_model_and_preprocess("blip_retrieval_aurora", "tiny")
        >>> model, vis, txt = load_model_and_preprocess("blip_retrieval_aurora", adapter="output/RUN/adapter_best")
    """
    use_weights_folder()
    described = {} if adapter is None else read_adapter_config(adapter).model
    if described.get("arch", name) != name:
        raise AuroraError(f"{adapter} is an adapter of {shown(described['arch'])}, not of {name}")
    cls, model_type = _class_and_type(name, model_type or described.get("model_type"))
    given = zip(SOURCES, (pretrained, tokenizer, med_config_path))
    sources = {key: os.path.expanduser(str(value)) for key, value in given if value is not None}
    if adapter is None and not sources:
        return lavis.models.load_model_and_preprocess(name, model_type, is_eval=is_eval, device=device)  # type: ignore
    if not hasattr(cls, "CONFIG_CLASS"):
        raise AuroraError(f"{name} takes neither adapter nor {', '.join(SOURCES)}; it is not of this package")
    type_defaults = getattr(cls, "type_defaults", None)
    cfg = OmegaConf.load(cls.default_config_path(model_type)) if type_defaults is None else type_defaults(model_type)
    if adapter is not None:
        with of_adapter(adapter):
            taken = adapter_settings(cls, described)
            check_preprocess(described.get("preprocess") or {})
            check_towers(name, model_type, described, {*taken, *sources})
        cfg.model = OmegaConf.merge(cfg.model, taken, {"adapter": str(adapter)})
    _set_sources(cfg.model, sources)
    try:
        processors = load_preprocess(OmegaConf.create(described.get("preprocess") or cfg.preprocess))
    except (TypeError, ValueError, AttributeError) as error:
        raise AuroraError(f"{adapter or name}: the processors cannot be made ({error})") from error
    model = cls.from_config(cfg.model).to(device)
    return (model.eval() if is_eval else model, *processors)


def _class_and_type(name: str, model_type: str | None) -> tuple[Any, str | None]:
    """A registered model's class, and the type asked for or its default one."""
    cls = registry.get_model_class(name)
    if cls is None:
        raise AuroraError(f"no model {name!r}{did_you_mean(name, registry.list_models())}")
    model_type = model_type or getattr(cls, "DEFAULT_MODEL_TYPE", None)
    # mode_approx takes the name and type of another model, and checks them itself.
    if name != "mode_approx" and model_type not in cls.PRETRAINED_MODEL_CONFIG_DICT:
        known = cls.PRETRAINED_MODEL_CONFIG_DICT
        raise AuroraError(f"{name}: no model type {model_type!r}{did_you_mean(str(model_type), known)}")
    return cls, model_type


def _set_sources(model: DictConfig, sources: Mapping[str, str]) -> None:
    """Put what the user names in the place of the type's own weights, tokenizer and text configuration."""
    backbone = model.base if "base" in model else model
    cls = registry.get_model_class(backbone.arch)
    if not hasattr(cls, "CONFIG_CLASS"):
        known = {"pretrained", *type_settings(cls, backbone.get("model_type"))}
        for key in sources.keys() - known:
            raise AuroraError(f"{key}: {backbone.arch} takes none; leave it out")
    backbone.update(sources)
    if "pretrained" in sources:
        backbone.load_finetuned = False
