"""Seconds and recall of the search index beside plain numpy and other libraries, on made-up entries.

    python scripts/bench_search.py --entries 100000
    python scripts/bench_search.py --entries 300000 --beside faiss hnswlib

Entries lie around centres, as features of pictures do; a query is an entry and as much noise again. Recall is the
share of the true best ones, by numpy, among those found. faiss (``pip install faiss-cpu``) and hnswlib are asked
where they are named and installed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lavis_aurora.search.files import PICTURE, FileState
from lavis_aurora.search.ranking import best_first
from lavis_aurora.search.store import Entry, Store

Features = NDArray[np.float32]
# The numbers of entries found for a query (d,).
Search = Callable[[Features], Sequence[int]]
WRITE = 1024


def made_up(count: int, width: int, queries: int, seed: int = 0) -> tuple[Features, Features]:
    """Normalised features of entries, (count, width), and of queries, (queries, width)."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(1, count // 100), width), dtype=np.float32)
    entries = centres[rng.integers(len(centres), size=count)]
    entries += rng.standard_normal((count, width), dtype=np.float32)
    asked = entries[rng.integers(count, size=queries)] + rng.standard_normal((queries, width), dtype=np.float32)
    return tuple(x / np.linalg.norm(x, axis=1, keepdims=True) for x in (entries, asked))  # type: ignore[return-value]


def with_numpy(entries: Features, top: int) -> Search:
    """All entries compared in main memory."""

    def search(query: Features) -> Sequence[int]:
        scores = entries @ query
        best = np.argpartition(-scores, top)[:top]
        found: list[int] = best[np.argsort(-scores[best])].tolist()
        return found

    return search


def with_index(entries: Features, top: int, folder: Path, probes: int | None) -> Search:
    """The store of :class:`lavis_aurora.search.PictureIndex`, on disk; exact without ``probes``."""
    store = Store(str(folder))
    if not (folder / "entries.lance").exists():
        store.create(entries.shape[1])
        for start in range(0, len(entries), WRITE):
            part = enumerate(entries[start : start + WRITE], start)
            store.put([Entry(str(i), PICTURE, FileState(0, 0, str(i)), feature) for i, feature in part])
        store.tidy()
    elif probes is not None and probes == 8:
        store.build_index(len(entries))
    return lambda query: [int(one.path) for one in best_first(store.nearest(query, top, None, probes), query)]


def with_faiss(entries: Features, top: int) -> Search:
    """faiss's HNSW graph, in main memory."""
    import faiss

    index = faiss.IndexHNSWFlat(entries.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction, index.hnsw.efSearch = 200, 200
    index.add(entries)
    return lambda query: index.search(query[None], top)[1][0].tolist()


def with_hnswlib(entries: Features, top: int) -> Search:
    """hnswlib's graph, in main memory."""
    import hnswlib

    index = hnswlib.Index(space="ip", dim=entries.shape[1])
    index.init_index(max_elements=len(entries), M=32, ef_construction=200)
    index.add_items(entries)
    index.set_ef(200)
    return lambda query: index.knn_query(query[None], k=top)[0][0].tolist()


def measured(name: str, build: Callable[[], Search], queries: Features, true: Sequence[Sequence[int]]) -> str:
    """A row of the table."""
    start = time.perf_counter()
    search = build()
    built = time.perf_counter() - start
    search(queries[0])
    seconds, found = [], []
    for query in queries:
        start = time.perf_counter()
        found.append(search(query))
        seconds.append(time.perf_counter() - start)
    recall = np.mean([len(set(one) & set(right)) / len(right) for one, right in zip(found, true)])
    same = sum(list(one) == list(right) for one, right in zip(found, true))
    return f"{name:<24}{built:>10.1f}{1000 * statistics.median(seconds):>12.1f}{recall:>10.3f}{same:>8}"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=256, help="of features; BLIP's have 256")
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--top", type=int, default=10)
    parser.add_argument("--beside", nargs="*", default=[], choices=["faiss", "hnswlib"])
    args = parser.parse_args(argv)
    entries, queries = made_up(args.entries, args.width, args.queries)
    true = [with_numpy(entries, args.top)(query) for query in queries]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ways: dict[str, Callable[[], Search]] = {
            "numpy": lambda: with_numpy(entries, args.top),
            "index, exact": lambda: with_index(entries, args.top, folder, None),
        }
        for probes in (8, 16, 32, 64):
            ways[f"index, {probes} probes"] = lambda probes=probes: with_index(entries, args.top, folder, probes)
        others: dict[str, Any] = {"faiss": with_faiss, "hnswlib": with_hnswlib}
        ways |= {f"{one}, HNSW": lambda one=one: others[one](entries, args.top) for one in args.beside}
        print(f"{args.entries:,} entries of {args.width} numbers, {len(queries)} queries, {os.cpu_count()} CPUs")
        print(f"{'':<24}{'built, s':>10}{'query, ms':>12}{f'R@{args.top}':>10}{'same':>8}", flush=True)
        for way, build in ways.items():
            print(measured(way, build, queries, true), flush=True)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"the index takes {size / 1e6:.0f} MB on disk; the features alone are {entries.nbytes / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
