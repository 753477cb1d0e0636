"""A report of the data that a run reads: what is in its splits, and what may make its figures wrong."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional

from omegaconf import DictConfig

from lavis_aurora.common.errors import AuroraError, abbreviated, printable, shown
from lavis_aurora.common.files import write_text
from lavis_aurora.common.summary import DATA_REPORT
from lavis_aurora.data.checks import FILE, checks_of
from lavis_aurora.data.media import MediaFiles
from lavis_aurora.data.texts import UNESCAPE, TokenCounter, TokenLimit, count_texts, has_entity

# A run looks at its files for so long at most; ``lavis-aurora check`` at all of them.
LOOK_SECONDS = 20.0
Level = Literal["note", "warning", "refused"]


@dataclass(eq=False)
class Split:
    """A split of one dataset.

    Attributes:
        dataset, split: their names.
        train: whether it is trained on.
        kind: image, video, or sample where entries name neither.
        counts: for ``data.json``.
        paths: of the pictures or videos, with the number of entries of each.
        ranked: whether its texts are captions, which are ranked, and not questions.
        known: whether the dataset is known to read these very paths.
    """

    dataset: str
    split: str
    train: bool
    kind: str = "sample"
    counts: dict[str, Any] = field(default_factory=dict)
    paths: Counter[str] = field(default_factory=Counter)
    ranked: bool = False
    known: bool = False

    @property
    def name(self) -> str:
        return f"{self.dataset} {self.split}"

    def line(self) -> str:
        """What is in it."""
        counts = self.counts
        if self.kind == "sample":
            return f"{self.name}: {counts['samples']} samples"
        text = f"{self.name}: {counts[f'{self.kind}s']} {self.kind}s"
        if "texts" not in counts:
            return text
        least, mean, most = counts["texts_each"]
        each = f"{least}" if least == most else f"{least} to {most}, {mean:.1f} in the mean,"
        return f"{text}, {counts['texts']} texts ({each} of each)"


class Finding(NamedTuple):
    """A line of the report.

    Attributes:
        level: note, warning (it may make figures wrong), or refused (the run would stop there).
        split: train, val or test; empty for all.
        text: begins with the name of the dataset.
    """

    level: Level
    split: str
    text: str


@dataclass
class DataReport:
    """What was found.

    Attributes:
        splits: those that the run reads.
        findings: what to know of them.
        overlaps: pictures that two splits share.
        files: different ones in ``all``, how many were ``looked`` at, and ``compared`` by content.
        tokens: where the model cuts texts; None if that is not known.
    """

    splits: list[Split] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    overlaps: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)
    tokens: Optional[TokenLimit] = None

    def add(self, level: Level, split: Split, text: str) -> None:
        self.findings.append(Finding(level, split.split, f"{split.name}: {text}"))

    def lines(self) -> list[tuple[Level, str]]:
        """All of it, for people: what is in each split, then what to know of them."""
        contents: list[tuple[Level, str]] = [("note", split.line()) for split in self.splits]
        return contents + [(finding.level, printable(finding.text)) for finding in self.findings]

    def beside(self, split: str) -> list[str]:
        """What to know of figures of a split."""
        return [printable(finding.text) for finding in self.findings if finding.split == split]

    def write(self, folder: str | Path) -> None:
        """Write ``data.json`` into a run's folder, whole or not at all.

        Raises:
            AuroraError: it cannot be written.
        """
        splits = [{"dataset": s.dataset, "split": s.split, "trained": s.train, **s.counts} for s in self.splits]
        findings = [finding._asdict() for finding in self.findings]
        parts = {"splits": splits, "findings": findings, "overlaps": self.overlaps, "files": self.files}
        write_text(Path(folder) / DATA_REPORT, json.dumps({"format": 1, **parts}, indent=1) + "\n")

    def check(self) -> None:
        """Raises AuroraError if the run would stop at something."""
        refused = [finding.text for finding in self.findings if finding.level == "refused"]
        if refused:
            raise AuroraError("; ".join(refused))


def report_data(
    datasets: Mapping[str, Mapping[str, Any]],
    cfg: Any,
    tokens: Optional[TokenLimit] = None,
    seconds: Optional[float] = LOOK_SECONDS,
    decode: bool = False,
) -> DataReport:
    """Count and compare what a run reads.

    Args:
        datasets: by name and split, of :func:`lavis_aurora.data.annotations.build_checked`.
        cfg: LAVIS's configuration, with ``run_cfg`` and ``datasets_cfg``.
        tokens: where the model cuts texts; None if that is not known.
        seconds: for how long to look at files, at most; None: at all of them.
        decode: whether to read each picture, and some frames of each video, as the run would.
    """
    run, report = cfg.run_cfg, DataReport(tokens=tokens)
    trained = [] if run.evaluate else list(run.train_splits)
    tested = [*([] if run.evaluate else run.valid_splits), *run.test_splits]
    counter = None if tokens is None else TokenCounter(tokens)
    for name, splits in datasets.items():
        for split in dict.fromkeys((*trained, *tested)):
            if split in splits:
                found = Split(name, split, split in trained)
                _read(report, found, splits[split], cfg.datasets_cfg[name], counter)
                report.splits.append(found)
    # Those to evaluate first: they are small, and more depends on them.
    order = sorted(report.splits, key=lambda split: split.train)
    files = MediaFiles((path for split in order for path in split.paths), seconds)
    for split in order if decode else ():
        files.decode(split.paths, split.kind)
    for split in report.splits:
        _check_files(report, split, files, run.max_broken_share)
    _compare_splits(report, files, tested, cfg.datasets_cfg)
    if run.evaluate and files.total and seconds is None:  # check alone: it is so in every evaluation
        text = "what is evaluated is not compared with the training data, which run.evaluate=true does not read; "
        report.findings.append(Finding("note", "", f"{text}lavis-aurora check with run.evaluate=false compares them"))
    report.files = {"all": files.total, "looked": files.looked, "compared": files.compared}
    if files.cut_short:
        text = f"{files.looked} of {files.total} files were looked at and {files.compared} compared by content"
        text += f" in {seconds:g} seconds; lavis-aurora check looks at all"
        report.findings.append(Finding("warning", "", text))
    return report


def _read(report: DataReport, split: Split, dataset: Any, cfg: DictConfig, counter: Optional[TokenCounter]) -> None:
    """Count the entries of a split, and look at its texts and ids."""
    entries = getattr(dataset, "annotation", None)
    if not isinstance(entries, list) or not entries or not isinstance(entries[0], dict):
        split.counts["samples"] = len(dataset) if hasattr(dataset, "__len__") else 0
        return
    split.counts["samples"] = len(entries)
    media = next((key for key in ("image", "video") if all(isinstance(e.get(key), str) for e in entries)), None)
    if media is None:
        return
    checks = list(checks_of(split.dataset, cfg.get("data_type"), type(getattr(dataset, "inner", dataset))))
    split.kind = media
    split.known = any(one.entries.get(media) is FILE for one in checks)
    root = getattr(dataset, "vis_root", None) or ""
    places = {file: os.path.normpath(os.path.join(root, file)) for file in {e[media] for e in entries}}
    split.paths = Counter(places[e[media]] for e in entries)
    split.counts[f"{media}s"] = len(split.paths)
    if not split.train and any(one.unique == media for one in checks):
        _refuse_repeated(report, split, [(places[e[media]], e[media]) for e in entries])
    key = next((key for key in ("caption", "question") if key in entries[0]), None)
    split.ranked = key == "caption"
    if key is not None:
        texts = [(places[e[media]], [e[key]] if isinstance(e[key], str) else e[key]) for e in entries]
        _read_texts(report, split, texts, getattr(dataset, "text_processor", None) or str, counter)
    answers = [a for e in entries for a in (e["answer"] if isinstance(e.get("answer"), list) else [e.get("answer")])]
    marked = [answer for answer in answers if isinstance(answer, str) and has_entity(answer)]
    if marked:
        text = f"{len(marked)} of {len(answers)} answers hold HTML entities, e.g. {shown(marked[0])}"
        report.add("warning", split, f"{text}; {UNESCAPE}")
    if split.train and split.ranked:
        # LAVIS knows videos by their names alone.
        ids = [e.get("image_id", e[media]) if media == "image" else e[media] for e in entries]
        _read_ids(report, split, [(places[e[media]], number) for e, number in zip(entries, ids)])


def _refuse_repeated(report: DataReport, split: Split, entries: Sequence[tuple[str, str]]) -> None:
    """Refuse a picture that is to be ranked twice, by whatever path: a text would be right for one alone."""
    first: dict[str, int] = {}
    for i, (path, name) in enumerate(entries):
        before = first.setdefault(path, i)
        if before != i:
            names = f"entries {before} ({shown(entries[before][1])}) and {i} ({shown(name)})"
            report.add("refused", split, f"{names} are one {split.kind}, {path}; make them one, with all captions")
            return


def _read_texts(
    report: DataReport,
    split: Split,
    texts: Sequence[tuple[str, Sequence[str]]],
    process: Any,
    counter: Optional[TokenCounter],
) -> None:
    """Say what happens to texts on their way to the model."""
    try:
        counts = count_texts(texts, process, counter)
    except AuroraError as error:
        report.add("refused", split, str(error))
        return
    split.counts |= asdict(counts)
    shared = "with other ids, training takes them for wrong" if split.train else "each is right for all of these"
    key = f"datasets.{split.dataset}.text_processor.{'train' if split.train else 'eval'}.max_words"
    words = (getattr(process, "max_words", 0), key)
    for level, text in counts.lines(split.kind, shared if split.ranked else None, words, report.tokens):
        report.add(level, split, text)


def _read_ids(report: DataReport, split: Split, entries: Sequence[tuple[str, Any]]) -> None:
    """Compare pictures and their ids, by which training knows what is right."""
    ids: dict[str, set[Any]] = defaultdict(set)
    pictures: dict[Any, set[str]] = defaultdict(set)
    for path, number in entries:
        ids[path].add(number)
        pictures[number].add(path)
    several, shared = ([one for one, others in group.items() if len(others) > 1] for group in (ids, pictures))
    split.counts |= {"ids": len(pictures), "several_ids": len(several), "shared_ids": len(shared)}
    if len(pictures) == 1 < len(ids):
        report.add(
            "refused",
            split,
            f"all {len(ids)} {split.kind}s have the id {shown(shared[0])}, so that every text would be "
            f"right for every {split.kind}; give each {split.kind} its own",
        )
        return
    if several:
        path = several[0]
        names = abbreviated(sorted(map(shown, ids[path])))
        report.add(
            "warning",
            split,
            f"{len(several)} {split.kind}s have several ids, e.g. {path}: {names}; training takes its "
            f"texts for wrong under the other ids; give each {split.kind} one",
        )
    if shared:
        number = shared[0]
        names = abbreviated(sorted(pictures[number]))
        report.add(
            "warning",
            split,
            f"{len(shared)} ids are those of several {split.kind}s, e.g. {shown(number)}: {names}; "
            f"training takes them for one {split.kind}; give each its own",
        )


def _check_files(report: DataReport, split: Split, files: MediaFiles, allowed: float) -> None:
    """Refuse what would stop the run at a file that is missing: any but a few videos to train on."""
    missing = files.missing(split.paths)
    split.counts["missing"] = len(missing)
    entries, total = sum(split.paths[path] for path in missing), split.counts["samples"]
    if not missing:
        return
    text = f"cannot read {len(missing)} of {len(split.paths)} {split.kind}s, "
    text += f"which {entries} of {total} entries name: {abbreviated(f'{p} ({why})' for p, why in missing.items())}"
    spared = split.train and split.kind == "video"
    if spared and entries <= allowed * total:
        report.add("warning", split, f"{text}; others are trained on in their place")
    elif not split.known:
        report.add("warning", split, text)
    else:
        share = f", or raise run.max_broken_share, {allowed:g}" if spared else ""
        report.add("refused", split, f"{text}; put them there, or leave their entries out of the annotations{share}")


def _compare_splits(report: DataReport, files: MediaFiles, tested: Sequence[str], datasets: DictConfig) -> None:
    """Compare splits to evaluate with those to train on, with each other, and with themselves."""
    held_out = [split for split in report.splits if split.split in tested and split.paths]
    for split in held_out:
        if split.ranked:
            _find_copies(report, split, files)
        for other in report.splits:
            if other.paths and other is not split and (other.train or other in held_out[: held_out.index(split)]):
                _find_overlap(report, split, other, files, datasets)


def _find_copies(report: DataReport, split: Split, files: MediaFiles) -> None:
    copies = files.repeated(split.paths)
    split.counts["copies"] = len(copies)
    if copies:
        names = abbreviated((f"{one} and {other}" for one, other in copies.items()), 2)
        report.add(
            "warning",
            split,
            f"{len(copies)} {split.kind}s have the same content as another: {names}; the texts of either are wrong "
            f"for the other, and no model can tell them apart",
        )


def _find_overlap(report: DataReport, split: Split, other: Split, files: MediaFiles, datasets: DictConfig) -> None:
    """Say which pictures of a split to evaluate are in another one."""
    same, copies = files.shared(split.paths, other.paths)
    both = same | copies
    if not both:
        return
    found = {"split": split.name, "other": other.name, "by_file": len(same), "by_content": len(copies)}
    report.overlaps.append({**found, "examples": [list(pair) for pair in islice(both.items(), 3)]})
    names = abbreviated((f"{one} ({there})" if one != there else one for one, there in both.items()), 2)
    text = (
        f"{len(both)} of {len(split.paths)} {split.kind}s are in {other.name} too ({len(same)} as the same file, "
        f"{len(copies)} as a copy): {names}"
    )
    if not other.train:
        text += f"; if {other.split} chooses the best epoch, it is chosen on what is tested: set run.valid_splits=[]"
    elif _holds_vqa_val(other, datasets) and split.split == "val":
        text += (
            "; LAVIS's own annotations of VQAv2 train on vqa_val.json: figures of val are of what was trained on; "
            f"leave it out of datasets.{other.dataset}.build_info.annotations.train, or set run.valid_splits=[]"
        )
    else:
        text += "; figures of it are of what was trained on"
    report.add("warning", split, text)


def _holds_vqa_val(split: Split, datasets: DictConfig) -> bool:
    storage = datasets[split.dataset].build_info.annotations[split.split].storage
    files = [storage] if isinstance(storage, str) else storage
    return split.dataset == "coco_vqa" and any(os.path.basename(file) == "vqa_val.json" for file in files)
