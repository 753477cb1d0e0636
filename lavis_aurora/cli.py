"""What the commands say and write, runs apart (training/start.py); and how they end where something cannot be."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_rank
from lavis.common.registry import registry
from omegaconf import OmegaConf
from torch import Tensor, nn

from lavis_aurora.adapters.config import CONFIG, TENSORS, AdapterConfig, read_adapter, read_adapter_config
from lavis_aurora.adapters.files import truncated_adapter, write_adapter
from lavis_aurora.adapters.switching import adapters_of, merged_state_dict
from lavis_aurora.common.errors import AuroraError, did_you_mean, printable
from lavis_aurora.common.files import atomic_write, use_utf8
from lavis_aurora.common.paths import package_file
from lavis_aurora.config.check import parse_config
from lavis_aurora.config.models import BlipAuroraConfig, ModeApproxModelConfig
from lavis_aurora.mode_approx.layers import AdaptedLayer
from lavis_aurora.models.loading import load_model_and_preprocess, read_state_dict
from lavis_aurora.project import load_config
from lavis_aurora.training.guards import Stopped


def inspect(path: str) -> str:
    """What an adapter folder or a file of weights holds, as text.

    Raises:
        AuroraError: it is neither.
    """
    place = Path(path)
    if place.name == TENSORS and place.with_name(CONFIG).is_file():
        place = place.parent
    if not place.is_dir():
        return _tensor_table(read_state_dict(str(place), "inspect"))
    config, tensors = read_adapter(place)
    return "\n".join([*_describe(config), "", _tensor_table(tensors)])


def _describe(config: AdapterConfig) -> list[str]:
    """The settings, a line each."""
    widths: dict[str, int] = defaultdict(int)
    for d_in, d_out in config.slots.values():
        widths[f"{d_in} x {d_out}"] += 1
    model = config.model
    lines = {
        "model": " ".join(str(model[key]) for key in ("arch", "model_type") if model.get(key)) or "any nn.Module",
        "base": f"{config.base.name or 'without a name'} (sha256 {config.base.sha256[:12]})",
        # Which layers were targeted, the slots say.
        config.kind: ", ".join(f"{key} {value}" for key, value in vars(config.settings).items() if value is not None),
        "slots": ", ".join(f"{count} of {shape}" for shape, count in widths.items()),
        "targets": f"\n{'':<17}".join(_slot_groups(config.slots)),
    }
    for key, value in (model.get("settings") or {}).items():
        lines.setdefault(key, ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value)
    for key, value in config.metrics.items():
        shown = value if isinstance(value, dict) else {"": value}
        numbers = (f"{k} {v:.4g}".strip() if isinstance(v, (int, float)) else f"{k} {v}" for k, v in shown.items())
        lines[f"metrics: {key}"] = ", ".join(text for text in numbers if not re.search("chance|_itc_|_lavis_", text))
    lines["written by"] = ", ".join(f"{key} {value}" for key, value in config.versions.items())
    if config.format == 1:
        lines["checksum"] = "of the tensors alone (an older version's); load and save the adapter to cover all"
    return [f"{key:<16} {value}" for key, value in lines.items()]


def _slot_groups(slots: Iterable[str]) -> list[str]:
    """Slots by their module, layers of a kind together: 'blocks.*.attn.qkv: query, key, value'."""
    groups: dict[str, dict[str, None]] = defaultdict(dict)
    for slot in map(_without_numbers, slots):
        module, _, name = slot.rpartition(".")
        groups[module][name] = None
    return [f"{module}: {', '.join(names)}" if module else ", ".join(names) for module, names in groups.items()]


def _tensor_table(tensors: Mapping[str, Tensor]) -> str:
    """Counts by name; numbers in names are left out, so that layers of a kind share a row."""
    rows: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for name, tensor in sorted(tensors.items()):  # the order in a safetensors file means nothing
        key = (printable(_without_numbers(name)), _shape(tensor), str(tensor.dtype).removeprefix("torch."))
        rows[key].append(tensor.numel())
    width = max((len(name) for name, _, _ in rows), default=4)
    lines = [f"{'name':<{width}}  {'shape':<14}{'dtype':<10}{'tensors':>8}{'numbers':>14}"]
    lines += [
        f"{name:<{width}}  {shape:<14}{kind:<10}{len(counts):>8}{sum(counts):>14,}"
        for (name, shape, kind), counts in rows.items()
    ]
    total = sum(tensor.numel() for tensor in tensors.values())
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return "\n".join([*lines, f"{len(tensors)} tensors, {total:,} numbers, {size / 1e6:.2f} MB"])


def _without_numbers(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "number"


def merge(
    adapter: str,
    output: str,
    pretrained: str | None = None,
    tokenizer: str | None = None,
    med_config_path: str | None = None,
) -> str:
    """Write a checkpoint that LAVIS's own model loads; what to do with it, as text.

    Args:
        adapter: a folder.
        output: the file to write.
        pretrained, tokenizer, med_config_path: as of :func:`load_model_and_preprocess`.

    Raises:
        AuroraError: the file is there already, the adapter has gates, or backbone and adapter do not fit.
    """
    if Path(output).exists():
        raise AuroraError(f"{output} is there already; name another file")
    described = read_adapter_config(adapter).model
    arch = described.get("arch")
    if arch is None:
        raise AuroraError(f"{adapter} does not name its model; use merged_state_dict(model) in Python")
    load: Any = partial(load_model_and_preprocess, arch, is_eval=True, adapter=adapter)
    model, _, _ = load(pretrained=pretrained, tokenizer=tokenizer, med_config_path=med_config_path)
    state = merged_state_dict(model)
    with atomic_write(output) as file:
        torch.save({"model": state}, file)
    return f"{output}: {len(state)} tensors; {loading_instructions(arch, model.settings, Path(output).absolute())}"


def truncate(adapter: str, rank: int, output: str | None = None) -> str:
    """Write an adapter cut to its first components; where it is, and its size, as text.

    Args:
        adapter: a folder.
        rank: how many components.
        output: the folder to write; by default one beside, with the rank in its name.

    Raises:
        AuroraError: the folder is there already, or the adapter has no such rank.
    """
    source = Path(adapter).expanduser()
    folder = source.with_name(f"{source.resolve().name}_rank{rank}") if output is None else Path(output).expanduser()
    config, tensors = truncated_adapter(*read_adapter(source), rank, adapter)
    if folder.exists():
        raise AuroraError(f"{folder} is there already; name another folder by --out")
    write_adapter(config, tensors, folder)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    return f"{folder}: {len(tensors)} tensors, {numbers:,} numbers; no metrics, which were those of the whole adapter"


def targets(name: str, model_type: str | None = None) -> str:
    """The weights of a model that an adapter would update, as text.

    Args:
        name: a registered name, whose model is built without its weights; or a project YAML, built as it says.
        model_type: one of the named model's types.

    Raises:
        AuroraError: no such model or type, or not one of this package.
    """
    if name.endswith((".yaml", ".yml")):
        model = load_config(name).model_cfg
        with _no_warnings():
            return target_table(registry.get_model_class(model.arch).from_config(model))
    cls = registry.get_model_class(name)
    if cls is None:
        raise AuroraError(f"no model {name!r}{did_you_mean(name, registry.list_models())}")
    if not hasattr(cls, "CONFIG_CLASS"):
        known = (n for n, c in registry.mapping["model_name_mapping"].items() if hasattr(c, "CONFIG_CLASS"))
        raise AuroraError(
            f"{name} is not a model of this package, as {', '.join(sorted(known))} are; name a project YAML with "
            f"model.arch: mode_approx and model.base.arch: {name}"
        )
    cfg = OmegaConf.load(cls.default_config_path(model_type or cls.DEFAULT_MODEL_TYPE)).model
    # Any vocabulary will do, and that of the tiny model is at hand.
    tokenizer = package_file("configs/models/tiny")
    cfg.update(load_finetuned=False, pretrained=None, tokenizer=tokenizer)
    with _no_warnings():
        return target_table(cls.from_config(cfg))


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Without the log's warnings, as of random weights: of a model that is only looked at, they say nothing."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def target_table(model: nn.Module) -> str:
    """The adapted weights of a model with their slots; layers of a kind share a row."""
    sets = adapters_of(model)
    slots = list(sets.slots)
    rows: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    owned = set()
    for path, layer in sets.updated_layers(model):
        for weight, parameter in layer.adapted_weights().items():
            names = [slots[i] for i in layer.slots_of[weight]] if isinstance(layer, AdaptedLayer) else [path]
            kinds = ", ".join(_slot_label(slot, path) for slot in names)
            rows[(_without_numbers(f"{path}.{weight}"), _shape(parameter), kinds)] += names
            owned.update(names)
    width = max(len(weight) for weight, _, _ in rows)
    lines = [f"{'weight':<{width}}  {'shape':<13}{'slots':>5}  their names"]
    lines += [
        f"{weight:<{width}}  {shape:<13}{len(set(names)):>5}  {kinds}"
        for (weight, shape, kinds), names in rows.items()
    ]
    return "\n".join([*lines, f"{len(owned)} slots in all"])


def _slot_label(slot: str, layer: str) -> str:
    """A slot's name as seen from a layer that uses it."""
    if slot == layer:
        return "that of the layer"
    return slot[len(layer) + 1 :] if slot.startswith(f"{layer}.") else _without_numbers(slot)


