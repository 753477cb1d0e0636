"""``adapter_config.json``: what an adapter is, what it was tuned on, and how its tensors are read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from lavis_aurora.adapters.hub import local_folder
from lavis_aurora.adapters.sets import KINDS
from lavis_aurora.common import __version__
from lavis_aurora.common.errors import AuroraError, abbreviated, shown
from lavis_aurora.common.parsing import parse

# Since 2, the tensors' file holds the text of this one, and tensors_sha256 is of the tensors, not of their file.
FORMAT = 2
READABLE = (1, FORMAT)

# The largest number in the settings, by its key: beyond what models have. Nothing is allocated before it is checked.
SIZES = {
    **{"image_size": 2**12, "max_txt_len": 2**12, "n_frms": 2**12, "depth": 2**9, "embed_dim": 2**13},
    "num_classes": 2**16,
}
LARGEST = 2**24
# What a model says of itself, where it says it.
DESCRIPTION = {"arch": str, "model_type": str, "settings": dict, "preprocess": dict, "text_config": dict}


@dataclass
class BaseConfig:
    """The backbone under the adapter.

    Attributes:
        sha256: of the weights that the adapter updates, see :func:`~lavis_aurora.adapters.files.base_hash`.
        name: ARCH/TYPE for the weights of a registered model; null for others. No file or URL: a folder that is
            shared must not tell where its owner's files lie, nor decide what others fetch.
        dtype: of these weights, see :func:`~lavis_aurora.adapters.files.base_dtype`; the hash differs with
            it. Files that do not say it are of models in single precision.
    """

    sha256: str
    name: Optional[str] = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise AuroraError(f"base.sha256: {self.sha256!r} is no hash")
        if not re.fullmatch(r"\w+(\+\w+)*", self.dtype):
            raise AuroraError(f"base.dtype: {self.dtype!r} is no type of weights")


@dataclass
class AdapterConfig:
    """All settings of an adapter.

    Attributes:
        kind: of adapter, one of KINDS; in the file it is the key of the settings.
        settings: of the set: a dataclass, that kind's.
        slots: (d_in, d_out) of each place that is adapted, in order; for mode_approx, of the rows of P and lambda.
        base: the backbone.
        tensors_sha256: of the tensors in ``adapter_model.safetensors`` that belong to these settings.
        model: what the model says of itself: for those of this package arch, model_type, settings, preprocess,
            vocabulary_sha256 and text_config.
        metrics: measured with this adapter, by name.
        versions: of the packages that wrote it.
        format: of this file.
    """

    kind: str
    settings: Any
    slots: dict[str, list[int]]
    base: BaseConfig
    tensors_sha256: str
    model: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def __post_init__(self) -> None:
        if not self.slots:
            raise AuroraError("slots: empty; an adapter updates at least one weight")
        for slot, shape in self.slots.items():
            sizes = shape if isinstance(shape, list) and len(shape) == 2 else [0]
            if not all(type(n) is int and 0 < n <= LARGEST for n in sizes):
                raise AuroraError(f"slots.{slot}: {shape!r} is not [d_in, d_out] of at most {LARGEST}")
        for key, kind in DESCRIPTION.items():
            if not isinstance(self.model.get(key), (kind, type(None))):
                raise AuroraError(f"model.{key}: {shown(self.model[key])} is not a {kind.__name__}")
        for key, value in _leaves(self.model, "model"):
            largest = SIZES.get(key.rpartition(".")[2], LARGEST)
            if isinstance(value, (int, float)) and not abs(value) <= largest:
                raise AuroraError(f"{key}: {value!r} cannot be used; it must be at most {largest}")

    def to_json(self) -> str:
        """The file's text; :meth:`from_json` gives back an equal configuration.

        Raises:
            AuroraError: a metric or a setting is no JSON value, or would not be read back.
        """
        data = asdict(self)
        data = {data.pop("kind"): data.pop("settings"), **data}
        _check_strings(data)
        try:
            text = json.dumps(data, indent=1, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise AuroraError(f"the adapter's settings and metrics must be plain JSON values ({error})") from error
        # A slot on one line, not on four.
        return re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text)

    @classmethod
    def from_json(cls, text: str) -> AdapterConfig:
        """Read and check the file's text.

        Raises:
            AuroraError: not JSON, an unknown or missing key, or a value of another type or beyond reason.
        """
        try:
            data = json.loads(text, parse_constant=_refuse_constant)
            _check_strings(data)
        except AuroraError:
            raise
        except (ValueError, RecursionError) as error:
            raise AuroraError(f"not a JSON file of an adapter ({error})") from error
        if not isinstance(data, dict):
            raise AuroraError(f"the file: must be a section of keys, not {data!r}")
        # Before anything else that a newer version may have changed.
        if data.get("format", FORMAT) not in READABLE:
            raise AuroraError(
                f"format: {shown(data['format'])} is not {FORMAT}, which this version reads; update lavis_aurora"
            )
        kind = next((key for key in data if key in KINDS), None)
        if kind is None and "peft_type" in data:
            raise AuroraError(
                f"it is an adapter of peft ({shown(data['peft_type'])}); load it by peft.PeftModel.from_pretrained"
            )
        if kind is None:
            raise AuroraError(f"there are no settings of a known kind of adapter; known: {', '.join(KINDS)}")
        try:
            settings: Any = parse(KINDS[kind].config_class, data.pop(kind), kind)
            return parse(cls, data, given={"kind": kind, "settings": settings})
        except AuroraError as error:
            raise AuroraError(f"{error}{_of_another_version(data.get('versions'))}") from error


def _of_another_version(versions: Any) -> str:
    """What to say of settings that cannot be read, if another version than this one has written them."""
    other = versions.get("lavis_aurora", __version__) if isinstance(versions, dict) else __version__
    return "" if other == __version__ else f" (written by lavis_aurora {shown(other)}; this is {__version__})"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a JSON value by its dotted key; of a section, its keys too."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield key or "the file", name
            yield from _leaves(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _leaves(part, key)
    else:
        yield key, value


def _check_strings(data: Any) -> None:
    """An adapter is data: what OmegaConf would resolve or take for missing is refused, wherever it stands."""
    for key, value in _leaves(data):
        if isinstance(value, str) and ("${" in value or value == "???"):
            raise AuroraError(f"{key}: {value!r} cannot be used; an adapter is data and nothing in it is resolved")


TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Where the metadata of the tensors' file hold the text of the other.
METADATA = "adapter_config"


def read_adapter(folder: str | Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Settings and tensors of an adapter folder, which belong together and are as they were written.

    Args:
        folder: of it; or, as text, USER/NAME or USER/NAME@REVISION of the Hugging Face hub, if no folder here is
            called so. Its two files are then fetched, and the log says at which commit.

    Raises:
        AuroraError: names the file and what is wrong with it.
    """
    folder = local_folder(folder, (CONFIG, TENSORS))
    text, content = _read(folder, CONFIG), _read(folder, TENSORS)
    path = folder / TENSORS
    try:
        tensors = safetensors.torch.load(content)
    except (SafetensorError, KeyError) as error:  # KeyError: a type that torch does not have
        raise AuroraError(f"{path} is not a readable safetensors file ({error})") from error
    # The header is valid json: safetensors has read it.
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    bound = (header.get("__metadata__") or {}).get(METADATA)
    same = bound is None or bound.encode() == text
    if same:
        try:
            config = AdapterConfig.from_json(text.decode("utf-8"))
        except (UnicodeError, AuroraError) as error:
            raise AuroraError(f"{folder / CONFIG}: {error}") from error
        digest = hashlib.sha256(content).hexdigest() if config.format == 1 else tensors_hash(tensors)
        same = (bound is None) == (config.format == 1) and digest == config.tensors_sha256
    if not same:
        raise AuroraError(
            f"{path} is not the file that {CONFIG} beside it belongs to, or one of them was changed; copy or save "
            f"both again"
        )
    problems = _set_differences(config, tensors)
    if problems:
        raise AuroraError(f"{path} does not fit {CONFIG} beside it: {abbreviated(problems, separator='; ')}")
    return config, tensors


