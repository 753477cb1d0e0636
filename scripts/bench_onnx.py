"""Time a merged BLIP in torch and in onnxruntime, side by side on a CPU, and the sizes of its files.

python scripts/bench_onnx.py                      # BLIP base at 384 pixels with random weights
python scripts/bench_onnx.py --type tiny --repeat 20
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import onnxruntime
import torch
from omegaconf import OmegaConf

from lavis_aurora.adapters.merging import merge_adapter
from lavis_aurora.common.paths import package_file
from lavis_aurora.models.blip_retrieval_aurora import BlipRetrievalAurora
from lavis_aurora.models.onnx import export_onnx, parts_of


def main() -> None:
    """Print a line for each part: its size, both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", default="base", help="of blip_retrieval_aurora; its weights are drawn at random")
    parser.add_argument("--batch", type=int, default=4, help="pictures, texts or pairs at once")
    parser.add_argument("--length", type=int, default=12, help="tokens of a text")
    parser.add_argument("--repeat", type=int, default=5, help="runs of each, taking turns; the median counts")
    parser.add_argument("--threads", type=int, default=1, help="of each; with one the processor's time is measured")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    own = {"pretrained": None, "tokenizer": package_file("configs/models/tiny"), "queue_size": 0}
    settings = OmegaConf.load(BlipRetrievalAurora.default_config_path(args.type)).model
    model = BlipRetrievalAurora.from_config(OmegaConf.merge(settings, own, {"gate": {"form": "none"}})).eval()
    merge_adapter(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "onnx"
        export_onnx(model, folder)
        print(f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}; batch {args.batch}, "
              f"texts of {args.length} tokens, threads {args.threads}")  # fmt: skip
        print(f"{'':<12}{'MB':>6}{'torch, s':>11}{'ONNX, s':>10}{'ratio':>8}{'difference':>13}")
        for part in parts_of(model):
            print(compared(model, part, folder, args), flush=True)


@torch.no_grad()
def compared(model: BlipRetrievalAurora, name: str, folder: Path, args: argparse.Namespace) -> str:
    """A line of the table."""
    part = parts_of(model)[name]
    inputs = {key: example(value, args) for key, value in part.inputs.items()}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    file = folder / f"{name}.onnx"
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    given = {key: value.numpy() for key, value in inputs.items()}
    runs: tuple[Callable, Callable] = (lambda: part.module(*inputs.values()), lambda: session.run(None, given))
    first = runs[0]()
    expected, found = (first[0] if isinstance(first, tuple) else first), torch.from_numpy(runs[1]()[0])
    times: tuple[list[float], list[float]] = ([], [])
    # Of one thread the processor's time counts, in which other programs have no part.
    clock = time.process_time if args.threads == 1 else time.perf_counter
    for _ in range(args.repeat):
        for run, taken in zip(runs, times):
            start = clock()
            run()
            taken.append(clock() - start)
    ours, theirs = map(median, times)
    size = sum(path.stat().st_size for path in folder.glob(f"{name}.onnx*")) / 1e6
    difference = float((expected - found).abs().max())
    return f"{name:<12}{size:>6.0f}{ours:>11.3f}{theirs:>10.3f}{ours / theirs:>8.2f}{difference:>13.1e}"


def example(value: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    """Values of the shape that the benchmark has: random pixels and tokens, texts without padding."""
    if value.is_floating_point():
        return torch.randn(args.batch, *value.shape[1:])
    return torch.ones(args.batch, args.length, dtype=value.dtype)


if __name__ == "__main__":
    main()
