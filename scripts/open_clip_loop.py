"""Tune a model of OpenCLIP on captioned pictures with mode approximation: a plain loop to copy from.

    python scripts/open_clip_loop.py output/open_clip
    python scripts/open_clip_loop.py output/open_clip --model ViT-B-32 --pretrained laion2b_s34b_b79k \
        --train train.json --test test.json --images pictures

Files of pairs are those of LAVIS: [{"image": "a.jpg", "caption": "a red ring"}, ...]. Without a model a small one is
made, trained as a whole on the demo's clean pictures, in place of weights that are downloaded; without files it is
tuned on the demo's pictures of another look. Prints recall before, after, loaded again, and of the merged weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import open_clip
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lavis_aurora import (
    ModeApproxConfig,
    inject_mode_approx,
    load_adapter,
    merged_state_dict,
    save_adapter,
    trainable_parameters_summary,
)
from lavis_aurora.common.media import load_picture
from lavis_aurora.demo.pictures import generate_pictures

TINY = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 64, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 40, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
}


class Pairs(Dataset):
    """(picture, tokens) of each row of a file."""

    def __init__(self, path: Path, images: Path, preprocess: Any, tokenizer: Any) -> None:
        self.rows = json.loads(path.read_text(encoding="utf-8"))
        self.images, self.preprocess, self.tokenizer = images, preprocess, tokenizer

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = self.rows[index]
        caption = row["caption"] if isinstance(row["caption"], str) else row["caption"][0]
        return self.preprocess(load_picture(self.images / row["image"])), self.tokenizer(caption)[0]


def train(model: nn.Module, pairs: Dataset | list[Any], epochs: int, batch: int, lr: float) -> None:
    """Minimize OpenCLIP's contrastive loss over whatever is trainable."""
    loader = DataLoader(pairs, min(batch, len(pairs)), shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    loss_of = open_clip.ClipLoss()
    for epoch in range(epochs):
        total = 0.0
        for images, tokens in loader:
            loss = loss_of(*model.train()(images, tokens)[:3])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch}: loss {total / len(loader):.3f}")


@torch.no_grad()
def recall(model: nn.Module, pairs: Dataset | list[Any]) -> str:
    """R@1 and R@5 of both directions, percent, where each picture has one caption."""
    parts = [model.eval()(images, tokens)[:2] for images, tokens in DataLoader(pairs, 64)]
    scores = torch.cat([part[0] for part in parts]) @ torch.cat([part[1] for part in parts]).t()
    found = []
    for name, one in (("image-to-text", scores), ("text-to-image", scores.t())):
        place = (one >= one.diagonal()[:, None]).sum(dim=1) - 1  # of equals the right one is the last
        found.append(f"{name} R@1 {100 * (place < 1).float().mean():.1f} R@5 {100 * (place < 5).float().mean():.1f}")
    return ", ".join(found)


def tune(args: argparse.Namespace, name: str, pretrained: str, files: tuple[Path, Path], images: Path) -> None:
    """Adapt, train, save; load into a fresh model; merge, and load that as weights of OpenCLIP."""
    config = ModeApproxConfig(rank=args.rank, targets=args.targets)
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained)
    tokenizer = open_clip.get_tokenizer(name)
    pairs, test = (Pairs(path, images, preprocess, tokenizer) for path in files)
    print("before:", recall(model, test))
    inject_mode_approx(model, config)
    print(trainable_parameters_summary(model))
    train(model, pairs, args.epochs, args.batch_size, args.lr)
    print("after:", recall(model, test))

    save_adapter(model, args.output / "adapter")
    fresh, _, _ = open_clip.create_model_and_transforms(name, pretrained=pretrained)
    inject_mode_approx(fresh, config)
    load_adapter(fresh, args.output / "adapter")
    print("loaded:", recall(fresh, test))

    torch.save(merged_state_dict(fresh), args.output / "merged.pt")
    plain, _, _ = open_clip.create_model_and_transforms(name, pretrained=str(args.output / "merged.pt"))
    print("merged:", recall(plain, test))


def make_tiny(folder: Path, count: int, epochs: int) -> tuple[str, str]:
    """A small model of OpenCLIP, trained on clean pictures: its name, and the file of its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.json").write_text(json.dumps(TINY), encoding="utf-8")
    open_clip.add_model_config(folder)
    model, _, preprocess = open_clip.create_model_and_transforms("tiny")
    path = generate_pictures(folder, "clean", {"train": count})["train"]
    # In memory, since it is little.
    pairs = list(Pairs(path, folder / "images", preprocess, open_clip.get_tokenizer("tiny")))  # type: ignore[call-overload]
    train(model, pairs, epochs, batch=min(64, count), lr=3e-3)
    torch.save(model.state_dict(), folder / "tiny.pt")
    return "tiny", str(folder / "tiny.pt")


def main(argv: Optional[Sequence[str]] = None) -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description="Tune a model of OpenCLIP with mode approximation.")
    parser.add_argument("output", type=Path, help="folder of the adapter and the merged weights")
    parser.add_argument("--model", help="of OpenCLIP; default: a small one, made here")
    parser.add_argument("--pretrained", help="tag or file of its weights")
    parser.add_argument("--train", type=Path, help="file of pairs; default: the demo's")
    parser.add_argument("--test", type=Path, help="file of pairs")
    parser.add_argument("--images", type=Path, help="folder of the pictures")
    parser.add_argument("--targets", default="open_clip", help="default: %(default)s; or open_clip/all_linear")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--pictures", type=int, default=1000, help="of the demo, in each of its two domains")
    parser.add_argument("--tiny-epochs", type=int, default=12, help="of the small model")
    args = parser.parse_args(argv)
    own = (args.train, args.test, args.images)
    if any(own) and not all(own):
        parser.error("name --train, --test and --images together")
    if bool(args.model) != bool(args.pretrained):
        parser.error("name --model and --pretrained together: an adapter of random weights is of no use")
    torch.manual_seed(0)
    demo = args.output / "demo"
    named = (args.model, args.pretrained) if args.model else make_tiny(demo, args.pictures, args.tiny_epochs)
    if not all(own):
        made = generate_pictures(demo, "shifted", {"train": args.pictures, "test": max(args.pictures // 5, 2)})
        own = (made["train"], made["test"], demo / "images")
    tune(args, *named, own[:2], own[2])


if __name__ == "__main__":
    main()
