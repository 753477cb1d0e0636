"""An adapter as a folder: ``adapter_model.safetensors`` and ``adapter_config.json``. Nothing is unpickled."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from lavis_aurora.adapters.companions import BASE, Companions
from lavis_aurora.adapters.config import (
    CONFIG,
    FORMAT,
    METADATA,
    TENSORS,
    AdapterConfig,
    BaseConfig,
    dtype_name,
    read_adapter,
    tensors_hash,
)
from lavis_aurora.adapters.sets import INTERNAL, KINDS, AdapterSets
from lavis_aurora.adapters.switching import adapters_of, owner_of, warn_of_order
from lavis_aurora.common import __version__
from lavis_aurora.common.errors import AuroraError, abbreviated
from lavis_aurora.common.files import atomic_write, new_folder


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    name: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    description: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter: its set, gates, heads that were trained with it, and all settings.

    Args:
        model: a model with an adapter.
        folder: made if it is not there; files of an earlier adapter in it are replaced.
        name: which adapter; by default the active one.
        metrics: what was measured with it.
        description: goes over what the model says of itself, e.g. the preprocessing that was used.

    Raises:
        AuroraError: there is no such adapter, a value is not finite, or the folder cannot be written.
    """
    sets = adapters_of(model)
    name = sets.active if name is None else name
    if name is None:
        raise AuroraError("no adapter is active: leave disable_adapter first, or name the adapter to save")
    sets.check_name(name)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in adapter_tensors(sets, name).items()}
    owner = owner_of(model)
    config = AdapterConfig(
        kind=sets.kind,
        settings=sets[name].config,
        slots={slot: list(shape) for slot, shape in sets.slots.items()},
        base=BaseConfig(base_hash(model), owner.base_name(), base_dtype(model)),
        tensors_sha256="",
        model={**owner.describe_adapter(), **(description or {})},
        metrics=dict(metrics or {}),
    )
    write_adapter(folder, config, tensors)