@contextmanager
def of_adapter(folder: str | Path) -> Iterator[None]:
    """Errors inside the block say which adapter's file they are of."""
    try:
        yield
    except AuroraError as error:
        raise AuroraError(f"{Path(folder) / CONFIG}: {error}") from error


def read_adapter_config(folder: str | Path) -> AdapterConfig:
    """Settings of an adapter folder, checked against its tensors."""
    return read_adapter(folder)[0]


def _why_none(folder: Path) -> str:
    """What stands in the place of an adapter folder, and what to name instead."""
    if folder.is_file():
        if folder.name in (CONFIG, TENSORS):
            return "it is a file of one; name its folder"
        return "it is a file; a run's checkpoint is named by run.resume_ckpt_path=FILE"
    beside = sorted(found.parent.name for found in folder.parent.glob(f"*/{CONFIG}"))
    there = f"it has no {CONFIG}" if folder.exists() else "there is none of this name"
    return f"{there}; beside it is {' and '.join(beside)}" if beside else there


def _read(folder: Path, name: str) -> bytes:
    """A file of an adapter folder."""
    path = folder / name
    if name == CONFIG and not path.is_file():
        inner = sorted(found.parent.name for found in folder.glob(f"adapter_*/{CONFIG}"))
        if inner:
            raise AuroraError(f"{folder} is the folder of a run; name one of its adapters: {', '.join(inner)}")
        raise AuroraError(f"{folder} is no adapter folder: {_why_none(folder)}")
    if path.exists() and not path.is_file():
        raise AuroraError(f"{path} is no file; save the adapter again")
    try:
        return path.read_bytes()
    except OSError as error:
        raise AuroraError(f"{path} cannot be read ({error.strerror}); save the adapter again") from error


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of the names, types, shapes and values of tensors, in whatever order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _set_differences(config: AdapterConfig, tensors: Mapping[str, Tensor]) -> list[str]:
    """How the set's tensors in the file differ from those that the settings announce."""
    sets = KINDS[config.kind]
    slots = {slot: (d_in, d_out) for slot, (d_in, d_out) in config.slots.items()}
    shapes = sets.tensor_shapes(slots, config.settings)
    expected = {f"{sets.prefix}.{key}": shape for key, shape in shapes.items()}
    problems = [f"{key} is missing" for key in expected.keys() - tensors.keys()]
    for key, tensor in tensors.items():
        if key.partition(".")[0] == sets.prefix:
            if key not in expected:
                problems.append(f"{key} is of no slot")
            elif tuple(tensor.shape) != expected[key]:
                problems.append(f"{key} is {tuple(tensor.shape)}, not {expected[key]}")
            elif not tensor.is_floating_point():
                problems.append(f"{key} is of type {dtype_name(tensor.dtype)}, not of floating point")
    return sorted(problems)


def dtype_name(dtype: torch.dtype) -> str:
    """E.g. float32."""
    return str(dtype).removeprefix("torch.")
