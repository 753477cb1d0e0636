"""Turn a checkpoint of projects/aurora/demo_pretrain.yaml into the weights that come with the package.

    python train.py --cfg-path projects/aurora/demo_pretrain.yaml
    python scripts/make_tiny_weights.py output/demo_pretrain/RUN/checkpoint_best.pth

The weights are stored in half precision, without the momentum copies.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from lavis_aurora.loading import load_model_and_preprocess
from lavis_aurora.paths import package_file
from lavis_aurora.training.checkpointing import read_checkpoint

TARGET = "configs/models/tiny/model.safetensors"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="checkpoint_best.pth of a run of demo_pretrain.yaml")
    parser.add_argument("--output", type=Path, default=Path(package_file(TARGET)))
    args = parser.parse_args()
    state = read_checkpoint(args.checkpoint)["model"]
    kept = {name: value.half() for name, value in state.items() if not name.partition(".")[0].endswith("_m")}
    # The temperature may not be trained in pretraining, and is then not in the checkpoint.
    kept.setdefault("temp", torch.tensor(0.07).half())
    save_file(kept, args.output, metadata={"made_by": "projects/aurora/demo_pretrain.yaml"})
    load_model_and_preprocess("blip_retrieval_aurora", "tiny")
    print(f"{len(kept)} tensors, {args.output.stat().st_size / 2**20:.2f} MiB: {args.output}")


if __name__ == "__main__":
    main()
