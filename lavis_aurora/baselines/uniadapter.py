"""UniAdapter (arXiv 2302.06605): bottlenecks beside the feed-forward blocks, partly shared by the modalities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.nn.functional as F
from lavis.models.med import BertModel
from lavis.models.vit import Mlp, VisionTransformer
from torch import Tensor, nn

from lavis_aurora.common.errors import AuroraError, near_names
from lavis_aurora.config.method import UniAdapterConfig
from lavis_aurora.encoders.fused import retyped
from lavis_aurora.encoders.fusion import RememberingLayer, remember_query


class UniAdapterSet(nn.Module):
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
        """Beside the feed-forward block of layer ``i`` of the vision tower; the shape of x."""
        return self.config.scale * self.vision_up[i](F.relu(self.down[i](x)))

    def text(self, i: int, t: Tensor) -> Tensor:
        """The same in the text tower, for a text alone."""
        return self.config.scale * self.text_up[i](F.relu(self.down[i](t)))

    def fusion(self, i: int, t: Tensor, f: Tensor) -> Tensor:
        """The same for a text that attends to an image."""
        hidden = F.relu(self.down[i](f))
        return self.text(i, t) + self.config.scale * (self.text_up[i](hidden) + self.fusion_up[i](hidden))

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


class UniAdapters(nn.Module):
    """Named sets of bottlenecks, one of them active at a time."""

    def __init__(self, depth: int, dim: int, config: UniAdapterConfig) -> None:
        super().__init__()
        self.shape = (depth, dim)
        self.sets = nn.ModuleDict()
        self.active: str | None = "default"
        self.add_set("default", config)

    def add_set(self, name: str, config: UniAdapterConfig) -> UniAdapterSet:
        """Add a fresh set, which changes nothing yet, under ``name``; it is not made active."""
        self.sets[name] = UniAdapterSet(*self.shape, config)
        return self.sets[name]

    @property
    def active_set(self) -> UniAdapterSet | None:
        """The set that forwards use now; None for the plain backbone."""
        return None if self.active is None else self.sets[self.active]

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """Let forwards inside the block use the set ``name``; None is the plain backbone."""
        if name is not None and name not in self.sets:
            raise AuroraError(f"no adapter {name!r}{near_names(name, self.sets)}")
        before, self.active = self.active, name
        try:
            yield
        finally:
            self.active = before


class UniAdapterMlp(Mlp):
    """Feed-forward block of the ViT with a bottleneck beside it."""

    def forward(self, x: Tensor) -> Tensor:
        """As LAVIS's."""
        active = self.adapters.active_set
        return super().forward(x) if active is None else super().forward(x) + active.vision(self.index, x)


class UniAdapterLayer(RememberingLayer):
    """Layer of BERT with a bottleneck beside its feed-forward block."""

    def beside(self, query: Tensor | None, attention_output: Tensor) -> Tensor | None:
        """The bottleneck's output for f, or for t itself where no image is attended to."""
        active = self.adapters.active_set
        if active is None:
            return None
        if query is None:
            return active.text(self.index, attention_output)
        return active.fusion(self.index, query, attention_output)


def add_uniadapter(vision: VisionTransformer, texts: Sequence[BertModel], config: UniAdapterConfig) -> UniAdapters:
    """Put bottlenecks into the towers, in place; text towers share them layer by layer.

    Raises:
        AuroraError: the towers are not of one depth and width, so that no down-projection can be shared.
    """
    shapes = [(len(vision.blocks), vision.embed_dim)]
    shapes += [(len(text.encoder.layer), text.config.hidden_size) for text in texts]
    if len(set(shapes)) > 1:
        raise AuroraError(
            f"model.tuning: uniadapter shares projections between towers of one depth and width, but these have "
            f"{', '.join(f'{depth} layers of width {dim}' for depth, dim in shapes)}; use aurora or lora"
        )
    adapters = UniAdapters(*shapes[0], config)
    for i, block in enumerate(vision.blocks):
        block.mlp = _attached(retyped(UniAdapterMlp, block.mlp), adapters, i)
    for text in texts:
        for i, layer in enumerate(text.encoder.layer):
            text.encoder.layer[i] = _attached(remember_query(layer, UniAdapterLayer), adapters, i)
    return adapters


def _attached(module: nn.Module, adapters: UniAdapters, index: int) -> nn.Module:
    """``module``, reading layer ``index`` of the adapters, which are registered at the model."""
    module.__dict__.update(adapters=adapters, index=index)
    return module
