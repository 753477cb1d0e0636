"""Find the layers of a model, by default its attention projections, and put them over shared factors."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from torch import nn

from lavis_aurora.adapters.companions import freeze_norms, has_momentum, momentum_copies
from lavis_aurora.adapters.sets import MOMENTUM_SET
from lavis_aurora.adapters.switching import find_adapters
from lavis_aurora.common.errors import AuroraError, abbreviated, did_you_mean
from lavis_aurora.config.method import ModeApproxConfig, chosen_layers, named_towers
from lavis_aurora.mode_approx.factors import ModeFactors
from lavis_aurora.mode_approx.layers import AdaptedLayer, ModeApproxLinear, ModeApproxMultiheadAttention
from lavis_aurora.mode_approx.presets import ATTENTION, PRESETS, TOWER_END, expand_presets, is_attention

# Input weights of nn.MultiheadAttention with the projections in their rows: one for all, or three where the widths
# of keys or values differ from that of the queries.
IN_WEIGHTS = {
    "in_proj_weight": ("query", "key", "value"),
    "q_proj_weight": ("query",),
    "k_proj_weight": ("key",),
    "v_proj_weight": ("value",),
}
# Linear layers that hold several projections stacked in their rows, by the last part of their name.
FUSED = {"qkv": ("query", "key", "value"), "kv": ("key", "value")}


def find_targets(model: nn.Module, targets: Sequence[str], key: str = "mode_approx.targets") -> list[str]:
    """Names of the layers that match, in the model's order.

    Layers are nn.Linear and nn.MultiheadAttention; those of momentum copies are none, they follow the others.

    Args:
        model: any module.
        targets: regular expressions that must match a layer's whole name, or names of presets.
        key: of the YAML, for errors.

    Raises:
        AuroraError: a pattern matches no such layer, or one that does not compute as torch's own.
    """
    copies = {id(module) for _, copy in momentum_copies(model) for module in copy.modules()}
    modules = {name: module for name, module in model.named_modules() if name and id(module) not in copies}
    layers = [name for name, module in modules.items() if isinstance(module, (nn.Linear, nn.MultiheadAttention))]
    found: set[str] = set()
    for entry in targets:
        for pattern in expand_presets([entry]):
            matches = {name for name in layers if re.fullmatch(pattern, name)}
            if not matches:
                other = next((name for name in modules if re.fullmatch(pattern, name)), None)
                which = f", but {other}, a {type(modules[other]).__name__}" if other else ""
                # Of a model's preset, the tower; the word alone asks for no tower.
                tower = f" in {pattern.partition(TOWER_END)[0]}" if entry in PRESETS and TOWER_END in pattern else ""
                word = f"; {entry.partition('/')[2] or 'attention'} alone names those of any model" if tower else ""
                raise AuroraError(
                    f"{key}: {_quoted(entry)} matches no linear or nn.MultiheadAttention layer{tower}{which}{word}"
                    f"{_near(entry, layers)}"
                )
            found |= matches
    names = [name for name in layers if name in found]
    for name in names:
        _check_plain(name, modules[name])
    return names


def choose_layers(model: nn.Module, names: Sequence[str], layers: Any, key: str) -> list[str]:
    """Those of the targets ``names`` that stand in the chosen layers of their towers.

    A target's tower is the first part of its name, and the number of its layer the first number in it:
    ``text_encoder.encoder.layer.3.attention.self.query`` stands in layer 3 of text_encoder.

    Args:
        model: that has them.
        names: from :func:`find_targets`.
        layers: as of :class:`~lavis_aurora.config.method.ModeApproxConfig`.
        key: of the configuration, for messages.

    Raises:
        AuroraError: a tower is not there or has fewer layers, a target is in no numbered layer, or none is left.
    """
    if layers is None:
        return list(names)
    chosen: list[str] = []
    towers: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
        if not at:
            raise AuroraError(
                f"{key}: the target {name} is in no numbered layer; leave {key} out, or let targets name none such"
            )
        tower, stack = parts[0], model.get_submodule(".".join(parts[:at]))
        towers[tower] = None
        if int(parts[at]) in chosen_layers(key, layers, tower, len(list(stack.children()))):
            chosen.append(name)
    for tower in named_towers(layers):
        if tower not in towers:
            raise AuroraError(f"{key}.{tower}: no tower with targets{did_you_mean(tower, towers)}")
    if not chosen:
        raise AuroraError(f"{key}: no layer is left to adapt; choose one in a tower at least")
    return chosen


def _near(pattern: str, layers: Sequence[str], limit: int = 5) -> str:
    """Presets or layers that may be meant; layers that differ in numbers alone count as one."""
    presets = get_close_matches(pattern, PRESETS)
    if presets and pattern not in PRESETS:
        return f"; did you mean the preset {' or '.join(map(repr, presets))}?"
    kinds = list(dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", r"\\d+", name) for name in layers))
    near = get_close_matches(pattern, kinds)
    if near:
        return f"; did you mean the layers {' or '.join(map(_quoted, near))}?"
    return f"; layers are {abbreviated(map(_quoted, kinds), limit)}"


def _quoted(pattern: str) -> str:
    """As it is written in a YAML; repr would double each backslash."""
    return f"'{pattern}'"


def _check_plain(name: str, layer: nn.Module) -> None:
    """Refuse a layer that is more than torch's own, whose ways an adapted one would not have."""
    kind = nn.Linear if isinstance(layer, nn.Linear) else nn.MultiheadAttention
    if type(layer).forward is not kind.forward or "forward" in vars(layer):
        raise AuroraError(
            f"target {name} is a {type(layer).__name__} with a forward of its own; it cannot be adapted"
        )
    if not _weights(layer):
        raise AuroraError(f"target {name}: its weight is computed from others (parametrized); remove that first")


