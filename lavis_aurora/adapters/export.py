"""An adapter as the peft library has it: LoRA of the same updates, exactly. Written without peft."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from lavis_aurora.adapters.companions import head_modules
from lavis_aurora.adapters.config import CONFIG, TENSORS
from lavis_aurora.adapters.merging import plain_model, refuse_gates, weight_layers
from lavis_aurora.adapters.sets import AdapterSets
from lavis_aurora.adapters.switching import adapters_of
from lavis_aurora.adapters.updates import LowRank
from lavis_aurora.common.errors import AuroraError, abbreviated
from lavis_aurora.common.files import new_folder

# What peft puts before the names of a model that it wraps.
PREFIX = "base_model.model."
# The remedy where it cannot be peft.
MERGE = "fold the adapter into the weights (merged_state_dict, lavis-aurora merge)"


@dataclass
class ExportedLora:
    """What was written.

    Attributes:
        layers: that have a LoRA, by name.
        rank: of each.
        error: of a cut rank, || dW - B A || / || dW || over all layers together.
        heads: modules that were trained with the adapter and are in the folder too.
        left_out: parameters that were trained with it and are not: peft has no place for them.
        shared: layers that share their weight with others. peft computes right with them, but its merge_and_unload
            would add the update once for each; merge here.
        attentions: those of the layers that are nn.MultiheadAttention, which peft adapts from 0.15 on; an older one
            refuses the folder.
    """

    layers: list[str]
    rank: int
    error: float
    heads: list[str]
    left_out: list[str]
    shared: list[str]
    attentions: list[str]


def export_lora(
    model: nn.Module, folder: str | Path, name: str | None = None, rank: int | None = None
) -> ExportedLora:
    """Write an adapter as a folder that ``peft.PeftModel.from_pretrained(backbone, folder)`` loads.

    dW = V diag(w) U^T is a LoRA of rank R: A = U^T, B = V diag(w), alpha = R. A weight of several slots (fused query,
    key and value, blocks) is of rank R too, see ``AdaptedLayer.low_rank_updates``. Heads that were trained are peft's
    ``modules_to_save``.

    Args:
        model: a model with an adapter that updates weights (Aurora without a gate, or LoRA).
        folder: made; nothing may be there yet.
        name: which adapter; by default the active one.
        rank: cut each layer's LoRA to this rank, by its largest singular values.

    Raises:
        AuroraError: there is no such adapter; it has a gate or is no update of weights; peft could not tell the
            layers apart, or would not compute with them as the model does; a value is not finite; the folder cannot
            be written.
    """
    sets = adapters_of(model)
    name = sets.active if name is None else name
    if name is None:
        raise AuroraError("no adapter is active: leave disable_adapter first, or name the adapter to export")
    sets.check_name(name)
    refuse_gates(model, sets, "to export a LoRA")
    backbone, prefix = plain_model(model, sets)
    updates = _layer_updates(backbone, sets, name)
    heads, left_out = _heads(model, sets, name, prefix)
    updates, error = _of_one_rank(updates, rank)
    tensors = {f"{layer}.lora_{kind}.weight": x for layer, ab in updates.items() for kind, x in zip("AB", ab)}
    tensors.update({f"{head}.{key}": tensor for head, owned in heads.items() for key, tensor in owned.items()})
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AuroraError(f"{key}: not finite; nothing was written to {folder}")
    targets = _targets(backbone, updates, tensors, heads)
    size = len(next(iter(updates.values()))[0])
    layers = dict(weight_layers(backbone, sets))
    attentions = [path for path in updates if isinstance(layers[path], nn.MultiheadAttention)]
    for path in attentions:
        tensors.update(_no_update_of_output(path, layers[path], size))
    # Copies: A is U of all layers, and safetensors takes no tensor twice.
    values = {
        PREFIX + key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    with new_folder(folder) as place:
        (place / TENSORS).write_bytes(safetensors.torch.save(values, {"format": "pt"}))
        text = json.dumps(_peft_config(size, targets, list(heads)), indent=1)
        (place / CONFIG).write_text(text + "\n", encoding="utf-8")
    weights = {path: id(next(iter(layers[path].adapted_weights().values()))) for path in updates}
    counts = Counter(weights.values())
    shared = [path for path, weight in weights.items() if counts[weight] > 1]
    return ExportedLora(list(updates), size, error, list(heads), left_out, shared, attentions)


def _peft_config(rank: int, targets: list[str] | str, heads: list[str]) -> dict[str, Any]:
    """``adapter_config.json`` of peft; what it does not say is peft's default."""
    return {
        "peft_type": "LORA",
        # A name here would be looked up on the hub whenever peft saves.
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
        "modules_to_save": heads or None,
    }


