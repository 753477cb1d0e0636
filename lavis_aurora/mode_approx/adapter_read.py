"""An adapter folder read and checked, before any model is built by it.

The tensors' file holds the settings too, as metadata; the json beside it is for people, and must be the same text.
The settings hold the hash of the tensors. So no bit of either file changes unnoticed, nor one file without the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from lavis_aurora.errors import AuroraError, some
from lavis_aurora.mode_approx.adapter_config import AdapterConfig
from lavis_aurora.mode_approx.factors import ModeFactors

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Where the metadata of the tensors' file hold the text of the other.
METADATA = "adapter_config"
FACTORS = "factors"


def read_adapter(folder: str | Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Settings and tensors of an adapter folder, which belong together and are as they were written.

    Raises:
        AuroraError: names the file and what is wrong with it.
    """
    text, content = _read(folder, CONFIG), _read(folder, TENSORS)
    path = Path(folder) / TENSORS
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
            raise AuroraError(f"{Path(folder) / CONFIG}: {error}") from error
        digest = hashlib.sha256(content).hexdigest() if config.format == 1 else tensors_hash(tensors)
        same = (bound is None) == (config.format == 1) and digest == config.tensors_sha256
    if not same:
        raise AuroraError(
            f"{path} is not the file that {CONFIG} beside it belongs to, or one of them was changed; copy or save "
            f"both again"
        )
    problems = _factor_differences(config, tensors)
    if problems:
        raise AuroraError(f"{path} does not fit {CONFIG} beside it: {some(problems, separator='; ')}")
    return config, tensors


def read_adapter_config(folder: str | Path) -> AdapterConfig:
    """Settings of an adapter folder, checked against its tensors."""
    return read_adapter(folder)[0]


def _read(folder: str | Path, name: str) -> bytes:
    """A file of an adapter folder."""
    path = Path(folder) / name
    if name == CONFIG and not path.is_file():
        inner = sorted(found.parent.name for found in Path(folder).glob(f"adapter_*/{CONFIG}"))
        if inner:
            raise AuroraError(f"{folder} is the folder of a run; name one of its adapters: {', '.join(inner)}")
        raise AuroraError(f"{folder} is no adapter folder: it has no {CONFIG}")
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
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _factor_differences(config: AdapterConfig, tensors: Mapping[str, Tensor]) -> list[str]:
    """How the factors in the file differ from those that the settings announce."""
    expected = {f"{FACTORS}.{key}": shape for key, shape in factor_shapes(config).items()}
    problems = [f"{key} is missing" for key in expected.keys() - tensors.keys()]
    for key, tensor in tensors.items():
        if key.partition(".")[0] == FACTORS:
            if key not in expected:
                problems.append(f"{key} is of no slot")
            elif tuple(tensor.shape) != expected[key]:
                problems.append(f"{key} is {tuple(tensor.shape)}, not {expected[key]}")
            elif not tensor.is_floating_point():
                problems.append(f"{key} is of type {dtype_name(tensor.dtype)}, not of floating point")
    return sorted(problems)


def factor_shapes(config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """The factors' shapes that follow from slots and rank, by name."""
    with torch.device("meta"):
        factors = ModeFactors({slot: tuple(shape) for slot, shape in config.slots.items()}, config.mode_approx)
    return {key: tuple(parameter.shape) for key, parameter in factors.sets["default"].named_parameters()}


def dtype_name(dtype: torch.dtype) -> str:
    """E.g. float32."""
    return str(dtype).removeprefix("torch.")
