"""LAVIS's learning rate schedules, with a warm-up of any length."""

from __future__ import annotations

import logging

from lavis.common.optims import LinearWarmupCosineLRScheduler, LinearWarmupStepLRScheduler

WITH_WARMUP = (LinearWarmupCosineLRScheduler, LinearWarmupStepLRScheduler)


class LongWarmup:
    """One of LAVIS's schedules, whose warm-up goes on beyond the first epoch; LAVIS would cut it off there.

    At batch n of the run, from 0, in epoch e,

        lr = min(warmup_lr + (init_lr - warmup_lr) * n / warmup_steps, LAVIS's of epoch e)

    Args:
        schedule: of LAVIS.
        batches: of an epoch.
    """

    def __init__(self, schedule: LinearWarmupCosineLRScheduler | LinearWarmupStepLRScheduler, batches: int) -> None:
        self.schedule, self.batches = schedule, batches
        if schedule.warmup_steps > batches * schedule.max_epoch:
            logging.warning(
                "run.warmup_steps: %d are more than the %d batches of the run; it never reaches run.init_lr",
                schedule.warmup_steps,
                batches * schedule.max_epoch,
            )

    def step(self, cur_epoch: int, cur_step: int) -> None:
        """Set the rate of a batch of an epoch, both from 0."""
        groups, done = self.schedule.optimizer.param_groups, cur_epoch * self.batches + cur_step
        self.schedule.step(cur_epoch=cur_epoch, cur_step=cur_step)
        if cur_epoch == 0 or done >= self.schedule.warmup_steps:
            return
        rates = [group["lr"] for group in groups]
        # What LAVIS would set, were all batches in its first epoch.
        self.schedule.step(cur_epoch=0, cur_step=done)
        for group, rate in zip(groups, rates):
            group["lr"] = min(group["lr"], rate)
