"""Image-text retrieval: LAVIS's blip_retrieval with a frozen backbone and Aurora's few parameters."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from lavis.common.dist_utils import is_dist_avail_and_initialized
from lavis.common.registry import registry
from lavis.models.blip_models.blip_outputs import BlipIntermediateOutput, BlipOutput, BlipSimilarity
from lavis.models.blip_models.blip_retrieval import BlipRetrieval
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions as Encoded

from lavis_aurora.adapters.merging import merged_weights
from lavis_aurora.adapters.sets import MOMENTUM_SET
from lavis_aurora.alignment.context import enhance_context
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.paths import package_file
from lavis_aurora.config.models import RetrievalAuroraConfig
from lavis_aurora.encoders.fused import itm_context, share_image_kv
from lavis_aurora.encoders.towers import (
    build_text_encoder,
    build_tokenizer,
    build_vision_encoder,
    check_vocabulary,
    visual_input,
)
from lavis_aurora.mode_approx.presets import PRESETS
from lavis_aurora.models import parts
from lavis_aurora.models.base import AuroraBase
from lavis_aurora.models.matching import broadcast_seed, gather, sample_hard_negatives
from lavis_aurora.models.scoring import RetrievalScoring
from lavis_aurora.models.teacher import MomentumTeacher, TeacherFeatures


@registry.register_model("blip_retrieval_aurora")
class BlipRetrievalAurora(MomentumTeacher, RetrievalScoring, AuroraBase, BlipRetrieval):
    """BLIP retrieval model tuned by Aurora (paper 3.2, 3.3).

    Supported model types:
        - base: BLIP base, pretrained on 129M pairs, 384 px (the paper's backbone; default).
        - large: BLIP large.
        - coco: BLIP base fine-tuned on COCO (Karpathy split), as LAVIS's blip_retrieval coco.
        - flickr: BLIP base fine-tuned on Flickr30K.
        - tiny: a BLIP of 1.6M weights that comes with this package, for the demo and for tests.

    Examples:
        >>> from lavis_aurora import load_model_and_preprocess
        >>> model, vis, txt = load_model_and_preprocess("blip_retrieval_aurora", "tiny")
        >>> scores = model.match(vis["eval"](picture).unsqueeze(0), ["a circle", "a star"])
        >>> scores.itm  # probabilities of a match, (pictures, texts); scores.itc: cosine similarities
    """

    CONFIG_CLASS = RetrievalAuroraConfig
    DEFAULT_MODEL_TYPE = "base"
    TRAINING_KEYS = ("text_input", "image_id", "epoch", "iters", "num_iters_per_epoch")
    WITHOUT_TRAINING = "to score pictures and texts use model.match"
    PRETRAINED_MODEL_CONFIG_DICT = {
        name: package_file(f"configs/models/blip_retrieval_aurora_{name}.yaml")
        for name in ("base", "large", "coco", "flickr", "tiny")
    }

    def __init__(self, cfg: RetrievalAuroraConfig) -> None:
        vision = build_vision_encoder(cfg)
        text = build_text_encoder(cfg, vision.vision_width)
        share_image_kv(text)
        # LAVIS calls this class method in its constructor, without telling it the tokenizer's name.
        self.init_tokenizer = partial(build_tokenizer, cfg.tokenizer)
        super().__init__(
            image_encoder=vision,
            text_encoder=text,
            queue_size=cfg.queue_size,
            alpha=cfg.alpha,
            embed_dim=cfg.embed_dim,
            momentum=cfg.momentum,
            negative_all_rank=cfg.negative_all_rank,
            max_txt_len=cfg.max_txt_len,
        )
        del self.init_tokenizer
        check_vocabulary(self.tokenizer, text.config.vocab_size, cfg)
        self.context_form = cfg.context.form
        self.mini_batch_size = cfg.mini_batch_size
        self._negative_seed: int | None = None
        if cfg.tuning != "full":
            # The backbone is frozen: its moving average is itself.
            del self.visual_encoder_m, self.text_encoder_m
            self.model_pairs = [[self.vision_proj, self.vision_proj_m], [self.text_proj, self.text_proj_m]]
        self.set_up_tuning(cfg, PRESETS["blip_retrieval_aurora"], self.text_encoder)
        if not cfg.train_temp:
            self.temp.requires_grad_(False)
        if not cfg.train_text_proj:
            self.text_proj.requires_grad_(False)
        self.alpha_epochs = cfg.alpha_epochs
        self.shares_factors = cfg.teacher_factors == "student"
        if self.adapters is not None:
            self.model_pairs.append(self.adapters.add_teacher())
        # Besides the two projections.
        self._momentum_moves = len(self.model_pairs) > 2
        self.copy_params()

    @property
    def heads(self) -> list[nn.Module | nn.Parameter]:
        """What ``train_heads`` trains besides the adapter."""
        return [self.vision_proj, self.text_proj, self.itm_head, self.temp]

    def queues(self) -> dict[str, Tensor]:
        """LAVIS's queues; none if their size is 0."""
        names = ("image_queue", "text_queue", "idx_queue", "queue_ptr")
        return {name: getattr(self, name) for name in names} if self.queue_size else {}

    def complete_merged_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A merged state with LAVIS's momentum towers: W0 + dW of the teacher's factors.

        The teacher is that of ``default``. Of an adapter beside it momentum starts anew, as a copy.
        """
        state = super().complete_merged_state(state)
        teacher, copied = state, ["visual_encoder", "text_encoder", "vision_proj", "text_proj"]
        if self.adapters.active == "default":
            teacher, copied = {**state, **merged_weights(self, MOMENTUM_SET)}, copied[:2]
        copies = {
            f"{part}_m{key[len(part) :]}": value
            for key, value in teacher.items()
            for part in copied
            if key.startswith(f"{part}.")
        }
        return {**state, **copies}

    @torch.no_grad()
    def _dequeue_and_enqueue(self, image_feat: Tensor, text_feat: Tensor, idxs: Tensor) -> None:
        """Replace the oldest entries of the queue; at its end it wraps around."""
        if self.queue_size == 0:
            return
        count = image_feat.shape[0]
        if count > self.queue_size:
            raise AuroraError(
                f"model.queue_size: {self.queue_size} is less than the {count} samples of a step over all "
                f"processes; make the queue larger, the batch smaller, or set 0 for no queue"
            )
        places = (self.queue_ptr + torch.arange(count, device=image_feat.device)) % self.queue_size
        # One batch with NaN must not spoil the steps after it.
        self.image_queue[:, places] = image_feat.t().to(self.image_queue.dtype).nan_to_num()
        self.text_queue[:, places] = text_feat.t().to(self.text_queue.dtype).nan_to_num()
        self.idx_queue[:, places] = idxs.t()
        self.queue_ptr.copy_((self.queue_ptr + count) % self.queue_size)

    def forward(self, samples: dict) -> BlipOutput:
        """ITC with momentum distillation and queues, ITM with hard negatives.

        Args:
            samples: ``image`` (batch, 3, height, width) or ``video`` (batch, 3, frames, height, width),
                ``text_input`` (list of str), ``image_id`` (batch,), ``epoch``, ``iters``, ``num_iters_per_epoch``,
                as for LAVIS's blip_retrieval.

        Returns:
            ``loss``, ``loss_itc``, ``loss_itm`` and LAVIS's further fields.

        Raises:
            AuroraError: samples lack one of these.
        """
        self.check_trained()
        self.check_samples(samples)
        image, idx = visual_input(samples), samples["image_id"].view(-1, 1)
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
        # Processes exchange texts, which must then be of one length.
        texts = samples["text_input"]
        text = self.tokenize(texts, pad_to_longest=True, everywhere=self._gathers, device=image.device)
        with parts.recomputed_activations(self):
            # What no tuning reaches is computed once, for model and teacher.
            size = self.mini_batch_size
            frozen = parts.frozen_tokens_in_parts(self.visual_encoder, size, image)
            visual = parts.encode_visual_in_parts(self.visual_encoder, size, image, frozen)
            image_embeds = visual.tokens
            text_embeds = parts.encode_text_in_parts(self.text_encoder, size, text)
            image_feat = F.normalize(self.vision_proj(visual.pooled), dim=-1)
            text_feat = F.normalize(self.text_proj(text_embeds[:, 0]), dim=-1)
            with torch.no_grad():
                self._momentum_update()
                teacher = self._teacher(image, text, visual, text_embeds, frozen)
            loss_itc, sims = self._itc_loss(samples, teacher, image_feat, text_feat, idx)
            loss_itm, matching = self._itm_loss(
                image_embeds, text, text_embeds[:, 0], image_feat, text_feat, idx, self._step(samples)
            )
        return BlipOutput(
            loss=loss_itc + loss_itm,
            loss_itc=loss_itc,
            loss_itm=loss_itm,
            sims=sims,
            intermediate_output=BlipIntermediateOutput(
                image_embeds=image_embeds,
                image_embeds_m=teacher.image_embeds,
                text_embeds=text_embeds,
                text_embeds_m=teacher.text_embeds,
                **matching,
            ),
        )

    @property
    def _gathers(self) -> bool:
        """Whether negatives come from all processes."""
        return self.negative_all_rank and is_dist_avail_and_initialized()

    @staticmethod
    def _step(samples: dict) -> int:
        return samples["epoch"] * samples["num_iters_per_epoch"] + samples["iters"]

    def _itc_loss(
        self, samples: dict, teacher: TeacherFeatures, image_feat: Tensor, text_feat: Tensor, idx: Tensor
    ) -> tuple[Tensor, BlipSimilarity]:
        """ITC against the teacher's features of the batch over all processes and of the queue.

        In one process this is LAVIS's loss. In several, LAVIS and BLIP compare with the process's own batch and the
        queue; here with the whole batch, so that it is the loss of one process that has it all.
        """
        ramp = self._rampup_factor(samples["epoch"], samples["iters"], samples["num_iters_per_epoch"])
        alpha = self.alpha * ramp
        with torch.no_grad():
            image_m, text_m = teacher.image_feat, teacher.text_feat
            image_world, text_world, idx_world = map(gather, (image_m, text_m, idx))
            image_all = torch.cat([image_world.t(), self.image_queue], dim=1)
            text_all = torch.cat([text_world.t(), self.text_queue], dim=1)
            same = torch.eq(idx, torch.cat([idx_world.t(), self.idx_queue], dim=1)).float()
            hard = same / same.sum(1, keepdim=True)
            sim_i2t_m, sim_t2i_m = image_m @ text_all / self.temp, text_m @ image_all / self.temp
            targets = [alpha * F.softmax(sim, dim=1) + (1 - alpha) * hard for sim in (sim_i2t_m, sim_t2i_m)]
        sim_i2t, sim_t2i = image_feat @ text_all / self.temp, text_feat @ image_all / self.temp
        losses = [
            -(F.log_softmax(sim, dim=1) * target).sum(dim=1).mean()
            for sim, target in zip((sim_i2t, sim_t2i), targets)
        ]
        self._dequeue_and_enqueue(image_world, text_world, idx_world)
        sims = BlipSimilarity(
            sim_i2t=sim_i2t,
            sim_t2i=sim_t2i,
            sim_i2t_m=sim_i2t_m,
            sim_t2i_m=sim_t2i_m,
            sim_i2t_targets=targets[0],
            sim_t2i_targets=targets[1],
        )
        return sum(losses) / 2, sims

    def _itm_loss(
        self,
        image_embeds: Tensor,
        text: dict,
        queries: Tensor,
        image_feat: Tensor,
        text_feat: Tensor,
        idx: Tensor,
        step: int,
    ) -> tuple[Tensor, dict]:
        """ITM over each pair, its hardest images and its hardest texts, with the context enhancement."""
        world = gather if self._gathers else (lambda tensor: tensor)
        ids, mask = text.input_ids.clone(), text.attention_mask
        ids[:, 0] = self.tokenizer.enc_token_id
        if self._negative_seed is None:
            self._negative_seed = broadcast_seed(ids.device)
        generator = torch.Generator(ids.device).manual_seed(self._negative_seed + step)
        with torch.no_grad():
            same = torch.eq(idx, world(idx).t())
            sim_t2i, sim_i2t = text_feat @ world(image_feat).t(), image_feat @ world(text_feat).t()
            negative_image, has_image = sample_hard_negatives(sim_t2i / self.temp, same, generator)
            negative_text, has_text = sample_hard_negatives(sim_i2t / self.temp, same, generator)
        wrong_images = gather(image_embeds, with_grad=True) if self._gathers else image_embeds
        # Rows: the pairs as they are; each text with a wrong image; each image with a wrong text.
        batch = (image_embeds, ids, mask, negative_image, world(ids)[negative_text], world(mask)[negative_text])
        compute = self._matching_passes
        tokens = torch.cat(parts.compute_in_parts(compute, self.mini_batch_size, *batch, whole=(wrong_images,)))
        fused = tokens[:, 0]
        if self.training and self.context_form != "none":
            # Also the texts of the other processes are context, as if the batch were in one.
            fused = enhance_context(fused, gather(queries, with_grad=True), self.context_form, len(ids))
        logits = self.itm_head(fused)
        count = len(ids)
        labels = torch.cat([torch.ones_like(idx[:, 0]), torch.zeros_like(idx[:, 0]).repeat(2)])
        # A pair without any true negative in the batch has none to learn from.
        weight = torch.cat([torch.ones_like(has_image), has_image, has_text]).to(logits.dtype)
        loss = (F.cross_entropy(logits, labels, reduction="none") * weight).sum() / weight.sum()
        first, rest = (Encoded(last_hidden_state=rows) for rows in tokens.split([count, 2 * count]))
        outputs = {"itm_logits": logits, "itm_labels": labels, "encoder_output": first, "encoder_output_neg": rest}
        return loss, outputs

    def _matching_passes(
        self,
        images: Tensor,
        ids: Tensor,
        mask: Tensor,
        negative_image: Tensor,
        wrong_ids: Tensor,
        wrong_mask: Tensor,
        wrong_images: Tensor,
    ) -> list[Tensor]:
        """Tokens of pairs, of their texts with wrong images, and of their images with wrong texts.

        Args:
            images: tokens of the pairs' images, (pairs, keys, d).
            ids, mask: of their texts, (pairs, length); ``wrong_ids`` and ``wrong_mask`` of a wrong text for each.
            negative_image: rows of ``wrong_images``, one for each pair.
            wrong_images: tokens of the images of the whole batch, the same tensor as ``images`` where that is all.

        Returns:
            Three tensors, (pairs, length, d).
        """
        wrong_image = negative_image if wrong_images is images else None
        if wrong_image is None:
            images = torch.cat([images, wrong_images[negative_image]])
        with itm_context(self.text_encoder, wrong_image):
            output = self.text_encoder(
                torch.cat([ids, ids, wrong_ids]),
                attention_mask=torch.cat([mask, mask, wrong_mask]),
                encoder_hidden_states=images,
                encoder_attention_mask=torch.ones(images.shape[:-1], dtype=torch.long, device=ids.device),
                return_dict=True,
            )
        return list(output.last_hidden_state.chunk(3))
