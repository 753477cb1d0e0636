"""The baselines under ``model:``: LoRA and UniAdapter."""

from __future__ import annotations

from dataclasses import dataclass, field

from lavis_aurora.config.rules import one_of, require

LORA_TARGETS = ("attention", "feed_forward")


@dataclass
class LoraConfig:
    """LoRA, a baseline (arXiv 2106.09685; the Aurora paper's tables have rank 32).

    Attributes:
        rank: of the update of each weight.
        alpha: the update is multiplied by alpha / rank.
        dropout: probability of dropping a feature that the update reads, in training.
        targets: attention (query, key, value), feed_forward, or both, which gives the paper's 10.6M parameters.
    """

    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: list(LORA_TARGETS))

    def __post_init__(self) -> None:
        require(self.rank >= 1, "lora.rank", self.rank, "1 or more")
        require(self.alpha > 0, "lora.alpha", self.alpha, "above 0")
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "0 or more and below 1")
        require(bool(self.targets), "lora.targets", self.targets, f"some of {', '.join(LORA_TARGETS)}")
        for target in self.targets:
            one_of("lora.targets", target, LORA_TARGETS)


@dataclass
class UniAdapterConfig:
    """UniAdapter, a baseline (arXiv 2302.06605; the Aurora paper's tables have ranks 128 and 512).

    Attributes:
        rank: width of the bottlenecks.
        scale: factor on their output, 0.1 as in its authors' code.
    """

    rank: int = 512
    scale: float = 0.1

    def __post_init__(self) -> None:
        require(self.rank >= 1, "uniadapter.rank", self.rank, "1 or more")
        require(self.scale > 0, "uniadapter.scale", self.scale, "above 0")
