"""``adapter_config.json``: what an adapter is, what it was tuned on, and how its tensors are read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Any, Optional, get_type_hints

from lavis_aurora.config import ModeApproxConfig
from lavis_aurora.errors import AuroraError, near_names

FORMAT = 1


@dataclass
class BaseConfig:
    """The backbone under the adapter.

    Attributes:
        sha256: of the weights that the adapter updates, see :func:`~lavis_aurora.mode_approx.adapter_file.base_hash`.
        name: file or URL of its checkpoint; null for weights that came from nowhere else.
        dtype: of these weights, see :func:`~lavis_aurora.mode_approx.adapter_file.base_dtype`; the hash differs with
            it. Files that do not say it are of models in single precision.
    """

    sha256: str
    name: Optional[str] = None
    dtype: str = "float32"


@dataclass
class AdapterConfig:
    """All settings of an adapter.

    Attributes:
        mode_approx: rank and scale.
        slots: (d_in, d_out) of each slot, in the order of the rows of P and lambda.
        base: the backbone.
        tensors_sha256: of the file ``adapter_model.safetensors`` that belongs to this one.
        model: what the model says of itself: for those of this package arch, model_type, settings, preprocess.
        metrics: measured with this adapter, by name.
        versions: of the packages that wrote it.
        format: of this file.
    """

    mode_approx: ModeApproxConfig
    slots: dict[str, list[int]]
    base: BaseConfig
    tensors_sha256: str
    model: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise AuroraError(f"format: {self.format} is not {FORMAT}, which this version reads; update lavis_aurora")
        for slot, shape in self.slots.items():
            if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
                raise AuroraError(f"slots.{slot}: {shape!r} is not [d_in, d_out]")

    def to_json(self) -> str:
        """The file's text; :meth:`from_json` gives back an equal configuration.

        Raises:
            AuroraError: a metric or a setting is no JSON value.
        """
        try:
            text = json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise AuroraError(f"the adapter's settings and metrics must be plain JSON values ({error})") from error
        # A slot on one line, not on four.
        return re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text)

    @classmethod
    def from_json(cls, text: str) -> AdapterConfig:
        """Read and check the file's text.

        Raises:
            AuroraError: not JSON, an unknown or missing key, or a value of another type.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise AuroraError(f"not a JSON file ({error})") from error
        return _parse(cls, data, "")


def _parse(cls: type, data: Any, prefix: str) -> Any:
    """An instance of the dataclass ``cls``, every key and type checked."""
    if not isinstance(data, Mapping):
        raise AuroraError(f"{prefix.rstrip('.') or 'the file'}: must be a section of keys, not {data!r}")
    known = {f.name: f for f in fields(cls)}
    for key in data.keys() - known.keys():
        raise AuroraError(f"{prefix}{key}: unknown key{near_names(key, known)}")
    for key, declared in known.items():
        if key not in data and declared.default is MISSING and declared.default_factory is MISSING:
            raise AuroraError(f"{prefix}{key}: missing")
    hints = get_type_hints(cls)
    values = {key: _value(hints[key], value, f"{prefix}{key}") for key, value in data.items()}
    try:
        return cls(**values)
    except AuroraError:
        raise
    except TypeError as error:
        raise AuroraError(f"{prefix or 'the file'}: {error}") from error


def _value(kind: Any, value: Any, key: str) -> Any:
    if is_dataclass(kind):
        return _parse(kind, value, f"{key}.")
    expected = getattr(kind, "__origin__", kind)
    accepted = {float: (int, float), int: (int,), str: (str,), dict: (dict,)}.get(expected, (str, type(None)))
    if not isinstance(value, accepted) or isinstance(value, bool):
        raise AuroraError(f"{key}: {value!r} is not a {getattr(expected, '__name__', expected)}")
    return value
