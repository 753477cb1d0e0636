"""The paper's tables, costs as they count them, and how the set-up of a run differs from the paper's (4.1, D.3)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any, Optional

from omegaconf import DictConfig, OmegaConf

from lavis_aurora.analysis.results import tuned_model
from lavis_aurora.common.errors import AuroraError, did_you_mean
from lavis_aurora.common.files import read_json
from lavis_aurora.config.check import read_yaml
from lavis_aurora.config.method import ModeApproxConfig

# BLIP base: layers of each tower and their width.
LAYERS, WIDTH = 12, 768
DIRECTIONS = {
    "image_to_text": "image to text",
    "text_to_image": "text to image",
    "video_to_text": "video to text",
    "text_to_video": "text to video",
}
# What scripts/bench_train.py measures: key, column of table 5, title.
COSTS = {"seconds": ("time", "time of a step"), "memory": ("memory", "memory above the model")}
# The paper's unit of cost. In LAVIS's own model first: that is how its UniAdapter ran.
UNITS = ("lavis-uniadapter-512", "uniadapter-512")
NAMES = {  # of the benchmark's methods
    **{"aurora": "Aurora", "aurora-all": "Aurora, all linear", "uniadapter": "UniAdapter"},
    **{"lora": "LoRA", "lora-attention": "LoRA, attention"},
}
# What is behind the + of a method.
SETTINGS = {
    **{f"last{n}": f"last {n} layers" for n in (8, 6, 4, 3)},
    **{f"merge{n}": f"{n} tokens merged a layer" for n in (16, 32)},
    **{"vision8": "last 8 layers of the ViT", "cached": "features kept", "alone": "no teacher"},
}


@lru_cache(maxsize=1)
def paper_tables() -> dict[str, Any]:
    """Content of ``tables.json``; its ``units`` say what the numbers are, and null is what could not be read."""
    return json.loads(Path(__file__).with_name("tables.json").read_text(encoding="utf-8"))


def paper_rows(table: str, benchmark: str) -> list[dict[str, Any]]:
    """Rows of a table that have results on a benchmark; these are then at ``values``.

    Raises:
        AuroraError: no such table, or the benchmark is not in it.
    """
    tables = paper_tables()["tables"]
    if table not in tables:
        raise AuroraError(f"the paper has no table {table!r}{did_you_mean(table, tables)}")
    rows = [{**row, "values": row["results"].get(benchmark, {})} for row in tables[table]["rows"]]
    rows = [row for row in rows if any(value is not None for value in row["values"].values())]
    if not rows:
        known = sorted({name for row in tables[table]["rows"] for name in row["results"]})
        near = did_you_mean(benchmark, known)
        raise AuroraError(f"table {table} of the paper has no results on {benchmark!r}{near}")
    return rows


def label(row: dict[str, Any]) -> str:
    """Method and rank of a row."""
    return f"{row['method']} (r={row['rank']})" if "rank" in row else row["method"]


# Slots of a layer, in all towers together: query, key and value of three attentions; with ``targets: all_linear``
# their output projections too, and the feed-forward matrices of both towers in blocks.
ATTENTION_SLOTS, ALL_SLOTS = 9, 9 + 3 + 2 * 8


def aurora_count(
    rank: int, layers: int = LAYERS, width: int = WIDTH, separate: int = 1, slots: int = ATTENTION_SLOTS
) -> int:
    """Aurora: L (3 + 6) 2r + 2dr + 2Ld, where 2Ld is the gate; L (3 + 6 + 3 + 16) 2r with ``ALL_SLOTS``.

    Args:
        rank: R.
        layers, width: L and d.
        separate: pairs of U and V: one for all towers (``sharing: global``), or one each for three (``tower``).
        slots: of a layer.
    """
    return layers * slots * 2 * rank + separate * 2 * width * rank + 2 * layers * width


def lora_count(rank: int, layers: int = LAYERS, width: int = WIDTH) -> int:
    """LoRA on all attention projections: L (3 + 6) 2dr."""
    return layers * 9 * 2 * width * rank


def uniadapter_count(rank: int, layers: int = LAYERS, width: int = WIDTH) -> int:
    """UniAdapter: L 4dr."""
    return layers * 4 * width * rank


def metric_title(metric: str, retrieval: bool = False) -> str:
    """A column of a sweep's table, in words; whether it is of retrieval, ``agg_metrics`` does not say itself."""
    split, _, name = metric.partition(".")
    if name == "agg_metrics":
        return "mean of R@1, 5, 10" if retrieval else "accuracy, or mean of R@1, 5, 10"
    if name == "accuracy":
        return name
    for direction, words in DIRECTIONS.items():
        rest = name.removeprefix(f"{direction}_")
        if rest != name:
            plain = rest.removeprefix("itc_")
            return f"{'R@' + plain[1:] if plain[0] == 'r' else plain}, {words}{', ITC only' * (plain != rest)}"
    return metric


