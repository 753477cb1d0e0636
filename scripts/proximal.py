r"""Train as train.py does, with a proximal penalty that shortens an adapter's components: one way to order them.

    python scripts/proximal.py --penalty 2.65 --cfg-path projects/aurora/demo_ret.yaml \
        --options run.output_dir=output/proximal

An alternative to ``model.mode_approx.nested`` that ``nested.py --methods proximal`` measures. With s, U, V and P
normalised into lambda, the column lambda_r over the slots is as long as the component r, all slots together; after
each step of the optimizer at a rate eta all columns are shortened by eta * penalty, to zero at the least. That is the
proximal step of a group lasso on the columns of lambda. Those that the task needs least are to end as the shortest.
The penalty is in the log and in no setting: a run that goes on must be given the same.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Optional

import lavis_aurora_compat  # noqa: F401

import torch
from lavis.common.registry import registry
from torch import Tensor
from torch.optim import Optimizer

from lavis_aurora.adapters.switching import find_adapters
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.mode_approx.factors import FactorSet, ModeFactors
from lavis_aurora.training.runner import AuroraRunner
from lavis_aurora_cli import train
from lavis_aurora_commands import add_options

PENALTY = 2.65


def component_sizes(factors: FactorSet, slots: Mapping[str, tuple[int, int]]) -> Tensor:
    """Frobenius norm of each component of an update, all slots together; shape (rank,).

    Args:
        factors: of the slots.
        slots: (d_in, d_out) of each, in order.
    """
    squares = []
    for k, (d_in, d_out) in enumerate(slots.values()):
        u, v, weights = factors.parts([k], d_in, d_out)
        squares.append(weights[0].square() * u.square().sum(0) * v.square().sum(0))
    return torch.stack(squares).sum(0).sqrt()


@torch.no_grad()
def shorten(factors: FactorSet, slots: Mapping[str, tuple[int, int]], by: float) -> None:
    """Make all components shorter ``by`` so much, or zero; V alone changes, which starts at zero and comes back."""
    sizes = component_sizes(factors, slots)
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
            sets = find_adapters(self._model)
            if not isinstance(sets, ModeFactors) or not sets["default"].separable or sets["default"].config.nested:
                raise AuroraError("proximal.py: needs model.tuning aurora with mode_approx.form cp, not nested")
            factors, slots = sets["default"], sets.slots
            v = {id(one) for one in factors.V.values()}
            [group] = [one for one in optimizer.param_groups if v <= {id(p) for p in one["params"]}]

            def after_step(*_: Any) -> None:
                shorten(factors, slots, group["lr"] * self.penalty)

            optimizer.register_step_post_hook(after_step)
            logging.info("proximal penalty %g", self.penalty)
        return optimizer


def _penalty(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be 0 or more, and finite")
    return value


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Take the penalty, and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cfg-path", required=True, metavar="YAML", help="a project")
    parser.add_argument("--penalty", type=_penalty, default=PENALTY, help="default: %(default)s")
    add_options(parser)
    args = parser.parse_args(argv)
    ProximalRunner.penalty = args.penalty
    train(["--cfg-path", args.cfg_path, "--options", *(args.options or []), "run.runner=runner_proximal"])


if __name__ == "__main__":
    main()
