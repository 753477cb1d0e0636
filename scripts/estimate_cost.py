"""What a project costs, by counting operations: floating point operations and memory of a run, from its YAML alone.

python scripts/estimate_cost.py                               # the YAMLs of projects/aurora, as a table of markdown
python scripts/estimate_cost.py projects/aurora/msrvtt_ret.yaml --tflops 110 --processes 1

Nothing is built and nothing measured: products are counted as 2 for each multiplication and addition, layer by layer,
for BLIP base. tests/scripts/test_estimate_cost.py holds the count beside torch's own (FlopCounterMode). Hours follow
from the operations a second that a GPU is assumed to sustain, and leave out reading and decoding. Memory is that of
activations as measured on a CPU in single precision, see docs/performance.md, by tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

ROOT = Path(__file__).resolve().parents[1] / "projects" / "aurora"
# BLIP base.
WIDTH, LAYERS, PATCH = 768, 12, 16
# The backward pass of fused attention is five products, forward two.
ATTENTION_BACKWARD = 2.5
# Tokens: of captions in training (padded to the longest of a batch) and at test, of questions and of answers.
CAPTION, CAPTION_ALONE, QUESTION, ANSWER = 25, 12, 12, 4
# Bytes that a step keeps for each token of a picture, nothing recomputed, in single precision: measured, before
# GELU and normalisations were; so it is an upper bound.
KEPT = {"retrieval": 1.1e6, "vqa": 0.9e6}
QUEUE = 2 * 57600 * 256 * 4
WEIGHTS = {"retrieval": 895e6, "vqa": 1446e6}


class Data(NamedTuple):
    """Samples of an epoch, and pictures (or videos) and texts of the test."""

    train: int
    pictures: int
    texts: int


# As published. Of Visual Genome's questions it is BLIP's file that is read; how many it holds is an assumption.
DATA = {
    "coco_retrieval": Data(566_747, 5_000, 25_010),
    "flickr30k": Data(145_000, 1_000, 5_000),
    "msrvtt_retrieval": Data(180_000, 1_000, 1_000),
    "didemo_retrieval": Data(8_395, 1_004, 1_004),
    "msrvtt_qa_aurora": Data(158_581, 72_821, 72_821),
    "coco_vqa": Data(658_111, 447_793, 447_793),
    "vg_vqa": Data(1_440_000, 0, 0),
}


class Cost(NamedTuple):
    """Of a run: operations of a training step for one sample, of all training, of the test; bytes of a process."""

    sample: float
    train: float
    test: float
    memory: float
    steps: int


class Ops(NamedTuple):
    """Operations of a forward pass: of products with weights, and inside the attention."""

    linear: float
    attention: float

    @property
    def forward(self) -> float:
        return self.linear + self.attention

    @property
    def backward(self) -> float:
        """Through frozen weights: one product for each of the forward pass, as no weight has a gradient."""
        return self.linear + ATTENTION_BACKWARD * self.attention

    def __add__(self, other: tuple[Any, ...]) -> Ops:
        return Ops(self.linear + other[0], self.attention + other[1])

    def times(self, count: float) -> Ops:
        return Ops(count * self.linear, count * self.attention)


def vision(tokens: int, width: int = WIDTH, layers: int = LAYERS, patch: int = PATCH) -> Ops:
    """The vision tower on a picture of so many tokens, [CLS] included."""
    patches = 2 * (tokens - 1) * width * 3 * patch**2
    return Ops(patches + layers * 24 * tokens * width**2, layers * 4 * tokens**2 * width)


def text(tokens: int, seen: int = 0, width: int = WIDTH, layers: int = LAYERS) -> Ops:
    """A text tower on a text that attends to ``seen`` tokens (0: to itself alone), whose keys are there already."""
    linear = 24 + (4 if seen else 0)
    return Ops(layers * linear * tokens * width**2, layers * 4 * tokens * (tokens + seen) * width)


def keys(seen: int, width: int = WIDTH, layers: int = LAYERS) -> Ops:
    """Keys and values of cross-attention, once for a picture."""
    return Ops(layers * 4 * seen * width**2, 0)


def adapter(tokens: int, outputs: int, rank: int, width: int = WIDTH) -> float:
    """The backward pass of the update of layers of so many ``outputs`` x width: four products of width ``rank``."""
    return 4 * tokens * rank * (width + outputs * width)


def retrieval_sample(picture: Ops, seen: int, tokens: int, rank: int, **size: int) -> float:
    """A pair in training: towers, teacher, and three passes of matching, forward and backward."""
    alone, matched = text(tokens, **size), text(tokens, seen, **size).times(3)
    trained = picture + alone + matched + keys(seen, **size)
    width, layers = size.get("width", WIDTH), size.get("layers", LAYERS)
    update = adapter(seen, 3, rank, width) + adapter(seen, 2, rank, width) + 4 * adapter(tokens, 3, rank, width)
    return trained.forward + trained.backward + picture.forward + alone.forward + layers * update


def question_sample(picture: Ops, seen: int, rank: int) -> float:
    """A question in training, with one answer."""
    trained = picture + keys(seen) + text(QUESTION, seen) + keys(QUESTION) + text(ANSWER, QUESTION)
    update = 2 * adapter(seen, 3, rank) + 2 * adapter(QUESTION, 3, rank)
    return trained.forward + trained.backward + LAYERS * update


def frames(dataset: Mapping[str, Any], split: str) -> int:
    """Of a video; 1 for a picture."""
    return int(OmegaConf.select(dataset, f"vis_processor.{split}.n_frms", default=1))


def estimate(cfg: DictConfig, processes: int = 8) -> Cost:
    """What the YAML of one of the paper's benchmarks costs.

    Args:
        cfg: its content.
        processes: that train, each with ``run.batch_size_train``; the sum of their operations does not change.
    """
    model, run = cfg.model, cfg.run
    vqa = "vqa" in model.arch
    size = int(model.get("image_size", 480 if vqa else 384))
    one, rank = (size // PATCH) ** 2 + 1, int(OmegaConf.select(model, "mode_approx.rank", default=64))
    dataset = next(iter(cfg.datasets.values()))
    train_seen, test_seen = one * frames(dataset, "train"), one * frames(dataset, "eval")
    picture = vision(one).times(frames(dataset, "train"))
    sample = (
        question_sample(picture, train_seen, rank) if vqa else retrieval_sample(picture, train_seen, CAPTION, rank)
    )
    count = 0 if run.get("evaluate") else sum(DATA[name].train for name in cfg.datasets)
    epochs, batch = int(run.get("max_epoch", 0)), int(run.get("batch_size_train", 1))
    data = DATA[next(iter(cfg.datasets))]
    looked = (vision(one).times(frames(dataset, "eval")) + keys(test_seen)).forward
    if vqa:
        asked = looked + text(QUESTION, test_seen).forward
        answers = int(run.get("num_ans_candidates", 128)) if run.get("inference_method") == "rank" else 10 / ANSWER
        test = data.texts * (asked + answers * text(ANSWER, QUESTION).forward)
    else:
        pairs = int(run.k_test) * (data.pictures + data.texts)
        alone = text(CAPTION_ALONE).forward
        test = data.pictures * looked + data.texts * alone + pairs * text(CAPTION_ALONE, test_seen).forward
    kind = "vqa" if vqa else "retrieval"
    memory = WEIGHTS[kind] + (0 if vqa else QUEUE) + batch * train_seen * KEPT[kind] * bool(count)
    steps = epochs * (count // (batch * processes))
    return Cost(sample, epochs * count * sample, test, memory, steps)


def row(path: Path, processes: int, tflops: float) -> str:
    """A line of the table."""
    cost = estimate(OmegaConf.load(path), processes)
    name = path.relative_to(ROOT).with_suffix("") if ROOT in path.parents else path.stem
    train, test = (ops / (tflops * 1e12 * 3600) for ops in (cost.train, cost.test))
    trained, hours = "- | - | -", "- | -"
    if cost.steps:
        trained = f"{cost.sample / 1e12:.2f} | {cost.steps:,} | {cost.train / 1e15:,.0f}"
        hours = f"{train:.1f} | {train / processes:.2f}"
    memory = f"{cost.memory / 1e9:.0f}"
    return f"| `{name}` | {trained} | {cost.test / 1e15:,.1f} | {memory} | {hours} | {test:.2f} |"


def table(paths: Sequence[Path], processes: int, tflops: float) -> str:
    """All of them."""
    plural = "" if processes == 1 else "s"
    heads = ["project", "TFLOP a sample", f"steps of {processes} process{'es' if plural else ''}"]
    heads += ["training, PFLOP", "test, PFLOP", "GB a process", "training, hours of 1 GPU"]
    heads += [f"of {processes} GPU{plural}", "test, hours of 1 GPU"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    return "\n".join([*lines, *(row(path, processes, tflops) for path in paths)])


def unknown_data(path: Path) -> list[str]:
    """The data sets of a YAML whose size is not known here."""
    return sorted(set(OmegaConf.load(path).datasets) - set(DATA))


def benchmark_yamls() -> list[Path]:
    """Of projects/aurora, those whose data are known."""
    return [path for path in sorted(ROOT.rglob("*.yaml")) if not unknown_data(path)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("yamls", nargs="*", type=Path, help="projects of the paper's benchmarks; default: all")
    parser.add_argument("--processes", type=int, default=8, help="that train together")
    parser.add_argument("--tflops", type=float, default=50.0, help="10^12 operations a second that a GPU sustains")
    args = parser.parse_args(argv)
    if args.processes < 1 or args.tflops <= 0:
        parser.error("--processes and --tflops are to be above 0")
    for path in args.yamls:
        try:
            unknown = unknown_data(path)
        except (OSError, YAMLError, AttributeError, TypeError) as error:
            parser.error(f"{path}: no YAML of a run: {error}")
        if unknown:
            parser.error(f"{path}: how large {', '.join(unknown)} is, is not known here; known: {', '.join(DATA)}")
    print(table([path.resolve() for path in args.yamls] or benchmark_yamls(), args.processes, args.tflops))


if __name__ == "__main__":
    main()
