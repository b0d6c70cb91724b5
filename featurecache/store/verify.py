"""Every promise of the store, checked: files against the index, keys against the rows, metadata against the recipes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from featurecache.errors import CorruptionError, FeatureCacheError, StoreError
from featurecache.store.binding import binding_names, load_binding, samples_with
from featurecache.store.format import (
    KEY,
    REPLICA,
    ArraySpec,
    ChunkRecord,
    StorePaths,
    agrees,
    group_document,
    inspect_chunk,
)
from featurecache.store.index import Index, StoredRecipe
from featurecache.store.opening import NewerStoreError, check_identity, require_store
from featurecache.store.schema import missing_columns
from featurecache.store.settle import removed_groups

_NO_RECORD = "the index has no record of this file"
_RECORD_DAMAGED = "the file is sound, but what the index says of it was changed"
_PATIENCE, _PAUSE = 5, 0.1  # how often and for how many seconds a change of the metadata is waited for


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        kind: `index` (only a new index helps), `metadata` (a zarr.json; repair writes it), `chunk` (a chunk file is
            missing or not what was committed), `keys` (index and key array disagree), `rows` (rows without a chunk),
            `dataset` (a binding), `unknown` (features that the index doesn't know).
        message: what was found.
        recipe: id of the recipe concerned, or ''.
        array: name of the array concerned, or ''.
        chunk: number of the chunk concerned, or -1.
        samples: ids of the samples concerned.
    """

    kind: str
    message: str
    recipe: str = ""
    array: str = ""
    chunk: int = -1
    samples: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = ", ".join(self.samples[:10]) + (f" and {len(self.samples) - 10} more" if len(self.samples) > 10 else "")
        return f"{self.message}; samples {shown}" if self.samples else self.message


@dataclass
class VerifyReport:
    """What was checked, what is wrong (`problems`), and what is left over but harmless (`notes`)."""

    path: Path
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    recipes: int = 0
    chunks: int = 0
    rows: int = 0
    bytes: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        problems = [{**vars(problem), "samples": list(problem.samples)} for problem in self.problems]
        counts = {"recipes": self.recipes, "chunks": self.chunks, "rows": self.rows, "bytes": self.bytes}
        return {"path": str(self.path), "ok": self.ok, **counts, "problems": problems, "notes": self.notes}


def verify(path: str | os.PathLike[str]) -> VerifyReport:
    """Check everything, reading every byte once; changes nothing.

    Raises:
        InputError: there is no store at `path`.
        StoreError: a part of the store is missing altogether; says what to do.
    """
    paths = StorePaths(Path(path))
    require_store(paths)
    index = Index(paths, write=False)
    try:
        return check_store(index, paths)
    finally:
        index.close()


def check_store(index: Index, paths: StorePaths) -> VerifyReport:
    """The same with an index that is open already.

    Another process may write meanwhile: what it commits after the check of a recipe began is not looked at, and what it
    replaces is no problem, since the index is asked again before anything is reported.
    """
    report = VerifyReport(paths.root)
    try:
        check_identity(index, paths)
    except NewerStoreError:
        raise  # what a newer version means by it can't be checked here
    except CorruptionError as error:
        kind = "metadata" if str(error).startswith(str(paths.zarr / "zarr.json")) else "index"
        report.problems.append(Problem(kind, str(error)))
    except StoreError as error:  # another store's index, or an earlier copy: most of its files would seem damaged
        report.problems.append(Problem("index", str(error)))
        report.notes.append(f"{paths.zarr}: not checked, since this index tells of other files")
        return report
    try:
        report.problems += _index_problems(index)
        stored = index.recipes()
        names = binding_names(index)
    except FeatureCacheError as error:
        report.problems.append(Problem("index", str(error)))
        return report
    report.recipes = len(stored)
    for entry in stored:
        for problem in _settled_metadata_problems(paths, entry):
            if problem.kind == "shape":
                report.notes.append(f"{problem}; a writer was cut off, the next one makes them alike")
            else:
                report.problems.append(problem)
        _check_recipe(index, paths, entry, report)
    _check_strangers(index, paths, report)
    for name in names:
        try:
            binding = load_binding(index, name)
        except FeatureCacheError as error:
            report.problems.append(Problem("dataset", str(error)))
            continue
        recipes = [entry.recipe for entry in index.recipes()]  # after the binding: the recipe was added before it
        known = {recipe.id for recipe in recipes} | {recipe.digest for recipe in recipes}
        for view, recipe in binding.recipes.items():
            if recipe not in known:
                message = f"dataset {name!r}: view {view!r} has the recipe {recipe}, which is not in the store"
                report.problems.append(Problem("dataset", message))
    return report