# The types of LAVIS that stand in for those which only this package has.
PLAIN_TYPES = {"blip_retrieval": "coco", "blip_vqa": "vqav2"}
# What LAVIS's BLIP reads of its YAML that decides shapes or scores.
BLIP_KEYS = (
    *("image_size", "vit_type", "vit_layer_norm_epsilon", "med_config_path"),
    *("embed_dim", "queue_size", "max_txt_len"),
)
# What of a section says where weights come from.
LOADING_KEYS = ("arch", "model_type", "load_finetuned", "finetuned", "pretrained")


def loading_instructions(arch: str, settings: BlipAuroraConfig | ModeApproxModelConfig, file: Path) -> str:
    """The ``model:`` section with which LAVIS loads a merged checkpoint, or why none does, as text.

    Args:
        arch: registered name of the model that was merged.
        settings: what it was built from.
        file: the checkpoint.
    """
    if isinstance(settings, ModeApproxModelConfig):
        arch, base = settings.base["arch"], settings.base
        inside = getattr(registry.get_model_class(arch), "CONFIG_CLASS", None)
        if inside is None:
            own = {key: value for key, value in base.items() if key not in LOADING_KEYS}
            return _section(arch, base.get("model_type"), own, {}, file)
        blip: BlipAuroraConfig = parse_config(inside, base, "model.base")
    else:
        blip = settings
    arch = arch.removesuffix("_aurora")
    if blip.vit is not None:
        sizes = ", ".join(f"{key} {value}" for key, value in vars(blip.vit).items())
        return (
            f"no YAML of plain LAVIS loads it: LAVIS builds its ViT base and its ViT large only, and this one has "
            f"{sizes}; in Python, give LAVIS's {arch} such towers and call its load_checkpoint"
        )
    own = {key: getattr(blip, key) for key in BLIP_KEYS if hasattr(blip, key)}
    # What LAVIS takes where its YAML says nothing is what this package does.
    unsaid = {key: getattr(type(blip)(), key) for key in own}
    return _section(arch, blip.model_type, own, unsaid, file)


