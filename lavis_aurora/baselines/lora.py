"""LoRA (arXiv 2106.09685), by the peft library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

from torch import Tensor, nn

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.config.method import LoraConfig
from lavis_aurora.mode_approx.inject import find_targets

FEED_FORWARD = (
    r"visual_encoder\.blocks\.\d+\.mlp\.fc[12]",
    r"text_(encoder|decoder\.bert)\.encoder\.layer\.\d+\.(intermediate|output)\.dense",
)


class LoraSet:
    """The matrices of one name over all layers, as far as a moving average needs a module."""

    def __init__(self, layers: Sequence[nn.Module], name: str, config: LoraConfig) -> None:
        self.layers, self.name, self.config = layers, name, config

    def parameters(self) -> Iterator[nn.Parameter]:
        """A and B of each layer."""
        return chain.from_iterable(
            (*layer.lora_A[self.name].parameters(), *layer.lora_B[self.name].parameters()) for layer in self.layers
        )


class LoraSets(nn.Module):
    """Named sets of LoRA matrices over the same layers, one of them active at a time.

    The matrices are parameters of peft's layers; here is what treats them as a whole.

    Args:
        layers: peft's layers by name, with the set ``default``.
        config: of that set.
    """

    def __init__(self, layers: dict[str, nn.Module], config: LoraConfig) -> None:
        super().__init__()
        # Not submodules: the layers are registered where they stand in the model.
        self.__dict__["layers"] = layers
        self.sets = {"default": LoraSet(list(layers.values()), "default", config)}

    def add_set(self, name: str, config: LoraConfig) -> LoraSet:
        """Add a fresh set under ``name``; it is not made active."""
        for layer in self.layers.values():
            layer.update_layer(name, config.rank, config.alpha, config.dropout, True, False)
        self.sets[name] = LoraSet(list(self.layers.values()), name, config)
        return self.sets[name]

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """Let forwards inside the block use the set ``name``; None is the plain backbone."""
        before = {key: layer.active_adapter for key, layer in self.layers.items()}
        for layer in self.layers.values():
            # peft's set_adapter would also change what is trained.
            layer._active_adapter = [] if name is None else name
        try:
            yield
        finally:
            for key, layer in self.layers.items():
                layer._active_adapter = before[key]

    def backbone_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A backbone's weights under the names that they have inside peft's layers."""
        moved = {f"{name}.{kind}": f"{name}.base_layer.{kind}" for name in self.layers for kind in ("weight", "bias")}
        return {moved.get(key, key): value for key, value in state.items()}

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(group, parameter) of every set."""
        for one in self.sets.values():
            for parameter in one.parameters():
                yield "LoRA A, B", parameter


def inject_lora(model: nn.Module, config: LoraConfig, attention: Sequence[str]) -> LoraSets:
    """Put LoRA on linear layers of ``model``, in place.

    Args:
        model: a BLIP.
        config: rank, alpha, dropout and which layers.
        attention: regular expressions of the attention projections' names.

    Raises:
        AuroraError: peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise AuroraError(
            f"model.tuning: lora needs the library peft ({error}); pip install 'lavis_aurora[baselines]'"
        ) from error
    patterns = {"attention": attention, "feed_forward": FEED_FORWARD}
    names = find_targets(model, [pattern for target in config.targets for pattern in patterns[target]])
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=names
    )
    peft.inject_adapter_in_model(settings, model)
    return LoraSets({name: model.get_submodule(name) for name in names}, config)
