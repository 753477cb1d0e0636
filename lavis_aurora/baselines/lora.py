"""LoRA (arXiv 2106.09685), by the peft library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lavis_aurora.adapters.sets import AdapterSet, AdapterSets, register_sets
from lavis_aurora.adapters.updates import LowRank, UpdatedLayer
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.modules import retyped
from lavis_aurora.config.method import LoraConfig
from lavis_aurora.mode_approx.inject import choose_layers, find_targets


class LoraSet(AdapterSet):
    """The matrices of one name over all layers; they are parameters of peft's layers, and not of this module.

    Args:
        layers: peft's layers by name.
        name: of the set.
        config: its rank, alpha and dropout.
    """

    layers: dict[str, Any]

    def __init__(self, layers: dict[str, Any], name: str, config: LoraConfig) -> None:
        super().__init__()
        self.__dict__["layers"] = layers
        self.name, self.config = name, config

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """A and B of each layer: LAYER.lora_A.weight, (rank, d_in), and LAYER.lora_B.weight, (d_out, rank)."""
        for path, layer in self.layers.items():
            yield f"{prefix}{path}.lora_A.weight", layer.lora_A[self.name].weight
            yield f"{prefix}{path}.lora_B.weight", layer.lora_B[self.name].weight

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(group, parameter) of everything the set trains."""
        return (("LoRA A, B", parameter) for parameter in self.parameters())


class LoraBase(UpdatedLayer, nn.Linear):
    """The frozen layer inside one of peft's, so that an update can be merged into it bit for bit and taken out."""

    # peft's layer around this one; not a submodule.
    lora: Any

    def adapted_weights(self) -> dict[str, nn.Parameter]:
        """W0, (d_out, d_in)."""
        return {"weight": cast(nn.Parameter, self.weight)}

    def delta_weights(self, name: str = "default") -> dict[str, Tensor]:
        """alpha / rank * B A of the set ``name``."""
        return {"weight": self.lora.get_delta_weight(name)}

    def low_rank_updates(self, name: str = "default") -> LowRank:
        """A and alpha / rank * B of the set ``name``."""
        a, b = self.lora.lora_A[name].weight, self.lora.lora_B[name].weight
        return {"weight": (a, self.lora.scaling[name] * b)}


