"""UniAdapter (arXiv 2302.06605): bottlenecks parallel to the feed-forward blocks, partly shared by the modalities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_aurora.adapters.sets import AdapterSet, AdapterSets, register_sets
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.config.method import UniAdapterConfig, chosen_layers


class UniAdapterSet(AdapterSet):
    """The bottlenecks of all layers; with h = relu(D x) and one down-projection D a layer:

        vision: s V h(x)      text: s T h(t)      fusion: s (T h(t) + (T + C) h(f))

    where x and t are what the feed-forward block reads in the vision and the text tower, and f is what it reads in
    a layer that attends to an image with t as its query (query residual). V, T and C start at zero.
    L (4dr + r + 3d) parameters.

    Args:
        depth, dim: L and d of the towers.
        config: rank r and scale s.
    """

    def __init__(self, depth: int, dim: int, config: UniAdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.down = nn.ModuleList(nn.Linear(dim, config.rank) for _ in range(depth))
        self.vision_up, self.text_up, self.fusion_up = (
            nn.ModuleList(nn.Linear(config.rank, dim) for _ in range(depth)) for _ in range(3)
        )
        for up in (*self.vision_up, *self.text_up, *self.fusion_up):
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)

    def vision(self, i: int, x: Tensor) -> Tensor:
        """Parallel to the feed-forward block of layer ``i`` of the vision tower; the shape of x."""
        output: Tensor = self.config.scale * self.vision_up[i](F.relu(self.down[i](x)))
        return output

    def text(self, i: int, t: Tensor) -> Tensor:
        """The same in the text tower, for a text alone."""
        output: Tensor = self.config.scale * self.text_up[i](F.relu(self.down[i](t)))
        return output

    def fusion(self, i: int, t: Tensor, f: Tensor) -> Tensor:
        """The same for a text that attends to an image."""
        hidden = F.relu(self.down[i](f))
        output: Tensor = self.config.scale * (self.text_up[i](hidden) + self.fusion_up[i](hidden))
        return self.text(i, t) + output

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(group, parameter) of everything this module trains."""
        for group, part in (
            ("down, shared", self.down),
            ("up, vision", self.vision_up),
            ("up, text", self.text_up),
            ("up, fusion", self.fusion_up),
        ):
            for parameter in part.parameters():
                yield f"UniAdapter {group}", parameter


@register_sets("uniadapter")
class UniAdapters(AdapterSets):
    """Named sets of bottlenecks, one of them active at a time.

    Attributes:
        layers: numbers of the layers with bottlenecks, rising; a set holds them in this order.
        blocks: the feed-forward blocks with a bottleneck parallel to them.

    Args:
        depth, dim: layers and width of the towers.
        config: of the set ``default``; its ``layers`` have bottlenecks.
    """

    tuning: ClassVar[str] = "uniadapter"
    prefix: ClassVar[str] = "uniadapter"
    config_class: ClassVar[type] = UniAdapterConfig
    layers: list[int]
    blocks: list[nn.Module]

    def __init__(self, depth: int, dim: int, config: UniAdapterConfig) -> None:
        layers = sorted(chosen_layers("uniadapter.layers", config.layers, "each tower", depth))
        if not layers:
            raise AuroraError("uniadapter.layers: no layer is left to adapt; choose one at least")
        super().__init__({f"layer.{i}": (dim, dim) for i in layers})
        self.layers = layers
        # Not submodules: they belong to the towers.
        self.__dict__["blocks"] = []
        self.add_set("default", config)

    @classmethod
    def tensor_shapes(
        cls, slots: Mapping[str, tuple[int, int]], config: UniAdapterConfig
    ) -> dict[str, tuple[int, ...]]:
        """The bottlenecks' shapes, of towers of one width."""
        with torch.device("meta"):
            one = UniAdapterSet(len(slots), next(iter(slots.values()))[0], config)
        return {key: tuple(parameter.shape) for key, parameter in one.named_parameters()}

    def make_set(self, name: str, config: UniAdapterConfig) -> UniAdapterSet:
        """Fresh bottlenecks, whose output is zero."""
        like = next(self.sets.parameters(), None)
        made = UniAdapterSet(len(self.slots), next(iter(self.slots.values()))[0], config).train(self.training)
        return made if like is None else made.to(like)

    def add_block(self, block: nn.Module) -> None:
        """Called for each feed-forward block with a bottleneck; their weights tell a file the backbone."""
        self.blocks.append(block)

    def backbone_weights(self, model: nn.Module) -> list[Tensor]:
        """The weights of the linear layers of these blocks."""
        layers = (layer for block in self.blocks for layer in block.modules() if isinstance(layer, nn.Linear))
        return [layer.weight.detach() for layer in layers]
