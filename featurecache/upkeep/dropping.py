"""What is to be dropped from a store, as a plan that can be listed, and the carrying out of it."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from featurecache.amounts import counted, human_bytes
from featurecache.calls import also
from featurecache.errors import StoreError
from featurecache.journal import withhold
from featurecache.progress import Reporter, Silent
from featurecache.store.appender import publish_generation
from featurecache.store.binding import Binding, save_binding
from featurecache.store.catalogue import by_name
from featurecache.store.files import step, storage_errors
from featurecache.store.index import Index, StoredRecipe
from featurecache.store.removal import affected_chunks, drop_recipe, drop_rows
from featurecache.store.schema import next_generation
from featurecache.store.settle import SCRUB, empty_trash, finish_scrub, orphans
from featurecache.store.store import FeatureStore

FAILURES = "failures.csv"


@dataclass(frozen=True, eq=False)
class RecipePart:
    """What goes of a recipe: rows, by id, their size in bytes, keys of failures, and `whole`: the recipe itself."""

    stored: StoredRecipe
    rows: NDArray[np.int64]
    size: int
    failures: tuple[bytes, ...] = ()
    whole: bool = False

    def line(self) -> str:
        """As a person reads it."""
        recipe = self.stored.recipe
        rest = f", {len(self.failures):,} failures" if self.failures else ""
        whole = "all of it" if self.whole else counted(len(self.rows), "row")
        count = f", {counted(len(self.rows), 'row')}" if self.whole else ""
        body = recipe.fields.get("body")
        name = f", {body.get('architecture')}" if isinstance(body, dict) else ""
        return f"recipe    {recipe.id}{name}: {whole}{count}{rest}, {human_bytes(self.size)}"


@dataclass(eq=False)
class Removal:
    """What is to be dropped; nothing is, before `carry_out`.

    Attributes:
        path: of the store.
        generation: of the store when this was planned.
        parts: of the recipes concerned.
        datasets: names of the datasets that go altogether.
        bindings: datasets as they will be, without the samples concerned.
        samples: ids that are forgotten.
        files: paths of files that will not be known as hashed any more.
        listed: entries of failures.csv that go.
        leftovers: files that no commit names.
        notes: what a user should know before it is done.
    """

    path: Path
    generation: int
    parts: list[RecipePart] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    bindings: list[Binding] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)
    files: list[str | bytes] = field(default_factory=list)
    listed: int = 0
    leftovers: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows that go."""
        return sum(len(part.rows) for part in self.parts)

    @cached_property
    def size(self) -> int:
        """Bytes of features and of leftovers that go, as they were when this was first asked."""
        sizes = (path.stat().st_size for path in self.leftovers if path.exists())
        return sum(part.size for part in self.parts) + sum(sizes)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do."""
        lists = (self.parts, self.datasets, self.bindings, self.files, self.leftovers)
        return not any(lists) and not self.listed

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        recipes = [
            {
                "id": part.stored.recipe.id,
                "rows": len(part.rows),
                "bytes": part.size,
                "failures": len(part.failures),
                "whole": part.whole,
            }
            for part in self.parts
        ]
        return {
            "rows": self.rows,
            "bytes": self.size,
            "recipes": recipes,
            "datasets": self.datasets,
            "datasets_rewritten": [binding.name for binding in self.bindings],
            "samples": self.samples,
            "failures": sum(len(part.failures) for part in self.parts),
            "files_no_longer_known": len(self.files),
            "leftover_files": len(self.leftovers),
            "notes": self.notes,
        }

    def lines(self) -> list[str]:
        """As a person reads it."""
        lines = [part.line() for part in self.parts]
        gone = "all its samples" if self.samples else "its table and labels; rows stay"
        lines += [f"dataset   {name}: {gone}" for name in self.datasets]
        lines += [
            f"dataset   {each.name}: rewritten, {counted(each.table.height, 'sample')} left" for each in self.bindings
        ]
        if self.samples:
            listed = f"{', '.join(self.samples[:10])}{' ...' * (len(self.samples) > 10)}"
            lines.append(f"samples   {len(self.samples):,}: {listed}")
        if self.files:
            lines.append(f"files     {len(self.files):,} that were hashed, no longer known")
        if self.listed:
            lines.append(f"failures  {self.listed:,} entries of failures.csv")
        if self.leftovers:
            lines.append(f"leftovers {counted(len(self.leftovers), 'file')}")
        if not self.empty:
            lines.append(f"in all    {counted(self.rows, 'row')}, {human_bytes(self.size)}")
        return [*lines, *(f"note      {note}" for note in self.notes)]


def part_of(
    index: Index, stored: StoredRecipe, rows: NDArray[np.int64], failures: Sequence[bytes], *, whole: bool = False
) -> RecipePart:
    """What goes of a recipe, with the bytes that its rows take."""
    return RecipePart(stored, rows, affected_chunks(index, stored, rows)[1], tuple(failures), whole)


@dataclass(frozen=True, eq=False)
class Removed:
    """What was dropped from a store, or would be.

    Attributes:
        plan: what that is.
        done: whether it is dropped; False for a dry run, and where there is nothing to drop.
        bytes_freed: on the disk.
        scrubbed: whether the index was written anew; if not, a reader was in the way, and the next prune does it.
    """

    plan: Removal
    done: bool = False
    bytes_freed: int = 0
    scrubbed: bool = True

    @property
    def rows(self) -> int:
        """Rows that went, or would."""
        return self.plan.rows

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        freed = {"bytes_freed": self.bytes_freed, "scrubbed": self.scrubbed} if self.done else {}
        return {**self.plan.to_json(), **freed}

    def lines(self) -> list[str]:
        """As a person reads it; after the lines of the plan."""
        if self.done:
            return [f"dropped   {counted(self.rows, 'row')}; the store takes {human_bytes(self.bytes_freed)} less"]
        return ["nothing to drop" if self.plan.empty else "dry run: nothing was changed"]

    def __str__(self) -> str:
        return "\n".join([*self.plan.lines(), *self.lines()])


def remove(plan: Removal, *, dry_run: bool = False, reporter: Reporter | None = None) -> Removed:
    """Carry a plan out, unless it is empty or only to be looked at.

    Raises:
        LockedError, StoreError, CorruptionError: as `carry_out`.
    """
    if plan.empty or dry_run:
        return Removed(plan)
    _ = plan.size  # now, while there is something
    also(plan.path)  # from here on: a list that nobody agreed to leaves no trace in the journal
    freed, scrubbed = carry_out(plan, reporter)
    if not scrubbed and reporter is not None:
        reporter.note(
            "Warning: a process has been reading the index all the while, which still holds bytes of what was "
            f"dropped. When it has ended, run: featurecache prune {plan.path} --yes"
        )
    return Removed(plan, True, freed, scrubbed)


class Dropped(NamedTuple):
    """What was done: bytes freed on the disk, and whether the index was written anew.

    Where it was not, a reader was in the way, and the next writer does it.
    """

    bytes_freed: int
    scrubbed: bool


def carry_out(plan: Removal, reporter: Reporter | None = None) -> Dropped:
    """Drop what was planned. Killed at any instant, the store is sound, and the same command drops the rest.

    Raises:
        LockedError: another process is writing; names it.
        StoreError: the store has changed since this was planned, or writing failed.
        CorruptionError: rows that are to stay lie in a damaged chunk.
    """
    before = _size(plan.path)
    with FeatureStore.create_or_open(plan.path, write=True) as store:
        index, paths = store.index, store.index.paths
        if store.generation != plan.generation:
            raise StoreError(
                f"{plan.path}: changed while this was planned. Nothing was dropped; run the command again."
            )
        for part in plan.parts:
            if len(part.rows) and not part.whole:
                drop_rows(index, paths, part.stored, part.rows, reporter or Silent())
        _drop_records(index, plan)
        step("records-dropped")
        drop_failure_rows(plan.path, set(plan.samples))
        with storage_errors(f"{plan.path}: taking ids out of the journal failed"):
            withhold(plan.path, plan.samples)
        step("failures-listed")
        for binding in plan.bindings:
            save_binding(index, binding, replace=True)
            step("binding-rewritten")
        _unbind(index, plan.datasets)
        step("binding-rewritten")
        for part in plan.parts:
            if part.whole:  # only now that no dataset names it
                drop_recipe(index, paths, by_name(index, part.stored.recipe.digest))
        with storage_errors(f"{plan.path}: deleting leftovers failed"):
            for path in orphans(index):
                path.unlink(missing_ok=True)
            publish_generation(index, paths)
        step("generation-published")
        empty_trash(paths)
        scrubbed = finish_scrub(index)
    return Dropped(max(0, before - _size(plan.path)), scrubbed)


def _size(path: Path) -> int:
    """Bytes of all files of a store."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _drop_records(index: Index, plan: Removal) -> None:
    with index.writing() as connection:
        for part in plan.parts:
            connection.executemany(
                "DELETE FROM failures WHERE recipe = ? AND key = ?",
                ((part.stored.number, key) for key in part.failures),
            )
        connection.executemany("DELETE FROM payloads WHERE path = ?", ((path,) for path in plan.files))
        connection.execute("INSERT OR REPLACE INTO meta (name, value) VALUES (?, 1)", (SCRUB,))
        next_generation(connection)


def _unbind(index: Index, names: Sequence[str]) -> None:
    with index.writing() as connection:
        connection.executemany("DELETE FROM bindings WHERE name = ?", ((name,) for name in names))
        next_generation(connection)


def failure_rows(store: Path, ids: set[str]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The entries of failures.csv that stay, and those of the samples."""
    try:
        with open(store / FAILURES, newline="", encoding="utf-8") as handle:
            rows = list(csv.DictReader(handle))
    except FileNotFoundError:
        return [], []
    gone = [row for row in rows if row.get("sample_id") in ids]
    return [row for row in rows if row not in gone], gone


def drop_failure_rows(store: Path, ids: set[str]) -> None:
    """Write failures.csv anew without the entries of some samples."""
    kept, gone = failure_rows(store, ids)
    if not gone:
        return
    path = store / FAILURES
    if not kept:
        path.unlink()
        return
    staged = store / "incoming" / FAILURES
    with open(staged, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(kept[0]))
        writer.writeheader()
        writer.writerows(kept)
    os.replace(staged, path)