# Files of BLIP base's weights, pretrained on 129M pairs.
BLIP_BASE = ("model_base.pth", "model_base_capfilt_large.pth")
NOT_STATED = "not said"
# What is Aurora, whole or in part, and its forms of what the YAML does not name.
METHOD_FORMS = {
    "aurora": {"gate.form": "residual", "gate.init": "zeros", "context.form": "attention"},
    "mode_approx": {"gate.form": "none", "context.form": "none"},
}
# Keys of which only other values than these are told: what the paper has, or does not speak of.
USUAL = {
    "model.mode_approx.form": "cp",
    "model.mode_approx.targets": None,
    "model.mode_approx.layers": None,
    "model.mode_approx.dropout": 0.0,
    "model.gate.decoder": False,
    "model.teacher_factors": "average",
    "model.alpha_epochs": 2,
    "model.train_text_proj": True,
    "run.weight_decay_all": False,
}
Difference = tuple[str, Any, Any]


def setup_differences(
    config: DictConfig, split: str, counts: Mapping[str, int], benchmark: str, table: str
) -> list[Difference]:
    """(what, here, paper) of all that differs, or that the paper does not say and that matters.

    Args:
        config: of the run, resolved.
        split: that was tested.
        counts: images, videos, texts or questions of the split.
        benchmark, table: of the paper that the run is compared with.
    """
    paper = paper_tables()["benchmarks"][benchmark]["setup"]
    here = dict(_run_setup(config, benchmark))
    if table == "4":
        # Nothing is trained here; the training was another run's, on MSCOCO.
        here = {key: here[key] for key in ("backbone", "frames_test", "k_test", "itc_weight") if key in here}
    there = {"backbone": "BLIP base, 129M pairs", **_method(config), **paper}
    data = list(config.get("datasets") or {})
    found = [("data", ", ".join(data), benchmark)] if benchmark not in data else []
    found += [(key, value, there.get(key, NOT_STATED)) for key, value in here.items()]
    own_split = {"coco_vqa": "test-dev, test-std"}.get(benchmark, "test")
    found.append(("split", split, own_split))
    found += [(f"{key} tested", value, paper.get(key, NOT_STATED)) for key, value in counts.items()]
    return [(key, shown, other) for key, shown, other in found if _differs(shown, other)]


def _differs(here: Any, there: Any) -> bool:
    if isinstance(here, (int, float)) and isinstance(there, (int, float)):
        return abs(here - there) > 1e-12
    return here != there


def _method(config: DictConfig) -> dict[str, str]:
    """The paper's forms of what only Aurora has (3.2, 3.3)."""
    if tuned_model(config).tuning not in METHOD_FORMS:
        return {}
    forms = {"gate.form": "convex", "gate.init": "zeros", "context.form": "attention"}
    usual = {"model.mode_approx.form": "cp", "model.mode_approx.targets": "attention"}
    return {**forms, **usual, "lambda at the start": "random", "factor on the update": "none"}


def _run_setup(config: DictConfig, benchmark: str) -> Iterator[tuple[str, Any]]:
    """What the run had, under the names of tables.json."""
    tuned, run = tuned_model(config), config.run
    model = tuned.config
    yield "backbone", _backbone(model)
    yield "image_size", model.get("image_size")
    if tuned.tuning in METHOD_FORMS:
        # A YAML may leave out what it takes by default.
        for key, default in METHOD_FORMS[tuned.tuning].items():
            if key != "context.form" or "retrieval" in tuned.arch:
                yield key, OmegaConf.select(config, f"model.{key}", default=default)
        scale = OmegaConf.select(config, "model.mode_approx.scale", default=ModeApproxConfig().scale)
        if OmegaConf.select(config, "model.mode_approx.form", default="cp") == "cp":
            yield "lambda at the start", "one"
            yield "factor on the update", f"{scale:g} / (0.1 sqrt(d rank))"
        else:
            yield "factor on the update", f"{scale:g}"
    yield "processes", run.get("world_size", 1)
    for key in ("batch_size_train", "max_epoch", "init_lr", "weight_decay", "lr_sched"):
        yield key, run.get(key)
    if run.get("accum_grad_iters", 1) != 1:
        yield "accum_grad_iters", run.accum_grad_iters
    for kind, name in (("train", "frames_train"), ("eval", "frames_test")):
        frames = _frames(config, kind)
        if frames is not None:
            yield name, frames
    for key, value in (("queue_size", model.get("queue_size")), ("seed", run.get("seed"))):
        if value is not None:
            yield key, value
    for key, usual in USUAL.items():
        value = OmegaConf.select(config, key, default=usual)
        if _differs(value, usual):
            yield key, value
    if "vqa" in tuned.arch:
        yield "inference_method", run.get("inference_method")
        if run.get("inference_method") == "generate":
            yield "num_beams", run.get("num_beams")
    else:
        yield "k_test", run.get("k_test")
        yield "itc_weight", run.get("itc_weight")