def _layer_updates(backbone: nn.Module, sets: AdapterSets, name: str) -> LowRank:
    """A and B of each layer, by its name in the plain model; momentum copies are left to peft's user."""
    updates: LowRank = {}
    seen: dict[int, str] = {}
    for path, layer in weight_layers(backbone, sets):
        if layer.pinned is not None:
            continue
        weights = list(layer.adapted_weights())
        if weights not in (["weight"], ["in_proj_weight"]):
            raise AuroraError(
                f"{path} is a {_kind(layer)} of several input weights ({', '.join(weights)}), which peft does not "
                f"adapt; {MERGE}"
            )
        parent, _, child = path.rpartition(".")
        owner = backbone.get_submodule(parent)
        if isinstance(owner, nn.MultiheadAttention):
            raise AuroraError(
                f"{path}: peft adapts the output projection of a {_kind(owner)} only with its other weights, and "
                f"adds its update twice (0.21 does); {MERGE}"
            )
        if _reads_weight(owner, child):
            raise AuroraError(
                f"{path}: {_kind(owner)} reads its weight and does not call it, so that peft's LoRA would do nothing "
                f"there; {MERGE}"
            )
        first = seen.setdefault(id(layer), path)
        if first != path:
            raise AuroraError(f"{path} and {first} are one layer, and peft would adapt the one place alone; {MERGE}")
        updates[path] = layer.low_rank_updates(name)[weights[0]]
    return updates


def _no_update_of_output(path: str, attention: nn.Module, rank: int) -> dict[str, Tensor]:
    """A and B of zeros for the output projection, which peft adapts with an attention and would say are missing."""
    d_out, d_in = attention.get_submodule("out_proj").get_parameter("weight").shape
    lora = f"{path}.base_layer.out_proj.lora"
    return {f"{lora}_A.weight": torch.zeros(rank, d_in), f"{lora}_B.weight": torch.zeros(d_out, rank)}


def _kind(module: nn.Module) -> str:
    """The class of a module as its library calls it; an adapted one's is the second among its bases."""
    return next(cls.__name__ for cls in type(module).__mro__ if cls.__module__.partition(".")[0] != "lavis_aurora")


def _reads_weight(owner: nn.Module, child: str) -> bool:
    """Whether a module's forward computes with the weight of its layer ``child`` itself; as far as its code tells."""
    try:
        code = inspect.getsource(type(owner).forward)
    except (OSError, TypeError):
        return False
    return re.search(rf"self\.{re.escape(child)}\.(in_proj_)?weight\b(?!\.(dtype|device|shape))", code) is not None


def _heads(
    model: nn.Module, sets: AdapterSets, name: str, prefix: str
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """What was trained with the adapter: tensors of modules by name, and the names of single parameters."""
    group = sets.companion_groups().get("heads")
    tensors = {} if group is None else group.tensors_of(name)
    heads = {id(head) for head in head_modules(model)}
    found: dict[str, dict[str, Tensor]] = {}
    for path, module in model.named_modules():
        if id(module) in heads:
            inside = [key for key in tensors if key.startswith(f"{path}.")]
            owned = {key.removeprefix(f"{path}."): tensors.pop(key) for key in inside}
            found.update({path.removeprefix(prefix): owned} if owned else {})
    return found, [key.removeprefix(prefix) for key in tensors]


def _targets(
    backbone: nn.Module, updates: LowRank, tensors: Collection[str], heads: Mapping[str, Any]
) -> list[str] | str:
    """``target_modules``: the names of the layers, or one regular expression where names alone would name others too.

    Raises:
        AuroraError: peft, which goes by parts of names, would take something else for a head.
    """
    names = [name for name, _ in backbone.named_modules()]
    for head in heads:
        others = [name for name in names if name.endswith(head) and name != head]
        others += [key for key in tensors if head in key and not key.startswith(f"{head}.")]
        if others:
            raise AuroraError(
                f"peft cannot tell the trained module {head} from {abbreviated(others)}, whose names hold its own; "
                f"{MERGE}"
            )
    ends = tuple(f".{layer}" for layer in updates)
    if any(name.endswith(ends) and name not in updates for name in names):
        return "|".join(map(re.escape, updates))
    return list(updates)


def _of_one_rank(updates: LowRank, rank: int | None) -> tuple[LowRank, float]:
    """All of one rank, filled up with zeros, or cut to ``rank``; and the relative error of that."""
    size = max(len(a) for a, _ in updates.values())
    if rank is None or rank >= size:
        return {layer: _padded(a, b, size) for layer, (a, b) in updates.items()}, 0.0
    if rank < 1:
        raise AuroraError(f"rank: {rank} cannot be used; it must be 1 or more")
    cut: LowRank = {}
    lost = whole = 0.0
    for layer, (a, b) in updates.items():
        left, right, singular = _singular_parts(a, b)
        kept = singular[:rank].sqrt()
        cut[layer] = _padded(kept[:, None] * right[:rank], left[:, :rank] * kept, rank)
        lost, whole = lost + float(singular[rank:].square().sum()), whole + float(singular.square().sum())
    return cut, math.sqrt(lost / whole) if whole else 0.0


def _singular_parts(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of B A: left (d_out, r) and right (r, d_in) singular vectors, and singular values (r,), in double precision.

    By two QR decompositions, so that nothing of the size of the weight is decomposed.
    """
    q_b, r_b = torch.linalg.qr(b.detach().double())
    q_a, r_a = torch.linalg.qr(a.detach().double().t())
    left, singular, right = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    return q_b @ left, right @ q_a.t(), singular


def _padded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, d_in) and B (d_out, rank) in single precision with zeros where they are of a lower rank."""
    more = rank - len(a)
    return nn.functional.pad(a.float(), (0, 0, 0, more)), nn.functional.pad(b.float(), (0, more))
