r"""Train as train.py does, with a proximal penalty that shortens an adapter's components: one way to order them.

    python scripts/proximal.py --penalty 3 --cfg-path projects/aurora/demo_ret.yaml \
        --options run.output_dir=output/proximal

An alternative to ``model.mode_approx.nested`` that ``nested.py --methods proximal`` measures. With U, V and P
normalised into lambda, the column lambda_r over the slots is as long as the component r, all slots together; after
each step of the optimizer at a rate eta all columns are shortened by eta * penalty, to zero at the least. That is the
proximal step of a group lasso on the columns of lambda. Those that the task needs least are to end as the shortest.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Optional

import torch
from lavis.common.registry import registry
from torch import Tensor
from torch.optim import Optimizer

from lavis_aurora.adapters.switching import find_adapters
from lavis_aurora.mode_approx.factors import FactorSet, ModeFactors
from lavis_aurora.training.runner import AuroraRunner
from lavis_aurora_cli import train

PENALTY = 3.0


def component_sizes(factors: Mapping[str, Tensor], slots: Iterable[tuple[int, int]]) -> Tensor:
    """Frobenius norm of each component of an update, over all slots: the lengths of lambda's columns, normalised.

    Args:
        factors: U and V, one of each width, P and the coefficients by their names in a FactorSet, without s.
        slots: (d_in, d_out) of each slot, in order.

    Returns:
        shape (rank,).
    """
    weights = (factors["coefficients"] * factors["P"]).square()
    shapes = [(factors[f"U.{d_in}"], factors[f"V.{d_out}"]) for d_in, d_out in slots]
    return sum(w * u.square().sum(0) * v.square().sum(0) for w, (u, v) in zip(weights, shapes)).sqrt()


@torch.no_grad()
def shorten(factors: FactorSet, slots: Iterable[tuple[int, int]], by: float) -> None:
    """Make all components shorter ``by`` so much, or zero; V alone changes, which starts at zero and comes back."""
    sizes = component_sizes(dict(factors.named_parameters()), slots)
    kept = (1 - by / sizes.clamp(min=torch.finfo(sizes.dtype).tiny)).clamp(min=0)
    for v in factors.V.values():
        v.mul_(kept)


@registry.register_runner("runner_proximal")
class ProximalRunner(AuroraRunner):
    """Shortens all components after each step of the optimizer.

    Attributes:
        penalty: in units of :func:`component_sizes`, by which they are shortened at a rate of 1.
    """

    penalty: ClassVar[float] = PENALTY

    @property
    def optimizer(self) -> Optimizer:
        made = self._optimizer is None
        optimizer = super().optimizer
        if made:
            optimizer.register_step_post_hook(self._shorten)
        return optimizer

    def _shorten(self, optimizer: Optimizer, *_: Any) -> None:
        sets = find_adapters(self._model)
        assert isinstance(sets, ModeFactors)
        rate = optimizer.param_groups[0]["lr"]
        shorten(sets["default"], sets.slots.values(), rate * self.penalty)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Take the penalty, and train with the other arguments, ``--options`` last."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--penalty", type=float, default=PENALTY)
    args, rest = parser.parse_known_args(argv)
    ProximalRunner.penalty = args.penalty
    train([*rest, *([] if "--options" in rest else ["--options"]), "run.runner=runner_proximal"])


if __name__ == "__main__":
    main()
