"""Files of a split: pictures or clips and the json that names them, written whole or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lavis_aurora.demo.scenes import check_splits, domain_of

# Writes files into a folder, (folder, split, rng) -> name and caption of each once it is written, without end.
WriteSamples = Callable[[Path, str, np.random.Generator], Iterator[tuple[str, str]]]


def _write_split(
    folder: Path, domain: str, split: str, count: int, seed: int, kind: str, samples: WriteSamples
) -> None:
    """Writes `folder/<domain>_<split>.json` and what it names under `folder/<kind>s`."""
    rng = np.random.default_rng(zlib.crc32(f"{seed}/{domain}/{split}".encode()))
    place = Path(domain) / split
    (folder / f"{kind}s" / place).mkdir(parents=True)
    written = samples(folder / f"{kind}s" / place, split, rng)
    rows = []
    for index in tqdm(range(count), desc=f"{domain} {split}", unit=kind):
        name, caption = next(written)
        rows.append(
            {
                kind: (place / name).as_posix(),
                # LAVIS reads an evaluation caption as a list; a plain string it would split into letters
                "caption": caption if split == "train" else [caption],
                f"{kind}_id": f"{domain}_{split}_{index:05d}",
            }
        )
    (folder / f"{domain}_{split}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def write_splits(
    folder: str | Path, domain: str, counts: Mapping[str, int], seed: int, kind: str, samples: WriteSamples
) -> dict[str, Path]:
    """Writes splits of one domain in the format of LAVIS's retrieval datasets.

    A split is `folder/<domain>_<split>.json` and files in `folder/<kind>s/<domain>/<split>`. A json row has `<kind>`
    (relative to `folder/<kind>s`), `<kind>_id` and `caption`: a string for train, a list of one string for val and
    test. A json is in place only when its files are; splits that stand already are replaced, others left alone.

    Args:
        folder: made if missing.
        domain: "clean" or "shifted".
        counts: split ("train", "val", "test") -> number of samples.
        seed: of what `samples` draws.
        kind: "image" or "video".
        samples: writes them.

    Returns:
        The path of each split's json.

    Raises:
        ValueError: for an unknown domain, an unknown split, or a negative count.
    """
    domain_of(domain)
    check_splits([*counts])
    for split, count in counts.items():
        if count < 0:
            raise ValueError(f"count of {split!r} is {count}: give 0 or more")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    done = {}
    # inside `folder`, so that moving is a rename on one file system
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished_") as unfinished:
        for split, count in counts.items():
            _write_split(Path(unfinished), domain, split, count, seed, kind, samples)
        for split in counts:
            done[split] = folder / f"{domain}_{split}.json"
            # the json goes first and comes last: where one stands, its files are complete
            done[split].unlink(missing_ok=True)
            place = Path(f"{kind}s") / domain / split
            shutil.rmtree(folder / place, ignore_errors=True)
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (Path(unfinished) / place).rename(folder / place)
            (Path(unfinished) / done[split].name).rename(done[split])
    return done
