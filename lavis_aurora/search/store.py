"""Entries of an index in LanceDB; nothing else knows the engine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lavis_aurora.common.errors import AuroraError, shown
from lavis_aurora.search.files import FileState

if TYPE_CHECKING:
    from lancedb.table import Table

ENTRIES, BROKEN, ABOUT = "entries", "broken", "about"
# Versions that others may still read.
KEPT = timedelta(hours=1)
# Values in one statement.
AT_ONCE = 500
# Of the approximate index: candidates whose exact score is computed, for each that is asked for.
REFINED = 20
# Its entries in a part.
PART = 4096


class Entry(NamedTuple):
    """A picture or clip of an index.

    Attributes:
        path: below the folder, with ``/`` between names.
        kind: picture or clip.
        state: of its file when it was read.
        feature: normalised, (d,), float32.
    """

    path: str
    kind: str
    state: FileState
    feature: NDArray[np.float32]


def _engine() -> tuple[Any, Any]:
    """LanceDB and Arrow.

    Raises:
        AuroraError: they are not installed.
    """
    os.environ.setdefault("LANCEDB_LOG", "error")  # it warns of tables that it will make
    try:
        import lancedb
        import pyarrow
    except ImportError as error:
        raise AuroraError(f'an index needs LanceDB ({error}): pip install "lavis-aurora[search]"') from error
    return lancedb, pyarrow


class Store:
    """The tables of an index.

    Args:
        place: a folder, or an address of object storage, e.g. ``s3://bucket/index``.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        lancedb, self._arrow = _engine()
        with self._readable():
            # What others have written meanwhile is seen.
            self._db = lancedb.connect(place, read_consistency_interval=timedelta(0))
            self._tables: dict[str, Table] = {}

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Errors of the engine, of which each part has its own, as one line.

        Raises:
            AuroraError: it cannot read or write the index.
        """
        try:
            yield
        except (MemoryError, AuroraError):
            raise
        except Exception as error:
            words = " ".join(str(error).split())
            raise AuroraError(f"the index {self.place} cannot be used ({words}); make it anew elsewhere") from error

    def _table(self, name: str) -> Table:
        if name not in self._tables:
            self._tables[name] = self._db.open_table(name)
        return self._tables[name]

    def settings(self) -> dict[str, Any] | None:
        """What was last written by :meth:`write_settings`; None for an index that is not there."""
        with self._readable():
            # LanceDB for Python 3.9 knows the older name alone.
            newer = hasattr(self._db, "list_tables")
            if ABOUT not in (self._db.list_tables().tables if newer else self._db.table_names()):
                return None
            [row] = self._table(ABOUT).to_arrow().to_pylist()
            found: dict[str, Any] = json.loads(row["settings"])
            return found

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """JSON values that say what the index is of."""
        with self._readable():
            table = self._arrow.table({"settings": [json.dumps(settings)]})
            self._tables[ABOUT] = self._db.create_table(ABOUT, table, mode="overwrite")

    def create(self, width: int) -> None:
        """Empty tables of features (width,); those that are there stay."""
        arrow = self._arrow
        state = [("path", arrow.string()), ("size", arrow.int64()), ("mtime_ns", arrow.int64())]
        state.append(("digest", arrow.string()))
        feature = ("feature", arrow.list_(arrow.float32(), width))
        with self._readable():
            for name, more in ((ENTRIES, [("kind", arrow.string()), feature]), (BROKEN, [("why", arrow.string())])):
                self._tables[name] = self._db.create_table(name, schema=arrow.schema(state + more), exist_ok=True)

    def __len__(self) -> int:
        with self._readable():
            return int(self._table(ENTRIES).count_rows())

    def states(self) -> dict[str, FileState]:
        """Of all entries by path."""
        return {row["path"]: _state(row) for row in self._rows(ENTRIES, ("path", *FileState._fields))}

    def broken(self) -> dict[str, tuple[FileState, str]]:
        """Of the files that could not be read, and why."""
        rows = self._rows(BROKEN, ("path", *FileState._fields, "why"))
        return {row["path"]: (_state(row), row["why"]) for row in rows}

    def _rows(self, table: str, columns: Sequence[str], where: str | None = None) -> list[dict[str, Any]]:
        with self._readable():
            query = self._table(table).search().select(list(columns))
            if where is not None:
                query = query.where(where)
            rows: list[dict[str, Any]] = query.to_arrow().to_pylist()
            return rows

    def put(self, entries: Sequence[Entry]) -> None:
        """Add entries, or replace those of their paths; all at once or none."""
        if not entries:
            return
        with self._readable():
            table = self._table(ENTRIES)
            schema = table.schema
            values = self._arrow.array(np.concatenate([entry.feature for entry in entries]), self._arrow.float32())
            columns = self._state_columns([(entry.path, entry.state) for entry in entries])
            columns["kind"] = [entry.kind for entry in entries]
            columns["feature"] = self._arrow.FixedSizeListArray.from_arrays(values, len(entries[0].feature))
            self._upsert(table, self._arrow.table(columns, schema=schema))

    def put_broken(self, broken: Sequence[tuple[str, FileState, str]]) -> None:
        """Note files that cannot be read."""
        if not broken:
            return
        with self._readable():
            table = self._table(BROKEN)
            columns = {**self._state_columns([one[:2] for one in broken]), "why": [why for _, _, why in broken]}
            self._upsert(table, self._arrow.table(columns, schema=table.schema))

    @staticmethod
    def _state_columns(states: Sequence[tuple[str, FileState]]) -> dict[str, Any]:
        columns: dict[str, Any] = {"path": [path for path, _ in states]}
        return {**columns, **{key: [getattr(state, key) for _, state in states] for key in FileState._fields}}

    @staticmethod
    def _upsert(table: Table, rows: Any) -> None:
        table.merge_insert("path").when_matched_update_all().when_not_matched_insert_all().execute(rows)

    def remove(self, paths: Iterable[str], broken: bool = False) -> None:
        """Forget entries, or files that could not be read."""
        for part in _parts(paths):
            with self._readable():
                self._table(BROKEN if broken else ENTRIES).delete(_among("path", part))

    def features(self, digests: Iterable[str]) -> dict[tuple[str, str], NDArray[np.float32]]:
        """Of entries by kind and digest."""
        columns = ("kind", "digest", "feature")
        rows = [row for part in _parts(digests) for row in self._rows(ENTRIES, columns, _among("digest", part))]
        return {(row["kind"], row["digest"]): np.array(row["feature"], np.float32) for row in rows}

    def nearest(
        self, query: NDArray[np.float32], count: int, where: str | None = None, probes: int | None = None
    ) -> list[Entry]:
        """The entries of the largest cosine similarity with a query (d,), not in order of it.

        Args:
            query: normalised.
            count: of entries.
            where: a condition in SQL on ``path``, ``kind``, ``size`` and ``mtime_ns``.
            probes: parts of the approximate index that are searched; None: all entries are compared.
        """
        with self._readable():
            search: Any = self._table(ENTRIES).search(query, vector_column_name="feature")
            search = search.distance_type("dot")
            if probes is None:
                search = search.bypass_vector_index()
            else:
                search = search.nprobes(probes).refine_factor(REFINED)
            if where is not None:
                search = search.where(where, prefilter=True)
            columns = ["path", "kind", "size", "mtime_ns", "digest", "feature", "_distance"]
            try:
                found = search.select(columns).limit(count).to_arrow()
            except Exception as error:
                if where is None:
                    raise
                words = " ".join(str(error).split())
                raise AuroraError(
                    f"where: {shown(where)} cannot be used ({words}); it is SQL over path, kind, size and mtime_ns, "
                    f"e.g. kind = 'clip' or path LIKE 'holiday/%'"
                ) from error
        rows = found.select(columns[:5]).to_pylist()
        features = _matrix(found)
        return [Entry(row["path"], row["kind"], _state(row), features[i]) for i, row in enumerate(rows)]

    def build_index(self, count: int) -> None:
        """The engine's approximate index over all entries, of ``count``."""
        from lancedb.index import IvfPq

        table, parts = self._table(ENTRIES), self.parts(count)
        with self._readable():
            if "config" in signature(table.create_index).parameters:
                table.create_index("feature", config=IvfPq(distance_type="dot", num_partitions=parts))
            else:  # LanceDB for Python 3.9 knows the older form alone
                table.create_index("dot", parts, vector_column_name="feature", index_type="IVF_PQ")

    @staticmethod
    def parts(count: int) -> int:
        """Of the approximate index over ``count`` entries."""
        return max(1, count // PART)

    def tidy(self) -> None:
        """Join the parts that many small writes leave, add what is new to the approximate index, if there is one."""
        with self._readable():
            for name in (ENTRIES, BROKEN):
                self._table(name).optimize(cleanup_older_than=KEPT)


def _state(row: Mapping[str, Any]) -> FileState:
    return FileState(row["size"], row["mtime_ns"], row["digest"])


def _matrix(table: Any) -> NDArray[np.float32]:
    """Its features, (rows, d)."""
    column = table["feature"].combine_chunks()
    return np.asarray(column.flatten(), np.float32).reshape(-1, column.type.list_size)


def _parts(values: Iterable[str]) -> Iterator[list[str]]:
    values = list(values)
    return (values[i : i + AT_ONCE] for i in range(0, len(values), AT_ONCE))


def _among(column: str, values: Iterable[str]) -> str:
    """A condition in SQL."""
    quoted = ("'" + value.replace("'", "''") + "'" for value in values)
    return f"{column} IN ({', '.join(quoted)})"