def _backbone(model: DictConfig) -> str:
    source = model.get("finetuned") if model.get("load_finetuned") else model.get("pretrained")
    if source is None:
        return "random weights"
    name = PurePath(str(source)).name
    if name in BLIP_BASE:
        return "BLIP base, 129M pairs"
    return f"{name} ({model.model_type})" if model.get("model_type") else name


def _frames(config: DictConfig, kind: str) -> Optional[int]:
    """Frames of a video in training or at test; None for pictures."""
    for dataset in (config.get("datasets") or {}).values():
        frames = OmegaConf.select(dataset, f"vis_processor.{kind}.n_frms")
        if frames is not None:
            return frames
    return None


def read_costs(path: str | Path) -> dict[str, Any]:
    """``tasks``: of each its ``unit`` and ``methods``, as ratios to it and ``measured``; ``machine``, ``arguments``.

    Args:
        path: of the json that scripts/bench_train.py --out wrote.

    Raises:
        AuroraError: it is another file.
    """
    content = read_json(path)
    results = content.get("results") if isinstance(content, dict) else None
    if not results or not all(isinstance(methods, dict) for methods in results.values()):
        raise AuroraError(f"{path}: holds no results; name the file that scripts/bench_train.py --out wrote")
    tasks = {}
    for task, methods in results.items():
        unit = next((one for one in UNITS if one in methods), next(iter(methods)))
        tasks[task] = {
            "unit": unit,
            "methods": {
                name: {key: one[key] / methods[unit][key] for key in COSTS} | {"measured": {k: one[k] for k in COSTS}}
                for name, one in methods.items()
            },
        }
    machine = next(iter(next(iter(results.values())).values())).get("machine", {})
    return {"tasks": tasks, "machine": machine, "arguments": content.get("arguments", {})}


def method_costs(folder: str | Path) -> dict[str, str | None]:
    """By method of scripts/comparison.py the row of scripts/bench_train.py that its YAML names, if any.

    Raises:
        AuroraError: the folder holds no YAML.
    """
    paths = sorted(Path(folder).glob("*.yaml"))
    if not paths:
        raise AuroraError(f"--methods {folder}: holds no YAML of a method; name the project's scripts/comparison")
    found = {path.stem: read_yaml(path) for path in paths}
    return {name: content.get("cost") if isinstance(content, DictConfig) else None for name, content in found.items()}


def paper_ratios() -> dict[str, dict[str, dict[str, float]]]:
    """Table 5: by benchmark and method, time and memory in units of UniAdapter with rank 512."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in paper_tables()["tables"]["5"]["rows"]:
        for benchmark, values in row["results"].items():
            found.setdefault(benchmark, {})[f"{row['method']} (r={row['rank']})"] = values
    return found


def method_name(method: str) -> str:
    """A method of the benchmark program, as the paper writes it.

    Examples:
        >>> method_name("lavis-uniadapter-512")
        "UniAdapter (r=512), LAVIS's own"
        >>> method_name("aurora-64+last6+cached")
        'Aurora (r=64), last 6 layers, features kept'
    """
    method, *settings = method.split("+")
    if settings:
        return ", ".join([method_name(method), *(SETTINGS.get(one, one) for one in settings)])
    if method == "frozen-flow":
        return "frozen, gradients flow"
    if method.startswith("lavis-"):
        return f"{method_name(method[len('lavis-') :])}, LAVIS's own"
    kind, _, rank = method.rpartition("-")
    return f"{NAMES[kind]} (r={rank})" if kind in NAMES else method