def _index_problems(index: Index) -> Iterator[Problem]:
    with index.reading() as connection:
        found = [row[0] for row in connection.execute("PRAGMA integrity_check(20)").fetchall()]
        foreign = connection.execute("PRAGMA foreign_key_check").fetchall()
        missing = missing_columns(connection)
    for message in found:
        if message != "ok":
            yield Problem("index", f"{index.paths.index}: {message}")
    if missing:
        yield Problem("index", f"{index.paths.index}: lacks {', '.join(missing)}")
    if foreign:
        yield Problem("index", f"{index.paths.index}: {len(foreign)} rows name a recipe that is not in it")


def metadata_problems(paths: StorePaths, stored: StoredRecipe) -> list[Problem]:
    """What is wrong with the zarr.json of a recipe's group and of its arrays.

    Arrays of different length (kind `shape`) harm no reader of ours, and are what a writer leaves that was cut off.
    """
    problems = []
    directory, name = paths.zarr / stored.recipe.id, stored.recipe.id
    expected = group_document(stored.recipe, stored.layout, stored.canary, stored.recorded)
    if message := _document_problem(directory / "zarr.json", expected):
        problems.append(Problem("metadata", message, name))
    sizes = {}
    for array, spec in stored.layout.arrays().items():
        path = directory / array / "zarr.json"
        found = _read_document(path)
        try:
            capacity = int(found["shape"][0]) // spec.rows
        except (KeyError, TypeError, IndexError, ValueError):
            capacity = stored.next_chunk
        if message := _document_problem(path, spec.document(capacity)):
            problems.append(Problem("metadata", message, name, array))
        elif capacity < stored.next_chunk:
            message = f"{path}: the shape ends before the last committed chunk"
            problems.append(Problem("metadata", message, name, array))
        else:
            sizes[array] = capacity
    if len(set(sizes.values())) > 1:
        problems.append(Problem("shape", f"{directory}: the arrays have different numbers of rows: {sizes}", name))
    return problems


def _settled_metadata_problems(paths: StorePaths, stored: StoredRecipe) -> list[Problem]:
    """The same, but a writer that is just enlarging the arrays, one after the other, is waited for."""
    problems = metadata_problems(paths, stored)
    for _ in range(_PATIENCE):
        if not problems:
            break
        time.sleep(_PAUSE)
        problems = metadata_problems(paths, stored)
    return problems


