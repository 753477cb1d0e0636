"""Adapters compared and added, from their folders alone: no model is built."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lavis_aurora.adapters.config import AdapterConfig, read_adapter
from lavis_aurora.adapters.files import set_tensors, write_adapter
from lavis_aurora.adapters.sets import KINDS
from lavis_aurora.adapters.updates import LowRank
from lavis_aurora.common.errors import AuroraError, abbreviated, require, shown

# Of a model's settings, those of its backbone that decide the output besides the weights.
BACKBONE_SETTINGS = (
    *("image_size", "vit_type", "vit", "vit_layer_norm_epsilon", "embed_dim", "max_txt_len", "token_merging"),
    *("share_decoder", "mask_question_padding"),
)
# Of a model's description, what decides the output besides the tensors.
SAME = ("arch", "vocabulary_sha256", "text_config")
SAME_SETTINGS = ("tuning", "gate", "base", *BACKBONE_SETTINGS)


@dataclass
class Products:
    """Inner products of two updates, or of sums of them.

    Attributes:
        first, second: squared norms.
        both: of the one with the other.
    """

    first: float = 0.0
    second: float = 0.0
    both: float = 0.0

    def __add__(self, other: Products) -> Products:
        return Products(self.first + other.first, self.second + other.second, self.both + other.both)

    @property
    def norms(self) -> tuple[float, float, float]:
        """Frobenius norms of the first, of the second and of their difference."""
        apart = max(self.first + self.second - 2 * self.both, 0.0)
        return self.first**0.5, self.second**0.5, apart**0.5

    @property
    def cosine(self) -> float:
        """Of the angle between the two; NaN where one is zero."""
        size = (self.first * self.second) ** 0.5
        return self.both / size if size else float("nan")


def compare_updates(
    first: tuple[AdapterConfig, dict[str, Tensor]], second: tuple[AdapterConfig, dict[str, Tensor]]
) -> dict[str, Products]:
    """How the updates of two adapters agree, for each slot that both have, of whatever rank they are.

    Args:
        first, second: settings and tensors, see :func:`read_adapter`.

    Raises:
        AuroraError: one is no update of weights.
    """
    ours, theirs = _slot_updates(*first), _slot_updates(*second)
    shared = [slot for slot in ours if second[0].slots.get(slot) == first[0].slots[slot]]
    return {slot: Products(*(_inner(*pair) for pair in _pairs(ours[slot], theirs[slot]))) for slot in shared}


def compare_companions(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], prefixes: Sequence[str]
) -> dict[str, Products]:
    """The same of gates and heads, tensor by tensor, for those of equal names and shapes.

    Args:
        first, second: tensors of two adapters.
        prefixes: of what is no gate or head.
    """
    found = {}
    for key, tensor in first.items():
        if key.partition(".")[0] not in prefixes and key in second and second[key].shape == tensor.shape:
            a, b = tensor.double(), second[key].double()
            found[key] = Products(float((a * a).sum()), float((b * b).sum()), float((a * b).sum()))
    return found


def _slot_updates(config: AdapterConfig, tensors: Mapping[str, Tensor]) -> LowRank:
    sets = KINDS[config.kind]
    return sets.slot_updates(_slots(config), config.settings, _own(config, tensors))


def _slots(config: AdapterConfig) -> dict[str, tuple[int, int]]:
    return {slot: (d_in, d_out) for slot, (d_in, d_out) in config.slots.items()}


def _own(config: AdapterConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The set's tensors by their names in it, in single precision."""
    return {key: tensor.float() for key, tensor in set_tensors(config, tensors).items()}


