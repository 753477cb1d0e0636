"""First step of the demo's pretraining: the tiny ViT learns to name what is in each cell of clean pictures.

    python scripts/pretrain_tiny_vision.py                # about two minutes, into output/tiny_vision.pth
    python train.py --cfg-path projects/aurora/demo_pretrain.yaml

BLIP too starts from a ViT that has learned to classify, on ImageNet. From captions alone the tiny one learns colors
and backgrounds, but in an hour no shapes. The file holds a whole BLIP: this ViT, and all else at random.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import lavis_aurora_compat  # noqa: F401

import numpy as np
import torch
import torch.nn.functional as F
from lavis.common.registry import registry
from omegaconf import OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from lavis_aurora.common.files import atomic_write
from lavis_aurora.demo.pictures import render
from lavis_aurora.demo.scenes import Scene, domain_of, iter_scenes
from lavis_aurora.models.loading import load_preprocess

ARCH = "blip_retrieval_aurora"
CELLS = 9
PROPERTIES = ("shape", "color", "size")


def classes_of(scenes: list[Scene], words: dict[str, list[str]]) -> Tensor:
    """Shape, color and size in each cell, (pictures, CELLS, 3): from 1 in the domain's order, 0 where it is empty."""
    classes = torch.zeros((len(scenes), CELLS, len(PROPERTIES)), dtype=torch.long)
    for row, scene in zip(classes, scenes):
        for shape in scene.shapes:
            row[shape.cell] = torch.tensor([words[name].index(getattr(shape, name)) + 1 for name in PROPERTIES])
    return classes


class Naming(nn.Module):
    """Linear readings of a ViT's tokens: each patch tells its cell and what that holds, [CLS] what all cells hold
    and what the background is."""

    def __init__(self, width: int, sizes: list[int], backgrounds: int) -> None:
        super().__init__()
        self.of_patch = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        self.of_all = nn.ModuleList(nn.Linear(width, CELLS * size) for size in sizes)
        self.place = nn.Linear(width, CELLS)
        self.background = nn.Linear(width, backgrounds)

    def forward(self, tokens: Tensor, classes: Tensor, backgrounds: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, and the shares of right shapes by patches and by [CLS]; the ViT has a patch for each cell."""
        patches, pooled = tokens[:, 1:], tokens[:, 0]
        place = torch.arange(CELLS).expand(len(tokens), CELLS)
        loss = F.cross_entropy(self.place(patches).flatten(0, 1), place.flatten())
        loss = loss + F.cross_entropy(self.background(pooled), backgrounds)
        right, shown = [], classes[..., 0] > 0
        for i, (patch, whole) in enumerate(zip(self.of_patch, self.of_all)):
            for logits in (patch(patches), whole(pooled).view(len(tokens), CELLS, -1)):
                loss = loss + F.cross_entropy(logits.flatten(0, 1), classes[..., i].flatten())
                if i == 0:
                    right.append((logits.argmax(-1) == classes[..., i])[shown].float().mean())
        return loss, torch.stack(right)


def train(vision: nn.Module, naming: Naming, pictures: Tensor, truth: list[Tensor], steps: int, batch: int) -> Tensor:
    """AdamW on random batches; returns the shares of right shapes in the last one, (2,)."""
    parameters = [*vision.parameters(), *naming.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    progress = tqdm(range(steps), unit="step")
    for _ in progress:
        chosen = torch.randint(len(pictures), (batch,))
        loss, right = naming(vision(pictures[chosen]), *(labels[chosen] for labels in truth))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        patch, whole = right.tolist()
        progress.set_postfix(loss=f"{loss.item():.3f}", shapes=f"{patch:.0%}, by [CLS] {whole:.0%}", refresh=False)
    return right


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="of 64 pictures (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=6000, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("output/tiny_vision.pth"), help="default: %(default)s")
    args = parser.parse_args()
    torch.manual_seed(0)
    model_class = registry.get_model_class(ARCH)
    cfg = OmegaConf.load(model_class.default_config_path("tiny"))
    model = model_class.from_config(OmegaConf.merge(cfg.model, {"pretrained": None, "tuning": "full"}))
    processor = load_preprocess(cfg.preprocess)[0]["eval"]
    domain, rng = domain_of("clean"), np.random.default_rng(0)
    scenes = list(islice(iter_scenes("clean", "train", 0), args.pictures))
    drawn = tqdm(scenes, desc="drawing", unit="picture")
    pictures = torch.stack([processor(render(scene, domain, rng)) for scene in drawn])
    words = {"shape": [*domain.shapes], "color": [*domain.colors], "size": [*domain.sizes]}
    naming = Naming(cfg.model.vit.embed_dim, [len(words[name]) + 1 for name in PROPERTIES], len(domain.backgrounds))
    backgrounds = torch.tensor([[*domain.backgrounds].index(scene.background) for scene in scenes])
    model.train()
    truth = [classes_of(scenes, words), backgrounds]
    right = train(model.visual_encoder, naming, pictures, truth, args.steps, batch=64)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.output) as file:
        torch.save(model.state_dict(), file)
    print(f"shapes named in the last batch: {right[0]:.0%} by patches, {right[1]:.0%} by [CLS]; {args.output}")


if __name__ == "__main__":
    main()
