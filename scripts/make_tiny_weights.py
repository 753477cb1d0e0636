"""Turn the checkpoint of a pretraining run of the demo into weights that come with the package.

    python scripts/pretrain_tiny_vision.py
    python train.py --cfg-path projects/aurora/demo_pretrain.yaml
    python scripts/make_tiny_weights.py output/demo_pretrain/RUN/checkpoint_best.pth

They are stored in half precision, without the momentum copies, and take the place of the older ones once they have
been loaded. From them scripts/pretrain_tiny_vqa.py makes those
that answer questions.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import lavis_aurora_compat  # noqa: F401

from lavis.common.registry import registry
from safetensors.torch import save
from torch import Tensor, nn

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.files import atomic_write
from lavis_aurora.common.paths import package_file, relocated
from lavis_aurora.config.check import map_text, resolved
from lavis_aurora.models.loading import load_model_and_preprocess
from lavis_aurora.training.checkpoints import read_checkpoint

ARCH, MADE_BY = "blip_retrieval_aurora", "projects/aurora/demo_pretrain.yaml"
TARGET = package_file("configs/models/tiny/model.safetensors")


def pretrained_model(checkpoint: Path) -> nn.Module:
    """The model of a run that trained every weight."""
    state = read_checkpoint(checkpoint)
    cfg = map_text(resolved(state["config"])["model"], relocated)
    if cfg["arch"] != ARCH or cfg["tuning"] != "full":
        raise AuroraError(f"{checkpoint}: a run of {cfg['arch']} with tuning {cfg['tuning']}, not a pretraining run")
    # A checkpoint holds what the run trained: a frozen ViT comes from where the run had it.
    start = cfg["pretrained"] if cfg.get("freeze_vit") else None
    model = registry.get_model_class(cfg["arch"]).from_config({**cfg, "pretrained": start})
    model.load_run_state(state["model"], str(checkpoint))
    return model


def stored_weights(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint of BLIP holds, in half precision: no momentum copies, no queues, no constants."""
    return {
        name: value.half()
        for name, value in model.state_dict().items()
        if not name.partition(".")[0].endswith("_m") and "queue" not in name and not name.endswith("position_ids")
    }


@contextmanager
def replacing(path: Path, weights: Mapping[str, Tensor], made_by: str) -> Iterator[Path]:
    """A file of weights beside ``path`` to test inside the block, after which it takes that name.

    Where the block fails it stays beside, ``path`` stays as it was, and the log says so.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"untested_{path.name}")
    with atomic_write(beside) as file:
        file.write(save(dict(weights), metadata={"made_by": made_by}))
    try:
        yield beside
    except BaseException:
        logging.warning("%s is not replaced; the new weights are in %s", path, beside)
        raise
    beside.replace(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="checkpoint_best.pth of a pretraining run")
    parser.add_argument("--output", type=Path, default=Path(TARGET), help="default: the file in the package")
    args = parser.parse_args()
    try:
        kept = stored_weights(pretrained_model(args.checkpoint))
        with replacing(args.output, kept, MADE_BY) as written:
            load_model_and_preprocess(ARCH, "tiny", pretrained=written)
    except AuroraError as error:
        sys.exit(f"error: {error}")
    print(f"{len(kept)} tensors, {args.output.stat().st_size / 2**20:.2f} MiB: {args.output}")


if __name__ == "__main__":
    main()
