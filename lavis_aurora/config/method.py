"""The method under ``model:``: mode approximation, gate and context enhancement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

from lavis_aurora.common.errors import AuroraError, one_of, patterns, require, shown
from lavis_aurora.common.registry import Registry

# Filled by lavis_aurora.mode_approx, lavis_aurora.alignment.gate.register_gate and
# lavis_aurora.alignment.context.register_context.
APPROX_FORMS: Registry[Any] = Registry("mode_approx.form")
GATE_FORMS: Registry[Any] = Registry("gate.form")
CONTEXT_FORMS: Registry[Any] = Registry("context.form")
GATE_INITS = ("zeros", "ones")
SHARINGS = ("global", "tower")
NESTED_STEPS = ("growing", "one", "uniform")
# R of an R x R x R core: 0.5 GB.
MOST_CORE = 512


def _by_tower(layers: Any) -> bool:
    return isinstance(layers, Mapping) and set(layers) != {"last"}


def check_layers(key: str, layers: Any) -> None:
    """Refuse a choice of layers that :func:`chosen_layers` could not read, see :class:`ModeApproxConfig`."""
    if layers is None:
        return
    for part in layers.values() if _by_tower(layers) else [layers]:
        numbers = [part.get("last")] if isinstance(part, Mapping) and len(part) == 1 else part
        if not isinstance(numbers, (list, tuple)) or any(type(one) is not int or one < 0 for one in numbers):
            break
        if len(set(numbers)) < len(numbers):
            break
    else:
        if layers != {} and (not _by_tower(layers) or all(isinstance(tower, str) for tower in layers)):
            return
    raise AuroraError(
        f"{key}: {shown(layers)} cannot be used; it must be {{last: 6}}, a list of different numbers from 0, or "
        f"one of these by tower, e.g. {{visual_encoder: {{last: 6}}}}"
    )


def named_towers(layers: Any) -> list[str]:
    """The towers that a choice of layers names; none where it is one for all."""
    return list(layers) if _by_tower(layers) else []


def chosen_layers(key: str, layers: Any, tower: str, depth: int) -> set[int]:
    """Which of the ``depth`` layers of a tower are adapted, by number.

    Args:
        key: of the configuration, for messages.
        layers: what :func:`check_layers` lets pass; None is all of them, and so is a tower that it does not name.
        tower: its name, the first part of its layers' names.

    Raises:
        AuroraError: the tower has fewer layers.
    """
    choice = layers.get(tower) if _by_tower(layers) else layers
    if choice is None:
        return set(range(depth))
    last = choice["last"] if isinstance(choice, Mapping) else 0
    chosen = set(range(max(depth - last, 0), depth)) if isinstance(choice, Mapping) else set(choice)
    if last > depth or max(chosen, default=0) >= depth:
        raise AuroraError(
            f"{key}: {shown(layers)} cannot be used; {tower} has {depth} layers, 0 to {depth - 1}; towers of other "
            f"depths can be named each, e.g. {{{tower}: {{last: {min(6, depth)}}}}}"
        )
    return chosen


@dataclass
class ModeApproxConfig:
    """Mode approximation (paper 3.2, eq. 2-4).

    Attributes:
        rank: R, the number of rank-one components. The paper uses 64 and 128.
        scale: factor on the whole update; with cp the rest of the scaling follows rank and width by itself. With 8,
            the learning rate that suits the heads suits the factors. The released code has 1, with core.
        form: cp (the paper's sum of rank-one components) or core (the authors' released code: an R x R x R core
            between U and V, which all slots share, and a vector of R for each slot).
        sharing: global (one U and V for all towers, the paper) or tower (one for each, the paper's comparison in 4.4,
            with 2dr more parameters for each tower beyond the first; of targets beyond attention, one for each module
            of a layer).
        dropout: probability of dropping a feature that the update of a linear layer reads, in training; with core,
            one of the R that the core gives, as in the released code. The update is then computed beside the layer,
            which costs time and memory.
        targets: which layers are adapted: attention (query, key, value), attention_output (the projections after
            it), feed_forward (both matrices), all_linear (all of these), each also of one model's towers as
            blip2_opt/all_linear, released (the released code's: all of the vision tower of BLIP, attention of its
            text towers), or regular expressions over whole names; one or a list. null is the paper's:
            attention. Output and feed-forward matrices of these names, nd x d or d x nd, are n slots of d x d; of
            other widths, or named by a regular expression, a matrix is one slot.
        layers: which layers of each tower are adapted: {last: 6}, a list of numbers from 0 such as [6, 7], or one of
            these by tower, e.g. {visual_encoder: {last: 6}, text_encoder: []}; of towers that are left out, all. The
            gate stands in the chosen ones of the text encoder. What comes before them in the vision tower is computed
            once for model and teacher, and keeps nothing for the backward pass. null is the paper's: all.
        nested: train an adapter that can be cut to fewer components, see truncate_adapter and run.rank: steps also
            train its first components alone. Give it half as many epochs again as an adapter of one rank.
        nested_ranks: how many components those are, one of these for each such step; those below ``rank`` count, and
            run.rank compares them.
        nested_steps: what a step trains: growing (the components in use grow through nested_ranks to all in the first
            0.6 of the run; three steps of ten train fewer of them), one (from the start all components or the first
            few of them, as likely) or uniform (any number up to ``rank``).
    """

    rank: int = 64
    scale: float = 8.0
    form: str = "cp"
    sharing: str = "global"
    dropout: float = 0.0
    targets: Any = None
    layers: Any = None
    nested: bool = False
    nested_ranks: list[int] = field(default_factory=lambda: [4, 8, 16, 32])
    nested_steps: str = "growing"

    def __post_init__(self) -> None:
        one_of("mode_approx.form", self.form, APPROX_FORMS)
        if self.form != "cp" and self.nested:
            raise AuroraError(
                f"mode_approx.nested: needs mode_approx.form: cp, whose components can be told apart, not "
                f"{self.form}; leave one of the two out"
            )
        if self.form == "core":
            require(self.rank <= MOST_CORE, "mode_approx.rank", self.rank, f"at most {MOST_CORE} with form: core")
        require(1 <= self.rank <= 2**14, "mode_approx.rank", self.rank, "1 or more, and at most 16384")
        require(0 < self.scale <= 1e6, "mode_approx.scale", self.scale, "above 0, and at most 1e6")
        one_of("mode_approx.sharing", self.sharing, SHARINGS)
        require(0 <= self.dropout < 1, "mode_approx.dropout", self.dropout, "0 or more and below 1")
        ranks = self.nested_ranks
        rising = all(low < high for low, high in zip([0, *ranks], ranks))
        require(rising, "mode_approx.nested_ranks", ranks, "rising numbers of 1 or more")
        one_of("mode_approx.nested_steps", self.nested_steps, NESTED_STEPS)
        if self.nested and not self.smaller_ranks:
            raise AuroraError(
                f"mode_approx.nested_ranks: none of {shown(ranks)} is below mode_approx.rank, {self.rank}; name such "
                f"ranks, or set mode_approx.nested: false"
            )
        if self.targets is not None:
            self.targets = patterns("mode_approx.targets", self.targets)
        check_layers("mode_approx.layers", self.layers)

    @property
    def smaller_ranks(self) -> list[int]:
        """Those of ``nested_ranks`` that are below ``rank``."""
        return [rank for rank in self.nested_ranks if rank < self.rank]


@dataclass
class GateConfig:
    """Gated query transformation (paper 3.3, figure 6).

    Attributes:
        form: residual (ours; equals the backbone at step 0), convex (the paper's words), affine (the form
            in the authors' released code), none.
        init: starting value of gamma and beta. The paper finds zeros better than ones.
        decoder: of question answering, the answer decoder has gates too, as in the released code; for affine.
    """

    form: str = "residual"
    init: str = "zeros"
    decoder: bool = False

    def __post_init__(self) -> None:
        one_of("gate.form", self.form, GATE_FORMS)
        one_of("gate.init", self.init, GATE_INITS)
        if self.decoder and getattr(GATE_FORMS[self.form], "reads", None) != "positions":
            raise AuroraError(
                f"gate.decoder: not with gate.form: {self.form}, which would look ahead, or is none; set "
                f"gate.form: affine, or leave it out"
            )


@dataclass
class ContextConfig:
    """Informative context enhancement (paper 3.3, eq. 5, figure 4).

    Attributes:
        form: attention (the paper), mean, random, none; in training only. Left out, it is attention with
            ``tuning: aurora``; the other ways of tuning have none. mean_right is that of the released code, 0.1 times
            the mean for right pairs alone, by which the label shows.
    """

    form: Optional[str] = None

    def __post_init__(self) -> None:
        if self.form is not None:
            one_of("context.form", self.form, CONTEXT_FORMS)


@dataclass
class LoraConfig:
    """LoRA, a baseline (arXiv 2106.09685; the Aurora paper's tables have rank 32).

    Attributes:
        rank: of the update of each weight.
        alpha: the update is multiplied by alpha / rank.
        dropout: probability of dropping a feature that the update reads, in training.
        targets: as of mode_approx; attention and feed_forward give the paper's 10.6M parameters.
        layers: as of mode_approx.
    """

    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.0
    targets: Any = field(default_factory=lambda: ["attention", "feed_forward"])
    layers: Any = None

    def __post_init__(self) -> None:
        require(1 <= self.rank <= 2**14, "lora.rank", self.rank, "1 or more, and at most 16384")
        require(self.alpha > 0, "lora.alpha", self.alpha, "above 0")
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "0 or more and below 1")
        self.targets = patterns("lora.targets", self.targets)
        check_layers("lora.layers", self.layers)


@dataclass
class UniAdapterConfig:
    """UniAdapter, a baseline (arXiv 2302.06605; the Aurora paper's tables have ranks 128 and 512).

    Attributes:
        rank: width of the bottlenecks.
        scale: factor on their output, 0.1 as in its authors' code.
        layers: as of mode_approx, the same in all towers.
    """

    rank: int = 512
    scale: float = 0.1
    layers: Any = None

    def __post_init__(self) -> None:
        require(1 <= self.rank <= 2**14, "uniadapter.rank", self.rank, "1 or more, and at most 16384")
        require(self.scale > 0, "uniadapter.scale", self.scale, "above 0")
        check_layers("uniadapter.layers", self.layers)
        if _by_tower(self.layers):
            raise AuroraError(
                f"uniadapter.layers: {shown(self.layers)} cannot be used; towers share projections layer by "
                f"layer, so it must be {{last: 6}} or a list of numbers, for all of them"
            )
