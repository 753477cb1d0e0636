"""Batches and steps of the tiny retrieval model, in one process and in two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from tiny import activate, tiny_model
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel

from lavis_aurora.models import parts
from lavis_aurora.models.blip_retrieval_aurora import BlipRetrievalAurora

CAPTIONS = ["a red circle", "a big blue square and a small star", "a ring", "a small pink heart", "a bar"]


def batch(size: int = 5, step: int = 0, ids: list[int] | None = None) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {
        "image": torch.randn(size, 3, 48, 48, generator=generator),
        "text_input": CAPTIONS[:size],
        "image_id": torch.tensor(ids or list(range(size))),
        "epoch": 0,
        "iters": step,
        "num_iters_per_epoch": 10,
    }


def train_steps(model, steps: int = 3) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        model(batch(step=step))["loss"].backward()
        optimizer.step()


def model_and_batch(tuning: str, rows: slice, **overrides):
    torch.manual_seed(0)
    model = activate(tiny_model(tuning=tuning, queue_size=6, alpha=0.4, **overrides)).train()
    image = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(5))
    samples = {
        "image": image[rows],
        "text_input": CAPTIONS[:4][rows],
        "image_id": torch.arange(4)[rows],
        "epoch": 1,
        "iters": 3,
        "num_iters_per_epoch": 10,
    }
    return model, samples


def distinct_model(**changes) -> BlipRetrievalAurora:
    """Random weights whose scores differ by much more than the tolerance."""
    model = tiny_model(**changes)
    with torch.no_grad():
        for head in (model.vision_proj, model.text_proj, model.itm_head):
            torch.nn.init.normal_(head.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    return model


@torch.no_grad()
def plain_scores(model: BlipRetrievalAurora, image: Tensor, text: str) -> tuple[Tensor, Tensor]:
    """ITC and ITM logits of one picture, or of one video as all its frames' tokens, by LAVIS's forward."""
    frames = image.unsqueeze(0) if image.dim() == 3 else image.transpose(0, 1)
    tokens = model.visual_encoder.forward_features(frames)
    image_feat = F.normalize(model.vision_proj(tokens[:, 0].mean(dim=0)), dim=-1)
    tokens = tokens.flatten(0, 1).unsqueeze(0)
    ids = model.tokenizer(text, truncation=True, max_length=35, return_tensors="pt")
    text_feat = F.normalize(model.text_proj(model.text_encoder.forward_text(ids).last_hidden_state[0, 0]), dim=-1)
    ids.input_ids[:, 0] = model.tokenizer.enc_token_id
    fused = model.text_encoder(
        ids.input_ids,
        attention_mask=ids.attention_mask,
        encoder_hidden_states=tokens,
        encoder_attention_mask=torch.ones(tokens.shape[:-1], dtype=torch.long),
        return_dict=True,
    )
    return image_feat @ text_feat, model.itm_head(fused.last_hidden_state[0, 0])


@contextmanager
def saved_for_backward() -> Iterator[list[Tensor]]:
    """What is kept inside the block for the backward pass, by torch or by the models' own hooks in place of these."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    own = parts.SavedTensor.of
    with pytest.MonkeyPatch.context() as patch, saved_tensors_hooks(keep, lambda tensor: tensor):
        patch.setattr(parts.SavedTensor, "of", lambda tensor: own(keep(tensor)))
        yield kept


def kept_bytes(tensors: list[Tensor], *without: torch.nn.Module) -> int:
    """Of the memory behind tensors, each counted once, without that of the modules' parameters."""
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    own = {parameter.untyped_storage().data_ptr() for module in without for parameter in module.parameters()}
    return sum(size for place, size in sizes.items() if place not in own)


def step(model, samples, module) -> tuple[dict, dict, torch.Tensor]:
    output = model(samples)
    output["loss"].backward()
    grads = {n: p.grad.numpy() for n, p in module.named_parameters() if p.grad is not None}
    losses = {k: output[k].item() for k in ("loss_itc", "loss_itm")}
    return losses, grads, module.idx_queue.numpy()


def half(rank: int, tuning: str):
    model, samples = model_and_batch(tuning, slice(rank, None, 2))
    return step(DistributedDataParallel(model, broadcast_buffers=False), samples, model)