@register_sets("lora")
class LoraSets(AdapterSets):
    """Named sets of LoRA matrices over the same layers.

    The matrices are parameters of peft's layers; here is what treats them as a whole.

    Args:
        layers: peft's layers by name, with the set ``default``.
        config: of that set.
    """

    tuning: ClassVar[str] = "lora"
    prefix: ClassVar[str] = "lora"
    config_class: ClassVar[type] = LoraConfig
    layers: dict[str, Any]

    def __init__(self, layers: Mapping[str, Any], config: LoraConfig) -> None:
        super().__init__({name: (layer.in_features, layer.out_features) for name, layer in layers.items()})
        # Not submodules: the layers are registered where they stand in the model.
        self.__dict__["layers"] = dict(layers)
        for layer in layers.values():
            layer.base_layer = retyped(LoraBase, layer.base_layer)
            layer.base_layer.originals = {}
            layer.base_layer.__dict__["lora"] = layer
        self.sets["default"] = LoraSet(self.layers, "default", config)

    @classmethod
    def tensor_shapes(cls, slots: Mapping[str, tuple[int, int]], config: LoraConfig) -> dict[str, tuple[int, ...]]:
        """A (rank, d_in) and B (d_out, rank) of each layer."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (d_in, d_out) in slots.items():
            shapes[f"{name}.lora_A.weight"] = (config.rank, d_in)
            shapes[f"{name}.lora_B.weight"] = (d_out, config.rank)
        return shapes

    @classmethod
    def slot_updates(
        cls, slots: Mapping[str, tuple[int, int]], config: LoraConfig, tensors: Mapping[str, Tensor]
    ) -> LowRank:
        """A and alpha / rank * B of each layer."""
        scaling = config.alpha / config.rank
        return {
            name: (tensors[f"{name}.lora_A.weight"], scaling * tensors[f"{name}.lora_B.weight"]) for name in slots
        }

    @classmethod
    def add_updates(
        cls, parts: Sequence[tuple[LoraConfig, Mapping[str, Tensor]]], weights: Sequence[float]
    ) -> tuple[LoraConfig, dict[str, Tensor]]:
        """A one below the other, B side by side: the rank is the sum of the ranks."""
        ranks = [config.rank for config, _ in parts]
        merged: dict[str, Tensor] = {}
        for key in parts[0][1]:
            if key.endswith(".lora_A.weight"):
                merged[key] = torch.cat([tensors[key] for _, tensors in parts])
            else:
                scaled = zip(weights, parts)
                merged[key] = torch.cat([w * c.alpha / c.rank * tensors[key] for w, (c, tensors) in scaled], dim=1)
        return replace(parts[0][0], rank=sum(ranks), alpha=float(sum(ranks))), merged

    def make_set(self, name: str, config: LoraConfig) -> LoraSet:
        """Fresh matrices in every layer, B at zero."""
        for layer in self.layers.values():
            # peft lets train what it calls active, and nothing else.
            trained = {id(parameter): parameter.requires_grad for parameter in layer.parameters()}
            layer.update_layer(name, config.rank, config.alpha, config.dropout, True, False)
            for parameter in layer.parameters():
                parameter.requires_grad_(trained.get(id(parameter), True))
            layer.train(layer.training)
        return LoraSet(self.layers, name, config)

    def drop_set(self, name: str) -> None:
        """Take the matrices out of peft's layers."""
        for layer in self.layers.values():
            layer.delete_adapter(name)

    def activate(self, name: str | None) -> None:
        """Let peft's layers add the update of the set ``name``; none while it is merged."""
        super().activate(name)
        for layer in self.layers.values():
            # peft's set_adapter would also change what is trained.
            layer._active_adapter = [] if name is None or self.merged is not None else [name]

    def updated_layers(self, model: nn.Module) -> Iterator[tuple[str, UpdatedLayer]]:
        """The layers inside peft's, by the names that they have in the plain model."""
        return ((name.removesuffix(".base_layer"), layer) for name, layer in super().updated_layers(model))

    def plain_state(self, state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Without A and B, and the layers' weights under their own names."""
        inside = ".base_layer."
        return {
            key.replace(inside, "."): value
            for key, value in super().plain_state(state, prefix).items()
            if ".lora_A." not in key and ".lora_B." not in key
        }

    def backbone_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A backbone's weights under the names that they have inside peft's layers."""
        moved = {f"{name}.{kind}": f"{name}.base_layer.{kind}" for name in self.layers for kind in ("weight", "bias")}
        return {moved.get(key, key): value for key, value in state.items()}


def inject_lora(model: nn.Module, config: LoraConfig) -> LoraSets:
    """Put LoRA on linear layers of ``model``, in place.

    Args:
        model: a BLIP.
        config: rank, alpha, dropout and which layers.

    Raises:
        AuroraError: peft is not installed, a target matches nothing, or the layers are not those of the model.
    """
    try:
        from peft import LoraConfig as PeftConfig  # type: ignore[attr-defined]
        from peft import inject_adapter_in_model  # type: ignore[attr-defined]
    except ImportError as error:
        raise AuroraError(
            f"model.tuning: lora needs the library peft ({error}); pip install 'lavis_aurora[baselines]'"
        ) from error
    names = choose_layers(model, find_targets(model, config.targets, "lora.targets"), config.layers, "lora.layers")
    alpha: Any = config.alpha  # which may be a fraction here
    settings = PeftConfig(r=config.rank, lora_alpha=alpha, lora_dropout=config.dropout, target_modules=names)
    inject_adapter_in_model(settings, model)
    return LoraSets({name: model.get_submodule(name) for name in names}, config)
