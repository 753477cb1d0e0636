"""The momentum teacher of retrieval (LAVIS's momentum distillation), where a frozen backbone is its own copy."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_aurora.adapters.sets import MOMENTUM_SET
from lavis_aurora.encoders.fused import drops
from lavis_aurora.encoders.towers import FrozenTokens, VisualFeatures
from lavis_aurora.models import parts


class TeacherFeatures(NamedTuple):
    """Tokens of images and texts by the momentum towers, (batch, length, d), and ITC features, (batch, embed_dim)."""

    image_embeds: Tensor
    text_embeds: Tensor
    image_feat: Tensor
    text_feat: Tensor


class MomentumTeacher:
    """What LAVIS's BlipRetrieval asks of its momentum towers, by the teacher's adapter; for :class:`AuroraBase`."""

    def _teacher(
        self,
        image: Tensor,
        text: dict,
        visual: VisualFeatures,
        text_embeds: Tensor,
        frozen: FrozenTokens | None = None,
    ) -> TeacherFeatures:
        """The momentum towers' features; where a momentum tower is the tower itself, what that has computed."""
        with nullcontext() if self.adapters is None else self.adapters.use(MOMENTUM_SET):
            if not self._teacher_equals_student(self.visual_encoder):
                tower = getattr(self, "visual_encoder_m", self.visual_encoder)
                # LAVIS's teacher draws what it drops by itself, and has a tower of its own where all is trained.
                shared = tower is self.visual_encoder and frozen is not None and not frozen.drawn
                visual = parts.encode_visual_in_parts(tower, self.mini_batch_size, image, frozen if shared else None)
            if not self._teacher_equals_student(self.text_encoder):
                encoder = getattr(self, "text_encoder_m", self.text_encoder)
                text_embeds = parts.encode_text_in_parts(encoder, self.mini_batch_size, text)
        return TeacherFeatures(
            visual.tokens.detach(),
            text_embeds.detach(),
            F.normalize(self.vision_proj_m(visual.pooled), dim=-1),
            F.normalize(self.text_proj_m(text_embeds[:, 0]), dim=-1),
        )

    def _teacher_equals_student(self, tower: nn.Module) -> bool:
        """Whether its momentum copy computes exactly the same: same weights, and nothing dropped at random."""
        moving = self._momentum_moves and self.momentum > 0
        return not moving and not (tower.training and drops(tower))

    @torch.no_grad()
    def _momentum_update(self) -> None:
        """LAVIS's moving averages; what the slots share is the student's own where the configuration says so.

        Raises:
            AuroraError: another adapter than the trained one is active, or none, whose heads they would follow.
        """
        if self.adapters is not None:
            self.adapters.check_teacher()
        super()._momentum_update()
        for trained, copies in self.model_pairs:
            for own, copy in zip(trained.parameters(), copies.parameters()):
                if not own.requires_grad:
                    copy.copy_(own)  # rounding moves their average off, and no checkpoint holds it
        if self.shares_factors:
            sets = self.mode_approx
            for own, copy in zip(sets["default"].shared_parameters(), sets[MOMENTUM_SET].shared_parameters()):
                copy.copy_(own)

    def _rampup_factor(self, epoch: int, iters: int, num_iters_per_epoch: int) -> float:
        """Share of ``alpha`` at a step: it rises over the first ``alpha_epochs``; LAVIS has two."""
        return min(1.0, (epoch * num_iters_per_epoch + iters) / (self.alpha_epochs * num_iters_per_epoch))