def _read_document(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _document_problem(path: Path, expected: Mapping[str, Any]) -> str:
    found = _read_document(path)
    if found is None:
        return f"{path}: missing or damaged"
    return "" if agrees(found, expected) else f"{path}: differs from what the index says"


# ---- rows and chunks -------------------------------------------------------------------------------------------------


def _check_recipe(index: Index, paths: StorePaths, stored: StoredRecipe, report: VerifyReport) -> None:
    arrays, name = stored.layout.arrays(), stored.recipe.id
    n = stored.layout.rows_per_chunk
    with index.reading():  # all of one state
        records, slots = index.chunks(stored.number), index.slots(stored.number)
        next_chunk = next(entry.next_chunk for entry in index.recipes() if entry.number == stored.number)
    occupied = np.unique(slots[slots >= 0] // n)
    report.rows += int((slots >= 0).sum())
    by_chunk: dict[int, dict[tuple[int, str], ChunkRecord]] = {}
    for at, record in records.items():
        by_chunk.setdefault(at[0], {})[at] = record
    chunks = sorted(by_chunk)
    for chunk in sorted(set(occupied.tolist()) - set(chunks)):
        samples = _samples(index, stored, chunk)
        report.problems.append(
            Problem("rows", f"recipe {name}: rows in chunk {chunk}, which no commit names", name, "", chunk, samples)
        )
    if chunks and chunks[-1] >= next_chunk:
        message = f"recipe {name}: chunk {chunks[-1]} is beyond the next free one, {next_chunk}"
        report.problems.append(Problem("index", message, name))

    def examine(chunk: int) -> tuple[int, int, list[Problem]]:
        known = by_chunk[chunk]
        while known:
            size, problems = _check_chunk(index, paths, stored, arrays, chunk, known)
            # A writer changes the index before it takes a superseded file away, so that asking once more settles it.
            now = index.chunks(stored.number, chunk) if problems else known
            if now == known:
                return 1, size, problems
            known = now
        return 0, 0, []

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for counted, size, problems in pool.map(examine, chunks):
            report.chunks += counted
            report.bytes += size
            report.problems += problems
    _check_orphans(index, paths, stored, arrays, report)


def _check_chunk(
    index: Index,
    paths: StorePaths,
    stored: StoredRecipe,
    arrays: Mapping[str, ArraySpec],
    chunk: int,
    records: Mapping[tuple[int, str], ChunkRecord],
) -> tuple[int, list[Problem]]:
    size, found = 0, list[tuple[str, str, str]]()
    contents: dict[str, bytes] = {}
    for name, spec in arrays.items():
        path = paths.array(stored.recipe.id, name) / spec.chunk_name(chunk)
        problem, content = _file_problem(path, records.get((chunk, name)))
        size += len(content)
        if problem:
            found.append(("index" if problem in (_NO_RECORD, _RECORD_DAMAGED) else "chunk", name, f"{path}: {problem}"))
        elif name in (KEY, REPLICA):
            contents[name] = content
    samples = _samples(index, stored, chunk) if found else ()
    problems = [Problem(kind, message, stored.recipe.id, name, chunk, samples) for kind, name, message in found]
    decoded = {name: arrays[name].decode(content) for name, content in contents.items()}
    if KEY in decoded and not index.keys_agree(stored, chunk, decoded[KEY], decoded.get(REPLICA)):
        samples = samples or _samples(index, stored, chunk)
        message = f"recipe {stored.recipe.id}, chunk {chunk}: the key array and the index name different rows"
        problems.append(Problem("keys", message, stored.recipe.id, KEY, chunk, samples))
    return size, problems


def _file_problem(path: Path, record: ChunkRecord | None) -> tuple[str, bytes]:
    if record is None:
        return _NO_RECORD, b""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return "missing", b""
    except OSError as error:
        return f"can't be read: {error.strerror}", b""
    found, sound = inspect_chunk(content)
    if found == record and sound:
        return "", content
    # Damage to the file changes both sums, damage to the index one value: then the file is the one that was committed.
    if sound and (found.sha256 == record.sha256 or found[:2] == record[:2]):
        return _RECORD_DAMAGED, content
    if found.size != record.size:
        return f"has {found.size} bytes instead of {record.size}", content
    if not sound:
        return "its bytes were changed (the checksum differs)", content
    return "is not the chunk that was committed", content


def _samples(index: Index, stored: StoredRecipe, chunk: int) -> tuple[str, ...]:
    return tuple(samples_with(index, {row[1] for row in index.rows_of(stored, chunk)}))


# ---- what should not be there ----------------------------------------------------------------------------------------


def _check_orphans(
    index: Index, paths: StorePaths, stored: StoredRecipe, arrays: Mapping[str, ArraySpec], report: VerifyReport
) -> None:
    for name, spec in arrays.items():
        directory = paths.array(stored.recipe.id, name)
        present = sorted(directory.iterdir()) if directory.is_dir() else []
        records = index.chunks(stored.number)  # after the listing: of what was committed before, nothing is an orphan
        named = {spec.chunk_name(chunk) for chunk, array in records if array == name} | {"zarr.json"}
        for path in present:
            if path.name not in named and path.exists():
                what = "no commit names it; the next extract clears it away"
                report.notes.append(f"{path}: {what if path.name.startswith('c.') else 'not a file of the store'}")


def _check_strangers(index: Index, paths: StorePaths, report: VerifyReport) -> None:
    removed = removed_groups(index)
    present = {path: path.is_dir() and any(path.glob("*/c.*")) for path in sorted(paths.zarr.iterdir())}
    known = {entry.recipe.id for entry in index.recipes()}  # after the listing: a recipe is added before its chunks
    for path, with_features in present.items():
        if path.name in known or path.name == "zarr.json":
            continue
        if path in removed:
            report.notes.append(f"{path}: of a recipe that was removed; the next writer deletes it")
        elif with_features:
            message = f"{path}: features that the index doesn't know; --rebuild-index adds them"
            report.problems.append(Problem("unknown", message, path.name))
        else:
            report.notes.append(f"{path}: not in the index")