def _section(arch: str, model_type: str | None, own: Mapping[str, Any], unsaid: Mapping[str, Any], file: Path) -> str:
    """What ``own`` changes of LAVIS's defaults for the type, which are ``unsaid`` where its YAML has none."""
    plain = registry.get_model_class(arch)
    if model_type not in plain.PRETRAINED_MODEL_CONFIG_DICT:
        model_type = PLAIN_TYPES[arch]
    written: Any = OmegaConf.to_container(OmegaConf.load(plain.default_config_path(model_type)).model)
    defaults = {**unsaid, **written}
    if "load_finetuned" not in defaults:
        return f"LAVIS's {arch} reads no checkpoint from a YAML; in Python, model.load_checkpoint({str(file)!r}) does"
    model = {"arch": arch, "model_type": model_type, "load_finetuned": True, "finetuned": str(file)}
    model.update({k: v for k, v in own.items() if k == "image_size" or k not in defaults or defaults[k] != v})
    same = ", and processors of the same image_size" if "image_size" in model else ""
    section = OmegaConf.to_yaml({"model": model}).rstrip()
    return f"LAVIS's {arch} loads it, in a YAML by these keys{same}:\n{section}"


# What the system says of a name or a disk, whoever reads or writes there.
SYSTEM_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENAMETOOLONG)
# Letters of an error: paths may be long, and some errors quote what they could not read.
LONGEST_LINE = 4000


def _line(error: Exception) -> str:
    """What an error says, as one line of bounded length."""
    # From a data loader's worker it comes with that process's traceback in front.
    text = " ".join(str(error).rpartition("AuroraError: ")[2].split())
    half = LONGEST_LINE // 2
    return text if len(text) <= LONGEST_LINE else f"{text[:half]} [...] {text[-half:]}"


def exit_on_error(action: Callable[[], None]) -> None:
    """Run; an AuroraError becomes one line on stderr and exit code 1, a signal 128 + its number."""
    use_utf8()
    try:
        action()
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read has had enough; at its end Python would flush what nobody reads.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (Exception, Stopped) as error:
        code = 1
        if isinstance(error, Stopped):
            code = 128 + error.signum
            if get_rank() == 0:
                print(error, file=sys.stderr, flush=True)
        elif isinstance(error, AuroraError) or getattr(error, "errno", None) in SYSTEM_ERRORS:
            line = _line(error)
            rank = f" [process {os.environ['RANK']}]" if "RANK" in os.environ else ""
            print(f"error{rank}: {line}", file=sys.stderr, flush=True)
        elif dist.is_initialized():
            traceback.print_exc()
            if "timed out" in str(error).lower():
                print("error: another process did not answer within run.dist_timeout_minutes", file=sys.stderr)
        else:
            raise
        if dist.is_initialized():
            # The others may wait for this process: an orderly end could wait for them in turn.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        sys.exit(code)
