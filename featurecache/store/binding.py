"""The join: one manifest with the key and state of each cell (sample, view, ordinal), kept in the index as Parquet."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurecache.errors import CorruptionError, InputError, did_you_mean
from featurecache.store.index import Index
from featurecache.store.recipe import KEY_BYTES, canonical_json
from featurecache.store.records import load_failures
from featurecache.store.schema import next_generation
from featurecache.store.tablehash import hash_table

STATES = ("done", "absent", "failed", "pending")
STORED = (
    "name", "manifest_path", "manifest_digest", "digest", "multi", "config", "recipes",
    "samples", "cells", "keys", "owners", "ids",
)  # fmt: skip
"""The columns of a stored binding, in the order in which its `sha256` covers them."""
_BLOCK = 8192  # cells that are taken at a time: what is made of all of them at once doubles the memory of a run
_PAGE = 1 << 16
MOST_NAMED = 10  # samples in a message
CELL_SCHEMA: Mapping[str, pl.DataType] = {
    "sample": pl.UInt32(),
    "view": pl.String(),
    "ordinal": pl.Int32(),
    "key": pl.Binary(),
    "state": pl.String(),
}


@dataclass(frozen=True, eq=False)
class Binding:
    """A manifest bound to the rows of the store.

    Attributes:
        name: of the dataset.
        manifest_path: where the manifest was.
        manifest_digest: SHA-256, hex, of the manifest as it was.
        table: one row a sample, `sample_id` (String, unique) first, then the manifest's other columns.
        config: how the manifest was read, as plain JSON values.
        recipes: view -> id of the recipe that its features were extracted with.
        multi: what is done with several images of a view: error, first, mean or max.
        cells: one row a cell, absent ones too: sample (UInt32, row of `table`), view, ordinal (Int32), key (Binary of
            32 bytes, null where the content isn't known), and state: `done`, `absent`, `failed` or `pending`, as it was
            when bound.
    """

    name: str
    manifest_path: str
    manifest_digest: str
    table: pl.DataFrame
    config: Mapping[str, Any]
    recipes: Mapping[str, str]
    multi: str
    cells: pl.DataFrame

    def __post_init__(self) -> None:
        problems = []
        if not self.name or any(mark in self.name for mark in "/\\\0\n"):
            problems.append(f"name {self.name!r}: must not be empty or hold slashes or line ends")
        if (
            not self.table.columns
            or self.table.columns[0] != "sample_id"
            or self.table.schema["sample_id"] != pl.String
        ):
            problems.append("table: the first column must be `sample_id` of text")
        if dict(self.cells.schema) != dict(CELL_SCHEMA):
            problems.append(f"cells: columns are {dict(self.cells.schema)}, must be {dict(CELL_SCHEMA)}")
        else:
            keys = self.cells["key"].drop_nulls()
            if (keys.bin.size() != KEY_BYTES).any():
                problems.append(f"cells: a key has {KEY_BYTES} bytes")
            if unknown := set(self.cells["state"].unique()) - set(STATES):
                problems.append(f"cells: unknown states {sorted(map(str, unknown))}; known: {', '.join(STATES)}")
            if missing := set(self.cells["view"].unique()) - set(self.recipes):
                problems.append(f"recipes: none for the views {sorted(missing)}")
            if self.cells.height and int(self.cells["sample"].max() or 0) >= self.table.height:  # type: ignore[arg-type]
                problems.append(f"cells: sample numbers reach beyond the {self.table.height} rows of the table")
            if _come_twice(self.cells):
                problems.append("cells: a sample, view and ordinal comes twice")
        if problems:
            raise InputError.from_problems(f"dataset {self.name!r} can't be bound", problems)
        object.__setattr__(self, "recipes", dict(self.recipes))
        object.__setattr__(self, "config", json.loads(json.dumps(dict(self.config))))

    @property
    def views(self) -> tuple[str, ...]:
        """The views, in the manifest's order."""
        return tuple(self.recipes)

    @property
    def sample_ids(self) -> NDArray[np.str_]:
        """(n_samples,) ids in the table's order."""
        return np.array(self.table["sample_id"].to_list(), dtype=np.str_)

    def same(self, other: Binding) -> bool:
        """Whether another binding says the very same, so that nothing need be written."""
        names = ("name", "manifest_path", "manifest_digest", "config", "recipes", "multi")
        return (
            all(getattr(self, name) == getattr(other, name) for name in names)
            and list(self.recipes) == list(other.recipes)
            and self.table.schema == other.table.schema
            and self.table.equals(other.table)
            and self.cells.equals(other.cells)
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256, hex, over what the dataset is: `multi`, recipes, table, and the cells with their keys.

        Progress as such is not in it: a cell of known content may be done, failed or pending. But the content of a cell
        that wasn't read yet, or couldn't be, is unknown: its key is null, and the digest changes when it is found out.
        So the digest is final once every cell's content is known, and a run on a dataset that was extracted in part
        records another one than a run on the whole.

        It depends on values, not on how polars spells or stores them. Once bound it is kept, and not computed anew.
        """
        sha256 = hashlib.sha256(b"binding/1\n")
        sha256.update(canonical_json({"multi": self.multi, "recipes": self.recipes}))
        hash_table(sha256, self.table)
        hash_table(sha256, self.cells.select("sample", "view", "ordinal", "key", pl.col("state") == "absent"))
        return sha256.hexdigest()


@dataclass(frozen=True, eq=False)
class ResolvedView:
    """The cells of one view, by sample and ordinal, and the rows that hold their features now.

    Attributes:
        sample: (n_cells,) int64, rows of the binding's table.
        ordinal: (n_cells,) int32.
        rows: (n_cells,) int64 row ids for `FeatureStore.read`; -1 where there is no row.
        state: (n_cells,) text: `done` exactly where there is a row; else `absent`, `failed` or `pending`.
    """

    sample: NDArray[np.int64]
    ordinal: NDArray[np.int32]
    rows: NDArray[np.int64]
    state: NDArray[np.str_]

    def grid(self, n_samples: int) -> NDArray[np.int64]:
        """(n_samples, largest number of images) int64 row ids by sample and ordinal, -1 where there is none."""
        width = int(self.ordinal.max()) + 1 if len(self.ordinal) else 1
        grid = np.full((n_samples, width), -1, np.int64)
        grid[self.sample, self.ordinal] = self.rows
        return grid

    def counts(self) -> dict[str, int]:
        """How many cells are in each state."""
        return {state: int((self.state == state).sum()) for state in STATES}


def cell_keys(cells: pl.DataFrame) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """(n, 32) keys of cells and (n,) whether there is one; zeros where there is none."""
    known = cells["key"].is_not_null().to_numpy()
    keys = np.empty((cells.height, KEY_BYTES), np.uint8)
    for at in range(0, cells.height, _BLOCK):
        blob = b"".join(cells["key"][at : at + _BLOCK].fill_null(bytes(KEY_BYTES)).to_list())
        keys[at : at + _BLOCK] = np.frombuffer(blob, np.uint8).reshape(-1, KEY_BYTES)
    return keys, np.asarray(known, dtype=np.bool_)


def key_series(keys: NDArray[np.uint8], known: NDArray[np.bool_]) -> pl.Series:
    """The column `key` of cells, null where not known, from (n, 32) keys."""
    parts = [pl.Series("key", [], dtype=CELL_SCHEMA["key"])]
    for start in range(0, len(keys), _BLOCK):
        blob = keys[start : start + _BLOCK].tobytes()
        values: list[bytes | None] = [blob[at : at + KEY_BYTES] for at in range(0, len(blob), KEY_BYTES)]
        for at in np.flatnonzero(~known[start : start + _BLOCK]).tolist():
            values[at] = None
        parts.append(pl.Series("key", values, dtype=CELL_SCHEMA["key"]))
    return pl.concat(parts)


def _come_twice(cells: pl.DataFrame) -> bool:
    """Whether a sample, view and ordinal comes twice; where they stand in order, as they mostly do, it is seen so."""
    samples, ordinals = cells["sample"].to_numpy(), cells["ordinal"].to_numpy()
    views = cells["view"].cast(pl.Categorical).to_physical().to_numpy()
    same_sample, same_view = samples[1:] == samples[:-1], views[1:] == views[:-1]
    forward = (views[1:] > views[:-1]) | (same_view & (ordinals[1:] > ordinals[:-1]))
    if ((samples[1:] > samples[:-1]) | (same_sample & forward)).all():
        return False
    return bool(cells.select("sample", "view", "ordinal").is_duplicated().any())


def _json_list(texts: pl.Series) -> str:
    """A column of text as a JSON list."""
    parts = (json.dumps(texts[at : at + _BLOCK].to_list(), ensure_ascii=False) for at in range(0, len(texts), _BLOCK))
    return f"[{', '.join(part[1:-1] for part in parts)}]"


def save_binding(index: Index, binding: Binding, *, replace: bool) -> None:
    """Put a binding into the index, in the place of one of that name from the same manifest path.

    Raises:
        InputError: the name is taken by another manifest and `replace` is False.
    """
    with index.writing() as connection:
        found = connection.execute(
            "SELECT manifest_path, digest FROM bindings WHERE name = ?", (binding.name,)
        ).fetchone()
        if found is not None and found[0] != binding.manifest_path and not replace:
            raise InputError(
                f"dataset {binding.name!r} of this store is bound to {found[0]}, now it would be "
                f"{binding.manifest_path}. Give another --name, or --replace to bind it anew."
            )
        values = (
            binding.name,
            binding.manifest_path,
            binding.manifest_digest,
            binding.digest,
            binding.multi,
            json.dumps(binding.config, ensure_ascii=False),
            json.dumps(binding.recipes, ensure_ascii=False),
            _parquet(binding.table),
            _parquet(binding.cells.drop("key")),
            cell_keys(binding.cells)[0].tobytes(),
            binding.cells["sample"].to_numpy().astype("<u4").tobytes(),
            _json_list(binding.table["sample_id"]),
        )
        insert_bindings(connection, [values])
        next_generation(connection)


def insert_bindings(connection: sqlite3.Connection, stored: Iterable[Sequence[str | bytes]]) -> None:
    """Put bindings, as the columns of STORED, into an index, in the place of those of the same names."""
    columns, marks = ", ".join((*STORED, "sha256")), ", ".join("?" * (len(STORED) + 1))
    connection.executemany(
        f"INSERT OR REPLACE INTO bindings ({columns}) VALUES ({marks})",
        ((*values, _checksum(values)) for values in stored),
    )


def _checksum(values: Iterable[str | bytes]) -> bytes:
    """SHA-256 of a stored binding: each column's length in bytes (uint64, little-endian) and its bytes, as UTF-8."""
    sha256 = hashlib.sha256()
    for value in values:
        blob = value.encode("utf-8") if isinstance(value, str) else value
        sha256.update(len(blob).to_bytes(8, "little"))
        sha256.update(blob)
    return sha256.digest()


def stored_binding(index: Index, name: str) -> tuple[Any, ...] | None:
    """The columns of STORED of a binding, checked; None where there is none of this name.

    Raises:
        CorruptionError: they are not what was stored.
    """
    with index.reading() as connection:
        found = connection.execute(f"SELECT {', '.join(STORED)}, sha256 FROM bindings WHERE name = ?", (name,))
        row = found.fetchone()
    if row is not None and _checksum(row[:-1]) != row[-1]:
        raise CorruptionError(_remedy(index, name, row[1], "is damaged"))
    return None if row is None else tuple(row[:-1])


def _remedy(index: Index, name: str, path: str, what: str) -> str:
    return f"{index.paths.index}: dataset {name!r} {what}. Run extract on {path} again; no feature is recomputed."


def binding_names(index: Index) -> list[str]:
    """The datasets of the store, sorted."""
    with index.reading() as connection:
        return [row[0] for row in connection.execute("SELECT name FROM bindings ORDER BY name")]


def load_binding(index: Index, name: str) -> Binding:
    """A dataset by its name.

    Raises:
        InputError: there is none; names the nearest.
        CorruptionError: its bytes in the index are damaged.
    """
    found = stored_binding(index, name)
    if found is None:
        names = binding_names(index)
        known = f"Known: {', '.join(names)}." if names else "There are no datasets yet."
        raise InputError(f"{index.paths.root}: no dataset {name!r}.{did_you_mean(name, names)} {known}")
    _, path, manifest_digest, digest, multi, config, recipes, samples, cells, keys, _, _ = found
    try:
        key_rows = np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES)
        binding = Binding(
            name,
            path,
            manifest_digest,
            pl.read_parquet(io.BytesIO(samples)),
            json.loads(config),
            json.loads(recipes),
            multi,
            pl.read_parquet(io.BytesIO(cells)).insert_column(
                3, key_series(key_rows, cast(NDArray[np.bool_], key_rows.any(axis=1)))
            ),
        )
    except (pl.exceptions.PolarsError, ValueError, OSError) as error:
        raise CorruptionError(f"{_remedy(index, name, path, 'can not be read')} ({error})") from error
    vars(binding)["digest"] = digest  # as it was when bound, whatever this polars makes of the table
    return binding


def _parquet(frame: pl.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.write_parquet(buffer, row_group_size=_BLOCK, data_page_size=_PAGE)  # half the memory of one group of all
    return buffer.getvalue()


def samples_with(index: Index, keys: set[bytes]) -> list[str]:
    """Ids of the samples, over all datasets, that have a cell with one of these keys; each once, in order.

    Without polars, whose threads are gone in a forked DataLoader worker: to call it there would hang.
    """
    found: dict[str, None] = {}
    with index.reading() as connection:
        stored = connection.execute("SELECT keys, owners, ids FROM bindings ORDER BY name").fetchall()
    for blob, owners, ids in stored:
        hit = [at // KEY_BYTES for at in range(0, len(blob), KEY_BYTES) if blob[at : at + KEY_BYTES] in keys]
        with contextlib.suppress(ValueError, IndexError):  # damaged as well, but only asked to explain other damage
            names = json.loads(ids)
            found.update((str(names[sample]), None) for sample in np.frombuffer(owners, "<u4")[hit].tolist())
    return list(found)


def name_samples(index: Index, keys: set[bytes]) -> str:
    """'samples a, b, c and 4 more', or the keys where no dataset has them."""
    names, what = samples_with(index, keys), "samples"
    if not names:
        names, what = sorted(key.hex()[:16] for key in keys), "no dataset has them; keys"
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{what} {', '.join(names[:MOST_NAMED])}{more}" if names else "no samples"


def resolve_cells(
    index: Index, number: int, binding: Binding, view: str, *, own: bool, replica: int = 0
) -> ResolvedView:
    """Find the rows of the cells of one view in a recipe, and with them the cells' states now.

    Args:
        index: of the binding's store.
        number: of the recipe.
        binding: the dataset.
        view: one of its views.
        own: whether this is the recipe that the view is bound to. In another one a cell that failed is pending, unless
            its content is unknown or that recipe remembers a failure of its own.
        replica: which one, in a recipe that has them.
    """
    cells = binding.cells.filter(binding.cells["view"] == view)
    keys, known = cell_keys(cells)
    rows = np.full(cells.height, -1, np.int64)
    rows[known] = index.lookup(number, keys[known], np.full(int(known.sum()), replica, np.int32))
    state = np.array(cells["state"].to_list(), dtype="U7")
    state[state == "done"] = "pending"  # done when bound, but the row was dropped since, or the recipe is another one
    if not own:
        state[(state == "failed") & known] = "pending"
    failed = load_failures(index, number)
    if failed:
        state[(state == "pending") & np.array([key in failed for key in cells["key"].to_list()], np.bool_)] = "failed"
    state[rows >= 0] = "done"
    samples, ordinals = cells["sample"].to_numpy(), cells["ordinal"].to_numpy()
    return ResolvedView(samples.astype(np.int64), ordinals.astype(np.int32), rows, state)
