"""What the commands say and write, runs apart (training/start.py); and how they end where something cannot be."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from lavis.common.dist_utils import get_rank
from lavis.common.registry import registry
from omegaconf import OmegaConf
from torch import Tensor, nn

from lavis_aurora.adapters.arithmetic import Products, compare_companions, compare_updates
from lavis_aurora.adapters.card import describe, metrics, without_numbers
from lavis_aurora.adapters.config import CONFIG, TENSORS, read_adapter, read_adapter_config
from lavis_aurora.adapters.files import truncated_adapter, write_adapter
from lavis_aurora.adapters.hub import local_folder
from lavis_aurora.adapters.sets import KINDS
from lavis_aurora.adapters.switching import adapters_of
from lavis_aurora.common.errors import AuroraError, abbreviated, did_you_mean, printable
from lavis_aurora.common.files import use_utf8
from lavis_aurora.common.paths import package_file
from lavis_aurora.mode_approx.layers import AdaptedLayer
from lavis_aurora.models.loading import read_state_dict
from lavis_aurora.project import load_config
from lavis_aurora.training.guards import Stopped


def inspect(path: str) -> str:
    """What an adapter folder or a file of weights holds, as text.

    Raises:
        AuroraError: it is neither.
    """
    place = local_folder(path, (CONFIG, TENSORS))
    if place.name in (CONFIG, TENSORS) and place.with_name(CONFIG).is_file():
        place = place.parent
    below = sorted(file.parent for file in place.rglob(CONFIG)) if place.is_dir() else []
    if below and place not in below:
        return _adapter_list(below)
    if not place.is_dir():
        return _tensor_table(read_state_dict(str(place), "inspect"))
    config, tensors = read_adapter(place)
    rows = [f"{key:<16} {value}" for key, value in describe(config).items()]
    return "\n".join([*rows, "", _tensor_table(tensors)])


def _adapter_list(folders: Iterable[Path]) -> str:
    """Adapters, a line each: what they are of, and what was measured."""
    rows = []
    for folder in folders:
        try:
            config = read_adapter_config(folder)
        except AuroraError as error:
            rows.append((str(folder), str(error)))
            continue
        # With the split: a run's best adapter has the test's, its last one may have the validation's alone.
        said, last = describe(config), ["", *(f"{split}: {found}" for split, found in metrics(config).items())][-1]
        slots = f"; slots {said['slots']}" if said["slots"] else ""
        words = f"{said['model']}; {config.kind}: {said[config.kind]}{slots}; base {said['base']}; {last}"
        rows.append((str(folder), words))
    width = max(len(folder) for folder, _ in rows)
    return "\n".join(f"{folder:<{width}}  {words.rstrip('; ')}" for folder, words in rows)


def diff(first: str, second: str) -> str:
    """How two adapters differ, as text: settings, then norms and cosines of updates by tower and layer.

    Raises:
        AuroraError: one of them cannot be read, or is no update of weights.
    """
    read = [read_adapter(folder) for folder in (first, second)]
    (ours, own), (theirs, other) = read
    lines = [f"A  {first}", f"B  {second}", ""]
    said = [describe(config) for config in (ours, theirs)]
    for key in dict.fromkeys([*said[0], *said[1]]):
        a, b = (" ".join(one.get(key, "-").split()) for one in said)
        lines += [] if a == b else [f"{key}: A {a}", f"{'':<{len(key)}}  B {b}"]
    updates = compare_updates(*read)
    if (ours.kind, list(ours.slots)) != (theirs.kind, list(theirs.slots)):
        lines.append("They update other weights: their hashes do not tell whether the backbone is the same.")
    elif ours.base.sha256 != theirs.base.sha256:
        lines.append("They are of other backbones: what follows compares updates of different weights.")
    for name, config in (("A", ours), ("B", theirs)):
        alone = [slot for slot in config.slots if slot not in updates]
        lines += [f"only in {name}: {len(alone)} slots, {abbreviated(alone)}"] if alone else []
    groups: dict[tuple[str, str], Products] = defaultdict(Products)
    for slot, products in updates.items():
        module = slot.rpartition(".")[0] or slot
        tower, layer = without_numbers(f"{module}.")[:-1], " ".join(re.findall(r"(?<=\.)\d+(?=\.)", f"{module}."))
        groups[tower, layer] += products
        groups[tower, "all"] += products
    for key, products in compare_companions(own, other, [KINDS[c.kind].prefix for c in (ours, theirs)]).items():
        groups[without_numbers(key), ""] += products
    width = max((len(tower) for tower, _ in groups), default=5)
    lines += ["", f"{'tower':<{width}} {'layer':>6} {'norm A':>10} {'norm B':>10} {'of A - B':>10} {'cosine':>8}"]
    for (tower, layer), products in sorted(groups.items(), key=lambda row: _by_number(*row[0])):
        numbers = " ".join(f"{norm:>10.4g}" for norm in products.norms)
        lines.append(f"{tower:<{width}} {layer:>6} {numbers} {products.cosine:>8.4f}")
    return "\n".join(lines)


def _by_number(tower: str, layer: str) -> tuple[str, bool, list[int]]:
    """Layers in their order, then all of them."""
    return tower, layer == "all", [int(number) for number in layer.split() if number.isdigit()]


def _tensor_table(tensors: Mapping[str, Tensor]) -> str:
    """Counts by name; numbers in names are left out, so that layers of a kind share a row."""
    rows: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for name, tensor in sorted(tensors.items()):  # the order in a safetensors file means nothing
        key = (printable(without_numbers(name)), _shape(tensor), str(tensor.dtype).removeprefix("torch."))
        rows[key].append(tensor.numel())
    width = max((len(name) for name, _, _ in rows), default=4)
    wide = max([12, *(len(shape) for _, shape, _ in rows)])  # of a convolution, four sides
    lines = [f"{'name':<{width}}  {'shape':<{wide}}  {'dtype':<10}{'tensors':>8}{'numbers':>14}"]
    lines += [
        f"{name:<{width}}  {shape:<{wide}}  {kind:<10}{len(counts):>8}{sum(counts):>14,}"
        for (name, shape, kind), counts in rows.items()
    ]
    total = sum(tensor.numel() for tensor in tensors.values())
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return "\n".join([*lines, f"{len(tensors)} tensors, {total:,} numbers, {size / 1e6:.2f} MB"])


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "number"


def truncate(adapter: str, rank: int, output: str | None = None) -> str:
    """Write an adapter cut to its first components; where it is, and its size, as text.

    Args:
        adapter: a folder, or USER/NAME of the hub.
        rank: how many components.
        output: the folder to write; by default one beside the folder, with the rank in its name.

    Raises:
        AuroraError: the folder is there already, or the adapter has no such rank.
    """
    config, tensors = truncated_adapter(*read_adapter(adapter), rank, adapter)
    source = Path(os.path.abspath(Path(adapter).expanduser()))  # "." has no name
    if output is None and not source.exists():
        raise AuroraError(f"--out: name the folder to write; {adapter} is of the hub")
    folder = source.with_name(f"{source.name}_rank{rank}") if output is None else Path(output).expanduser()
    if folder.exists():
        raise AuroraError(f"{folder} is there already; name another folder by --out")
    write_adapter(folder, config, tensors)
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
            rows[(without_numbers(f"{path}.{weight}"), _shape(parameter), kinds)] += names
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
    return slot[len(layer) + 1 :] if slot.startswith(f"{layer}.") else without_numbers(slot)


# What the system says of a name or a disk, whoever reads or writes there.
SYSTEM_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM),
)
# Letters of an error: paths may be long, and some errors quote what they could not read.
LONGEST_LINE = 4000


def _line(error: Exception) -> str:
    """What an error says, as one line of bounded length."""
    # From a data loader's worker it comes with that process's traceback in front.
    text = " ".join(str(error).rpartition("AuroraError: ")[2].split())
    half = LONGEST_LINE // 2
    return text if len(text) <= LONGEST_LINE else f"{text[:half]} [...] {text[-half:]}"


def exit_on_error(action: Callable[[], None]) -> None:
    """Run; an AuroraError becomes one line on stderr and its exit status, a signal 128 + its number."""
    use_utf8()
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")  # twice the limit PIL refuses
    try:
        action()
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read has had enough; at its end Python would flush what nobody reads.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (Exception, Stopped) as error:
        code = error.exit_status if isinstance(error, AuroraError) else 1
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
