"""What an adapter is, in words: for ``inspect``, and as the model card beside what is exported."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from lavis_aurora.adapters.config import CONFIG, TENSORS, AdapterConfig, read_adapter
from lavis_aurora.adapters.hub import push_files
from lavis_aurora.common.errors import AuroraError, printable
from lavis_aurora.common.files import read_json
from lavis_aurora.common.summary import DATA_REPORT

CARD = "README.md"


def describe(config: AdapterConfig) -> dict[str, str]:
    """The settings, by what they are called."""
    widths: dict[str, int] = defaultdict(int)
    for d_in, d_out in config.slots.values():
        widths[f"{d_in} x {d_out}"] += 1
    model = config.model
    lines = {
        "model": " ".join(str(model[key]) for key in ("arch", "model_type") if model.get(key)) or "any nn.Module",
        "base": f"{config.base.name or 'without a name'} (sha256 {config.base.sha256[:12]})",
        # Which layers were targeted, the slots say.
        config.kind: ", ".join(f"{key} {value}" for key, value in _settings(config).items()),
        "slots": ", ".join(f"{count} of {shape}" for shape, count in widths.items()),
        "targets": f"\n{'':<17}".join(_slot_groups(config.slots)),
    }
    for key, value in (model.get("settings") or {}).items():
        words = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        lines.setdefault(key, words)
    lines.update({f"metrics: {key}": text for key, text in metrics(config).items()})
    lines["written by"] = ", ".join(f"{key} {value}" for key, value in config.versions.items())
    if config.format == 1:
        lines["checksum"] = "of the tensors alone (an older version's); load and save the adapter to cover all"
    return lines


def _settings(config: AdapterConfig) -> dict[str, object]:
    """Those that are set; what nested training would do only where it was done."""
    given = {key: value for key, value in vars(config.settings).items() if value is not None}
    return {key: value for key, value in given.items() if given.get("nested") or not key.startswith("nested")}


def metrics(config: AdapterConfig) -> dict[str, str]:
    """What was measured with it, by split."""
    found = {}
    for key, value in config.metrics.items():
        parts = value if isinstance(value, dict) else {"": value}
        numbers = (f"{k} {v:.4g}".strip() if isinstance(v, (int, float)) else f"{k} {v}" for k, v in parts.items())
        found[key] = ", ".join(text for text in numbers if not re.search("chance|_itc_|_lavis_", text))
    return found


def _slot_groups(slots: Iterable[str]) -> list[str]:
    """Slots by their module, layers of a kind together: 'blocks.*.attn.qkv: query, key, value'."""
    groups: dict[str, dict[str, None]] = defaultdict(dict)
    for slot in map(without_numbers, slots):
        module, _, name = slot.rpartition(".")
        groups[module][name] = None
    return [f"{module}: {', '.join(names)}" if module else ", ".join(names) for module, names in groups.items()]


def without_numbers(name: str) -> str:
    """A layer's name with ``*`` for numbers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def model_card(
    config: AdapterConfig, library: str, usage: str, adapter: str | Path | None = None, notes: Iterable[str] = ()
) -> str:
    """``README.md`` of a folder that is shared: what it is, how it is used, settings, data and metrics.

    Args:
        config: of the adapter.
        library: that loads the folder, as the hub calls it: peft, transformers, lavis_aurora.
        usage: Python that loads it.
        adapter: its folder; the data are those that the report of the run around it tells.
        notes: what must be known besides, a sentence each.
    """
    said = describe(config)
    rows = {
        key: "; ".join(" ".join(line.split()) for line in value.splitlines())
        for key, value in said.items()
        if not key.startswith("metrics: ")
    }
    sections = [
        f"---\nlibrary_name: {library}\ntags:\n- aurora\n- {config.kind.replace('_', '-')}\n---",
        f"# {rows['model']}, tuned by {config.kind}",
        f"Made by lavis_aurora from {rows['base']}. Nothing here is code.",
        f"## Use\n\n```python\n{usage.strip()}\n```",
        *(["\n".join(f"- {note}" for note in notes)] if notes else []),
        _table("Settings", rows),
        _table("Data", _data(adapter)),
        _table("Metrics (percent)", metrics(config)),
    ]
    return printable("\n\n".join(section for section in sections if section) + "\n", keep="\n")


def push_adapter(folder: str | Path, repository: str, private: bool = False) -> str:
    """Share an adapter on the Hugging Face hub: its two files, and a model card unless the folder has one.

    Args:
        folder: of the adapter, which is checked first.
        repository: USER/NAME; made if need be.
        private: make it a private one, if it is made.

    Returns:
        USER/NAME@COMMIT, by which ``load_adapter`` loads this very adapter.

    Raises:
        AuroraError: the folder cannot be read, or the hub refuses it.
    """
    place = Path(folder).expanduser()
    config, _ = read_adapter(place)
    card = place / CARD
    content: Path | bytes = card
    if not card.is_file():
        arch = config.model.get("arch")
        usage = f"from lavis_aurora import load_adapter\n\nload_adapter(model, {repository!r})  # of the same layers"
        if arch:
            call = f"load_model_and_preprocess({arch!r}, adapter={repository!r})"
            usage = f"from lavis_aurora import load_model_and_preprocess\n\nmodel, vis, txt = {call}"
        content = model_card(config, "lavis_aurora", usage, place).encode()
    files = {CONFIG: place / CONFIG, TENSORS: place / TENSORS, CARD: content}
    return f"{repository}@{push_files(files, repository, private, 'Adapter of lavis_aurora')}"


def _table(title: str, rows: Mapping[str, str]) -> str:
    if not rows:
        return ""
    cells = ((key.replace("|", r"\|"), value.replace("|", r"\|")) for key, value in rows.items())
    return "\n".join([f"## {title}", "", "| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in cells)])


def _data(adapter: str | Path | None) -> dict[str, str]:
    """What the data of the run around an adapter's folder were, by split; as far as its report is there."""
    rows: dict[str, str] = {}
    if adapter is None:
        return rows
    try:
        for split in read_json(Path(adapter).expanduser().absolute().parent / DATA_REPORT)["splits"]:
            counts = [f"{split[key]:,} {key}" for key in ("samples", "images", "videos", "texts") if split.get(key)]
            use = "trained on" if split["trained"] else "evaluated"
            rows[f"{split['dataset']}, {split['split']}"] = f"{use}: {', '.join(counts)}"
    except (AuroraError, KeyError, TypeError, ValueError):  # none, or not a run's
        return {}
    return rows