def _weights(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that updates are for, by name."""
    names = IN_WEIGHTS if isinstance(layer, nn.MultiheadAttention) else ("weight",)
    weights = {name: layer._parameters.get(name) for name in names}
    return {name: weight for name, weight in weights.items() if weight is not None}


def _slots(layer: str, weight: str, shape: Sequence[int], in_blocks: bool) -> tuple[tuple[str, ...], tuple[int, int]]:
    """The slots of a weight: endings of their names, one below the other or side by side, and their (d_in, d_out).

    Args:
        layer: its name.
        weight: its name in the layer.
        shape: of the weight, (d_out, d_in).
        in_blocks: the longer side is divided into blocks as long as the shorter one, if it is a multiple of that.

    Raises:
        AuroraError: projections that are stacked in the rows are not of one size.
    """
    d_out, d_in = shape
    parts = IN_WEIGHTS.get(weight) or FUSED.get(layer.rpartition(".")[2], ())
    if parts:
        if d_out % len(parts):
            raise AuroraError(f"{layer}: {d_out} rows do not divide into {', '.join(parts)}")
        return tuple(f".{part}" for part in parts), (d_in, d_out // len(parts))
    short, long = sorted(shape)
    if in_blocks and long > short and long % short == 0:
        return tuple(f".block{i}" for i in range(long // short)), (short, short)
    return ("",), (d_in, d_out)


def adapt_copies(model: nn.Module, factors: ModeFactors) -> None:
    """Let the momentum copies of adapted layers read the moving average of the adapter.

    The copies' layers use the slots of the layers that they are copies of, pinned to the set ``momentum``; that set
    joins ``model.model_pairs``, so that LAVIS's own update, which zips parameters pair by pair, averages the factors
    as it averages what else is trained:

        W_m = W0 + dW(U_m, V_m, P_m, lambda_m),   theta_m <- m theta_m + (1 - m) theta  for each factor

    The frozen weights of copy and original are alike, and so is their average. A model without copies stays as it is.
    """
    if not has_momentum(model):
        return
    twins: dict[int, nn.Module] = {}
    for trained, copy in momentum_copies(model):
        for name, layer in trained.named_modules():
            if isinstance(layer, AdaptedLayer):
                twins[id(copy.get_submodule(name))] = layer.twin(copy.get_submodule(name), MOMENTUM_SET)
    if not twins:
        return
    _replace(model, twins)
    model.model_pairs.append(factors.add_teacher())


def inject_mode_approx(
    model: nn.Module,
    config: ModeApproxConfig,
    targets: Sequence[str] = ATTENTION,
    slot_name: Callable[[str], str] = lambda name: name,
) -> ModeFactors:
    """Put the target layers of a model over one :class:`ModeFactors`, ``model.mode_approx``.

    Everything else is frozen: the factors alone are trainable afterwards, and running statistics stand still. A model
    in eval mode stays there.

    Momentum copies that LAVIS keeps in ``model.model_pairs`` get the moving average of the factors, see
    :func:`adapt_copies`.

    Args:
        model: any module; changed in place.
        config: rank, scale and, if set, the targets and the layers.
        targets: which layers, unless the configuration says it, see :func:`find_targets`; by default the attention
            projections by their usual names. What a preset names besides those, d x nd or nd x d, is n slots of
            d x d; what a regular expression names is one slot.
        slot_name: the slot that a layer uses, by the layer's name. Layers of the same slot share it; layers that
            share a weight always do.

    Returns:
        The factors, also at ``model.mode_approx``.

    Raises:
        AuroraError: the model has factors already, a target matches nothing, a fused layer does not divide, or
            ``config.layers`` are not those of the model.
    """
    if find_adapters(model) is not None:
        raise AuroraError("the model has mode_approx factors already; inject them once")
    targets = targets if config.targets is None else config.targets
    names = choose_layers(model, find_targets(model, targets), config.layers, "mode_approx.layers")
    # What a regular expression names is one slot, as it is.
    by_presets = find_targets(model, [entry for entry in targets if entry in PRESETS])
    in_blocks = {name for name in by_presets if not is_attention(name)}
    slots, rows = _assign_slots(model, names, in_blocks, slot_name)
    # What was targeted, the slots say.
    factors = ModeFactors(slots, replace(config, targets=None, layers=None))
    index = {slot: i for i, slot in enumerate(slots)}
    adapted: dict[int, nn.Module] = {}
    for name in names:
        layer = model.get_submodule(name)
        owned = {weight: [index[slot] for slot in used] for weight, used in rows[name].items()}
        if isinstance(layer, nn.MultiheadAttention):
            adapted[id(layer)] = ModeApproxMultiheadAttention(layer, factors, owned)
        else:
            adapted[id(layer)] = ModeApproxLinear(layer, factors, owned["weight"])
    _replace(model, adapted)
    model.requires_grad_(False)
    freeze_norms(model, momentum_copies(model))
    model.mode_approx = factors.to(next(model.get_submodule(names[0]).parameters()).device).train(model.training)
    adapt_copies(model, factors)
    return factors


def _assign_slots(
    model: nn.Module, names: Sequence[str], in_blocks: Collection[str], slot_name: Callable[[str], str]
) -> tuple[dict[str, tuple[int, int]], dict[str, dict[str, list[str]]]]:
    """Shape of each slot, in order, and the slots of each layer by weight."""
    slots: dict[str, tuple[int, int]] = {}
    rows: dict[str, dict[str, list[str]]] = {}
    # One weight in several layers has one update, which can be merged into it.
    used: dict[int, list[str]] = {}
    for name in names:
        rows[name] = {}
        for weight, parameter in _weights(model.get_submodule(name)).items():
            if id(parameter) not in used:
                endings, shape = _slots(name, weight, parameter.shape, name in in_blocks)
                owned = used[id(parameter)] = [slot_name(name) + ending for ending in endings]
                for slot in owned:
                    if slots.setdefault(slot, shape) != shape:
                        raise AuroraError(f"{name}: cannot share slot {slot!r} of shape {slots[slot]} with {shape}")
            rows[name][weight] = used[id(parameter)]
    return slots, rows


def _replace(model: nn.Module, adapted: dict[int, nn.Module]) -> None:
    """Put the adapted layers in the place of those whose id they have, wherever a module or a pair holds them."""
    for parent in [*model.modules(), *adapted.values()]:
        for name, child in list(parent._modules.items()):
            if id(child) in adapted:
                setattr(parent, name, adapted[id(child)])
    if has_momentum(model):
        model.model_pairs[:] = [[adapted.get(id(part), part) for part in pair] for pair in model.model_pairs]