def write_adapter(folder: str | Path, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> None:
    """Both files of an adapter, or neither.

    Args:
        folder: made if it is not there; files of an earlier adapter in it are replaced.
        config: checksum and versions are set to those of what is written, and the rank that a model of it is built
            with to the adapter's.
        tensors: in main memory, contiguous.

    Raises:
        AuroraError: a value is not finite or no JSON value, or the folder cannot be written.
    """
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AuroraError(f"{key}: not finite; the adapter was not written to {folder}")
    versions = {"lavis_aurora": __version__, "torch": torch.__version__, "python": platform.python_version()}
    config = replace(
        config,
        model=_with_settings(config),
        tensors_sha256=tensors_hash(tensors),
        versions=versions,
        format=FORMAT,
    )
    text = config.to_json()
    content = safetensors.torch.save(dict(tensors), {METADATA: text})
    folder = Path(folder).expanduser()
    with nullcontext(folder) if folder.exists() else new_folder(folder) as place:
        # Both are on the disk before either takes its place; who reads between the two renames sees it by the hash.
        with atomic_write(place / TENSORS) as tensor_file, atomic_write(place / CONFIG) as config_file:
            for file, data in ((tensor_file, content), (config_file, text.encode())):
                file.write(data)
                file.flush()
                os.fsync(file.fileno())


def _with_settings(config: AdapterConfig) -> dict[str, Any]:
    """What the model says of itself, with the adapter's own settings: those of a model may be of another adapter."""
    settings = config.model.get("settings") or {}
    if not isinstance(settings.get(config.kind), dict):
        return config.model
    # Which layers were targeted, the slots say; a model is built by its own words for them.
    own = {key: value for key, value in asdict(config.settings).items() if key not in ("targets", "layers")}
    return {**config.model, "settings": {**settings, config.kind: {**settings[config.kind], **own}}}


def set_tensors(config: AdapterConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of an adapter's tensors, those of its set, by their names in it; the others are gates and heads."""
    prefix = f"{KINDS[config.kind].prefix}."
    return {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def truncated_adapter(
    config: AdapterConfig, tensors: Mapping[str, Tensor], rank: int, which: str
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Settings and tensors of an adapter cut to its first ``rank`` components; its metrics were those of the whole.

    Args:
        config, tensors: as :func:`read_adapter` gives them.
        which: says what it is, in messages.

    Raises:
        AuroraError: the adapter has no such rank, or is of a kind that cannot be cut.
    """
    sets = KINDS[config.kind]
    try:
        settings, cut = sets.truncated(config.settings, set_tensors(config, tensors), rank)
    except AuroraError as error:
        raise AuroraError(f"{which}: {error}") from error
    warn_of_order(config.settings, which, rank)
    metrics = config.metrics if rank == config.settings.rank else {}
    replaced = {f"{sets.prefix}.{key}": tensor for key, tensor in cut.items()}
    return replace(config, settings=settings, metrics=metrics), {**tensors, **replaced}


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    name: str = "default",
    check_base: bool = True,
    rank: int | None = None,
) -> None:
    """Load an adapter into a model that has the same layers.

    Under a new name it is added to the others, frozen, whatever its rank; ``set_adapter`` makes it active. Under a
    name that is there, e.g. ``default``, its values replace those, and what is trained stays trained. An adapter
    without heads goes with the backbone's.

    Args:
        model: a model with an adapter, tuned or fresh.
        folder: what :func:`save_adapter` wrote; or USER/NAME of the hub, see
            :func:`~lavis_aurora.adapters.config.read_adapter`.
        name: what the model shall call it.
        check_base: refuse an adapter that was tuned on other weights than the model's; in another precision they
            cannot be compared, and a warning says so.
        rank: of an adapter that was trained with ``mode_approx.nested``, the first so many components alone; under
            several names, one folder serves several ranks.

    Raises:
        AuroraError: the folder cannot be read, or does not fit the model; says exactly what differs. The model is
            unchanged then.
    """
    sets = adapters_of(model)
    if name in INTERNAL:
        raise AuroraError(f"an adapter cannot be called {name!r}, which a model keeps for its training")
    if name == sets.merged:
        raise AuroraError(f"the adapter {name!r} is merged into the weights; unmerge_adapter(model) before loading")
    config, tensors = read_adapter(folder)
    if config.kind != sets.kind:
        raise AuroraError(
            f"{folder} is an adapter of {config.kind}, and this model has {sets.kind}; build it with model.tuning: "
            f"{KINDS[config.kind].tuning}"
        )
    if rank is not None:
        config, tensors = truncated_adapter(config, tensors, rank, str(folder))
    differences = _differences(model, sets, config, name, check_base)
    if not differences:
        differences = _tensor_differences(sets, tensors)
    if differences:
        raise AuroraError(f"{folder} does not fit this model: {abbreviated(differences, separator='; ')}")
    _warn_of(config, folder, sets, name)
    if name not in sets.sets:
        sets.add_set(name, config.settings).requires_grad_(False)
    with torch.no_grad():
        for key, parameter in sets[name].named_parameters():
            parameter.copy_(tensors[f"{sets.prefix}.{key}"])
        for group, part in sets.companion_groups().items():
            _load_companions(group, part, name, tensors, folder)
    if name == sets.active:
        sets.switch_companions(name)
    owner_of(model).adapter_loaded(name)


def _warn_of(config: AdapterConfig, folder: str | Path, sets: AdapterSets, name: str) -> None:
    """Say of an adapter that fits what it is not."""
    if config.format == 1:
        logging.warning("%s is of an older version: no checksum covers its settings; save it again", folder)
    if name in sets.sets and getattr(sets[name].config, "nested", False) and not config.settings.nested:
        logging.warning(
            "%s was not trained with mode_approx.nested, as %r is here: its components are in no order before that",
            folder,
            name,
        )


def _load_companions(
    group: str, part: Companions, name: str, tensors: Mapping[str, Tensor], folder: str | Path
) -> None:
    """Gates or heads of an adapter from its tensors; without heads of its own it goes with the backbone's."""
    values = {path: tensors[f"{group}.{path}"] for path in part.names if f"{group}.{path}" in tensors}
    lacking = [path for path in part.names if path not in values]
    if values and lacking:
        logging.warning(
            "%s holds no %s, as older versions wrote it: the backbone's are taken, and results may differ",
            folder,
            abbreviated(lacking),
        )
    # One without heads of its own replaces one that had some: the backbone's are its.
    if values or name in part:
        part.add(name, {**part.tensors_of(BASE), **values})


def adapter_tensors(sets: AdapterSets, name: str) -> dict[str, Tensor]:
    """Parameters and buffers of an adapter by their names in its file. Factors that slots share are there once."""
    tensors: dict[str, Tensor] = {f"{sets.prefix}.{key}": p for key, p in sets[name].named_parameters()}
    for group, part in sets.companion_groups().items():
        tensors.update((f"{group}.{path}", tensor) for path, tensor in part.tensors_of(name).items())
    return tensors


def base_hash(model: nn.Module) -> str:
    """sha256 of the weights that adapters update (or are parallel to), in the model's order, without any update.

    It tells backbones apart and does not depend on picture size, queue or heads. It is never kept: nothing but the
    numbers themselves tells of an edit in place of ``weight.data``. BLIP base takes some tenths of a second.
    """
    digest = hashlib.sha256()
    for weight in _base_weights(model):
        digest.update(f"{weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def base_dtype(model: nn.Module) -> str:
    """The type of the weights that :func:`base_hash` is of, e.g. float32; several are joined by +."""
    return "+".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in _base_weights(model)}))


def _base_weights(model: nn.Module) -> list[Tensor]:
    return adapters_of(model).backbone_weights(model)


def _differences(
    model: nn.Module, sets: AdapterSets, config: AdapterConfig, name: str, check_base: bool
) -> list[str]:
    """How slots, settings and base differ."""
    here = {slot: list(shape) for slot, shape in sets.slots.items()}
    problems = []
    if len(here) != len(config.slots):
        problems.append(
            f"{len(config.slots)} slots there and {len(here)} here (a model that is built with it, by model.adapter "
            f"or adapter=FOLDER, adapts the same layers)"
        )
    problems += [f"slot {slot} is missing here" for slot in config.slots if slot not in here]
    problems += [f"slot {slot} is missing there" for slot in here if slot not in config.slots]
    problems += [
        f"slot {slot} is {shape[0]} x {shape[1]} there and {here[slot][0]} x {here[slot][1]} here"
        for slot, shape in config.slots.items()
        if slot in here and here[slot] != shape
    ]
    if not problems and list(here) != list(config.slots):
        problems.append("the same slots in another order")
    if name in sets.sets:
        own = asdict(sets[name].config)
        problems += [
            f"{sets.kind}.{key} is {value} there and {own[key]} here (set it alike, or load the adapter under a new "
            f"name)"
            for key, value in asdict(config.settings).items()
            # How it was trained does not change what it computes.
            if own[key] != value and not key.startswith("nested")
        ]
    problems += owner_of(model).adapter_differences(config.model)
    if not problems and check_base:
        problems += _base_differences(model, config.base)
    return problems


def _base_differences(model: nn.Module, base: BaseConfig) -> list[str]:
    """How the backbone's weights differ; in another precision they cannot be compared, which the log says."""
    here, dtype = base_hash(model), base_dtype(model)
    if here == base.sha256:
        return []
    if dtype != base.dtype:
        logging.warning(
            "the adapter was tuned on weights in %s and these are in %s: whether they are the same was not compared",
            base.dtype,
            dtype,
        )
        return []
    name = owner_of(model).base_name()
    return [
        f"it was tuned on other weights ({base.name or 'without a name'}, sha256 {base.sha256[:12]}) than these "
        f"({name or 'without a name'}, {here[:12]}); load those, or set check_base=False "
        f"(model.adapter_check_base: false) to use it all the same"
    ]


def _tensor_differences(sets: AdapterSets, tensors: Mapping[str, Tensor]) -> list[str]:
    """How gates and heads differ from the model's, and all tensors from numbers, in the type that they get here."""
    expected: dict[str, Tensor] = {}
    for group, part in sets.companion_groups().items():
        if group == "gate" or any(key.startswith(f"{group}.") for key in tensors):
            expected.update((f"{group}.{path}", own) for path, own in part.active_tensors().items())
    # Adapters of earlier versions have none.
    buffers = {key for key, own in expected.items() if not isinstance(own, nn.Parameter)}
    problems = [f"{key} is missing there" for key in expected.keys() - tensors.keys() - buffers]
    for key, tensor in tensors.items():
        here = expected.get(key)
        # Factors are in single precision, and were compared with the settings.
        dtype = torch.float32 if here is None else here.dtype
        # Integers count something: they are of one type.
        same_kind = tensor.is_floating_point() if dtype.is_floating_point else tensor.dtype == dtype
        if here is None and key.partition(".")[0] != sets.prefix:
            problems.append(f"{key} has no place here")
        elif here is not None and tensor.shape != here.shape:
            problems.append(f"{key} is {tuple(tensor.shape)} there and {tuple(here.shape)} here")
        elif not same_kind:
            problems.append(f"{key} is of type {dtype_name(tensor.dtype)} there and {dtype_name(dtype)} here")
        elif not tensor.to(dtype).isfinite().all():
            problems.append(f"{key} is not finite there")
    return sorted(problems)