def _pairs(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[tuple[tuple[Tensor, Tensor], ...], ...]:
    return (a, a), (b, b), (a, b)


def _inner(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """<B_1 A_1, B_2 A_2> = sum (B_1^T B_2) * (A_1 A_2^T), without either product."""
    (a1, b1), (a2, b2) = ((x.double(), y.double()) for x, y in (a, b))
    return float(((b1.t() @ b2) * (a1 @ a2.t())).sum())


def merge_adapters(
    folders: Sequence[str | Path], output: str | Path, weights: Sequence[float] | None = None
) -> list[str]:
    """Write the weighted sum of adapters of one backbone as an adapter: dW = sum_i weight_i dW_i, exactly.

    Aurora's and LoRA's ranks add up; of Aurora's with equal U and V the rank stays. Gates and heads, which are no
    updates, are averaged where they differ, so that weights must then sum to 1.

    Args:
        folders: two or more.
        output: the folder to write; nothing may be there yet.
        weights: one for each; the mean by default.

    Returns:
        What must be known of the result, a sentence each.

    Raises:
        AuroraError: they are of several kinds, backbones, slots or settings that decide the output; weights do not
            fit; or the folder cannot be written.
    """
    if len(folders) < 2:
        raise AuroraError("merge-adapters: name two or more adapters")
    weights = [1 / len(folders)] * len(folders) if weights is None else list(weights)
    if len(weights) != len(folders):
        raise AuroraError(f"--weights: {len(weights)} for {len(folders)} adapters; give one for each")
    require(all(map(math.isfinite, weights)), "--weights", weights, "a finite number for each adapter")
    if Path(output).expanduser().exists():
        raise AuroraError(f"{output} is there already; name another folder")
    read = [read_adapter(folder) for folder in folders]
    config = read[0][0]
    for folder, (other, _) in zip(folders[1:], read[1:]):
        differences = _differences(config, other)
        if differences:
            raise AuroraError(
                f"{folders[0]} and {folder} cannot be added: {abbreviated(differences, separator='; ')}"
            )
    sets = KINDS[config.kind]
    parts = [(one.settings, _own(one, tensors)) for one, tensors in read]
    settings, own = sets.add_updates(parts, weights)
    averaged, companions = _average(read, weights, sets.prefix)
    tensors = {**{f"{sets.prefix}.{key}": tensor.contiguous() for key, tensor in own.items()}, **companions}
    summed = replace(config, settings=settings, metrics={})  # those were of the parts
    write_adapter(output, summed, tensors)
    terms = " + ".join(f"{weight:g} {folder}" for weight, folder in zip(weights, folders))
    notes = [f"{output} = {terms}, exactly, of rank {settings.rank}."]
    if averaged:
        notes.append(f"Averaged, as they are no updates: {abbreviated(averaged)}.")
    return [*notes, "Its metrics are not those of its parts: evaluate it."]


def _differences(config: AdapterConfig, other: AdapterConfig) -> list[str]:
    """Why two adapters cannot be added."""
    if config.kind != other.kind:
        return [f"the one is of {config.kind} and the other of {other.kind}"]
    problems = []
    if list(config.slots.items()) != list(other.slots.items()):
        problems.append("they update other weights (slots)")
    elif config.base.sha256 != other.base.sha256:
        names = (f"{one.base.name or 'without a name'}, sha256 {one.base.sha256[:12]}" for one in (config, other))
        problems.append(f"they were tuned on other backbones ({'; '.join(names)})")
    rows = [(key, config.model.get(key), other.model.get(key)) for key in SAME]
    own, theirs = (one.model.get("settings") or {} for one in (config, other))
    rows += [(f"settings.{key}", own.get(key), theirs.get(key)) for key in SAME_SETTINGS]
    problems += [f"{key} is {shown(a)} in the one and {shown(b)} in the other" for key, a, b in rows if a != b]
    return problems


def _average(
    read: Sequence[tuple[AdapterConfig, dict[str, Tensor]]], weights: Sequence[float], prefix: str
) -> tuple[list[str], dict[str, Tensor]]:
    """Names of the gates and heads that differ, and the mean of all of them."""
    groups = [{key: t for key, t in tensors.items() if not key.startswith(f"{prefix}.")} for _, tensors in read]
    for group in groups[1:]:
        apart = sorted(group.keys() ^ groups[0].keys())
        if apart:
            raise AuroraError(f"only one of the adapters has {abbreviated(apart)}; they cannot be averaged")
    shapes = sorted(key for key, tensor in groups[0].items() if any(g[key].shape != tensor.shape for g in groups))
    if shapes:
        raise AuroraError(f"{abbreviated(shapes)} differ in shape; they cannot be averaged")
    differ = sorted(key for key, tensor in groups[0].items() if any(not torch.equal(g[key], tensor) for g in groups))
    if differ and abs(sum(weights) - 1) > 1e-6:
        raise AuroraError(
            f"{abbreviated(differ)} differ and are no updates, which could be added; give --weights whose sum is 1, "
            f"not {sum(weights):g}, to average them"
        )
    merged = dict(groups[0])
    for key in differ:
        values = torch.stack([group[key] for group in groups])
        if values.is_floating_point():
            factors = torch.tensor(weights, dtype=torch.double).view(-1, *[1] * (values.dim() - 1))
            merged[key] = (values.double() * factors).sum(dim=0).to(values.dtype)
        else:  # counts
            merged[key] = values.amax(dim=0)
    return differ, merged
