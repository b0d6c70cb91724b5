"""FeatureStore: the cache as its users see it; open, look up, append, read, bind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from featurecache.errors import InputError, StoreError
from featurecache.store import binding as bindings
from featurecache.store import catalogue, records
from featurecache.store.appender import Appender, publish_generation
from featurecache.store.binding import Binding, ResolvedView
from featurecache.store.catalogue import RecipeInfo
from featurecache.store.chunks import ChunkReader
from featurecache.store.files import step, storage_errors
from featurecache.store.format import Layout, StorePaths
from featurecache.store.index import Index, StoredRecipe
from featurecache.store.lock import WriterLock
from featurecache.store.opening import check_identity, create, prepare_directory, require_store, warn_of_network
from featurecache.store.recipe import Recipe, checked_keys
from featurecache.store.records import StatRecord
from featurecache.store.schema import RecipeGone
from featurecache.store.settle import settle
from featurecache.store.windows import Gather, gather_rows

__all__ = ["FeatureStore", "RecipeInfo"]


class FeatureStore:
    """The cache in a directory. One process writes at a time, any number read.

    Reading changes nothing on disk. A store can be pickled, and used after a fork: it opens itself again, for reading.
    """

    def __init__(self, path: str | os.PathLike[str], *, write: bool = False) -> None:
        """Open a store; `write=True` takes the writer's lock and creates the store where there is none.

        Raises:
            MissingFileError: there is nothing at `path` (for reading).
            InputError: there is something else than a store.
            LockedError: another process is writing; names its pid.
            StoreError: a newer format, an index that is missing, of another store, or older than the features.
            CorruptionError: the index or the root metadata are damaged.
        """
        self.path = Path(path)
        self._paths = StorePaths(self.path)
        self._lock: WriterLock | None = None
        self._writer_pid = 0
        self._reset()
        if write:
            self._open_writer()
        else:
            require_store(self._paths)
            check_identity(self._index, self._paths)

    @classmethod
    def create_or_open(cls, path: str | os.PathLike[str], *, write: bool) -> FeatureStore:
        """The same as the constructor, under a name that tells a reader that `write=True` may make a new store."""
        return cls(path, write=write)

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._appenders: dict[str, Appender] = {}
        self._index = Index(self._paths, write=False)
        self._reader = ChunkReader(self._index, self._paths)
        self._known: dict[str, StoredRecipe] = {}
        self._resolved: dict[tuple[str, str, str, int], tuple[int, ResolvedView]] = {}

    def _own(self) -> Index:
        """The index of this process: after a fork the parent's connections and maps are left alone."""
        if self._pid != os.getpid():
            index = self._index
            self._reset()
            index.abandon()
        return self._index

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.path.absolute()),)

    # ---- opening and closing -----------------------------------------------------------------------------------------

    def _open_writer(self) -> None:
        prepare_directory(self._paths)
        self._lock = WriterLock(self._paths.lock)
        try:
            step("lock-taken")
            if not self._paths.index.exists():
                with storage_errors(f"{self.path}: creating the store failed"):
                    create(self._paths)
            with storage_errors(f"{self.path}: opening for writing failed"):
                self._index = Index(self._paths, write=True)
                self._reader = ChunkReader(self._index, self._paths)
                self._writer_pid = os.getpid()
                check_identity(self._index, self._paths)
                settle(self._index, self._paths)
                step("leftovers-trashed")
        except BaseException:
            self._index.close()
            self._lock.release()
            raise
        warn_of_network(self.path, stacklevel=4)

    @property
    def writable(self) -> bool:
        """Whether this process holds the store for writing."""
        return self._writer_pid == os.getpid()

    def close(self) -> None:
        """Flush open appenders, close the index and give the lock back."""
        if self._pid != os.getpid():
            return
        try:
            for appender in list(self._appenders.values()):
                appender.close()
        finally:
            self._index.close()
            if self.writable and self._lock is not None:
                shutil.rmtree(self._paths.incoming, ignore_errors=True)
                self._lock.release()
            self._writer_pid = 0
            self._lock = None
            self._index = Index(self._paths, write=False)  # a later look-up opens it again, for reading
            self._reader = ChunkReader(self._index, self._paths)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def uuid(self) -> str:
        """The store's identity, the same in features.zarr and in the index."""
        return self._own().meta().uuid

    @property
    def generation(self) -> int:
        """Counts commits of rows, recipes and bindings: what was derived from the store holds while it is the same."""
        return self._own().meta().generation

    # ---- recipes -----------------------------------------------------------------------------------------------------

    def recipes(self) -> list[RecipeInfo]:
        """All recipes in the order in which they were added."""
        index = self._own()
        return [catalogue.describe(index, stored) for stored in index.recipes()]

    def recipe(self, name: str) -> RecipeInfo:
        """A recipe by its id, its digest, or the first digits of it.

        Raises:
            InputError: none or several match; lists what there is.
        """
        return catalogue.describe(self._own(), self._stored(name, fresh=True))

    def find(self, recipe: Recipe) -> list[RecipeInfo]:
        """Recipes whose rows can be used for `recipe`: of the same base, with all its taps; the very same first."""
        index = self._own()
        return [catalogue.describe(index, stored) for stored in catalogue.holding(index, recipe)]

    def add_recipe(
        self,
        recipe: Recipe,
        taps: Mapping[str, tuple[Iterable[int], Iterable[str]]],
        *,
        codec: str = "none",
        rows_per_chunk: int | None = None,
        canary: Mapping[str, Any] | None = None,
        recorded: Mapping[str, Any] | None = None,
    ) -> RecipeInfo:
        """Add a recipe, or return the one that is there; its codec and rows per chunk then stay as they are.

        Args:
            recipe: what the features depend on.
            taps: for each tap the shape of a row and the names of its dimensions: `{"layer4@none": ((512, 7, 7),
                ("channels", "height", "width"))}`.
            codec: none, zstd, blosc or gzip; a CRC-32C always follows.
            rows_per_chunk: None for 8 MiB in the widest tap, at most 4,096.
            canary: outputs for the fixed synthetic inputs, JSON values.
            recorded: library versions, device and the like, JSON values; not part of the identity.

        Raises:
            InputError: a name, shape or codec can't be stored, or the recipe is there with other shapes.
        """
        index = self._own()
        if not catalogue.present(index, recipe, taps):
            layout = Layout.create(recipe, taps, codec, rows_per_chunk)
            self._require_writable()
            with storage_errors(f"{self.path}: adding recipe {recipe.id} failed"):
                catalogue.add(index, self._paths, recipe, layout, canary, recorded or {})
                publish_generation(index, self._paths)
        return self.recipe(recipe.digest)

    @property
    def index(self) -> Index:
        """The SQLite side, for maintenance: what `removal` and `compact` work on."""
        return self._own()

    def _stored(self, name: str, *, fresh: bool = False) -> StoredRecipe:
        """The recipe of this name; where `fresh` is False its counters may be those of an earlier time."""
        index = self._own()
        found = None if fresh else self._known.get(name)
        if found is None:
            found = catalogue.by_name(index, name)
            if fresh:
                self._known = {}  # what was removed and added again has another number
            self._known[name] = found
        return found

    # ---- rows --------------------------------------------------------------------------------------------------------

    def rows(self, recipe_id: str, keys: ArrayLike, replica: int | ArrayLike = 0) -> NDArray[np.int64]:
        """Row ids for many keys at once.

        A row id belongs to its row for good (until the row is removed, or the index rebuilt). It doesn't say where the
        row lies, which may change; it is what `read` takes.

        Args:
            recipe_id: id, digest or first digits.
            keys: (n, 32) uint8.
            replica: one number for all, or (n,).

        Returns:
            (n,) int64, -1 where the recipe has no such row.
        """
        key_rows = checked_keys(keys)
        replicas = np.broadcast_to(np.asarray(replica, np.int32), (len(key_rows),))
        try:
            return self._own().lookup(self._stored(recipe_id).number, key_rows, replicas)
        except RecipeGone:  # it may have been added again since
            return self._own().lookup(self._stored(recipe_id, fresh=True).number, key_rows, replicas)

    def read(
        self, recipe_id: str, tap: str, rows: ArrayLike, out: NDArray[Any] | None = None, gather: Gather = gather_rows
    ) -> NDArray[Any]:
        """Features of rows, in the order asked for; a row may come several times.

        Args:
            recipe_id: id, digest or first digits.
            tap: name of the array, `penultimate@none`.
            rows: (n,) row ids, as given by `rows`.
            out: where to put them, (n, values of a row) in the storage dtype; default a new array (n, *row shape).
            gather: what copies rows of mapped files.

        Raises:
            InputError: no such tap, or no such row.
            CorruptionError: stored bytes are missing or changed; names array, chunk and samples.
        """
        self._own()
        stored = self._stored(recipe_id)
        self._require_tap(stored, tap)
        return self._reader.read(stored, tap, rows, out, gather)

    def slots(self, recipe_id: str, rows: ArrayLike) -> NDArray[np.int64]:
        """(n,) int64: where rows lie now, in chunk slot // rows_per_chunk; in this order they are read best."""
        self._own()
        return self._reader.slots(self._stored(recipe_id), np.asarray(rows, np.int64))

    def keys(self, recipe_id: str) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.int32]]:
        """All rows of a recipe in the order in which they lie: row ids (n,), keys (n, 32) and replicas (n,)."""
        return self._own().keys(self._stored(recipe_id, fresh=True).number)

    def appender(self, recipe_id: str) -> Appender:
        """What adds rows to a recipe: a context manager that commits the rest at its end, also on an exception.

        Raises:
            StoreError: not opened for writing, or the recipe has an open appender (one for all).
        """
        self._require_writable()
        number = self._stored(recipe_id).recipe.digest
        if number in self._appenders:
            raise StoreError(f"recipe {recipe_id} has an open appender; use one for all views of this recipe")
        appender = Appender(
            self._index,
            self._paths,
            self._reader,
            lambda: self._stored(number, fresh=True),
            lambda: self._ended(number),
        )
        self._appenders[number] = appender
        return appender

    def _ended(self, number: str) -> None:
        self._appenders.pop(number, None)

    def _require_writable(self) -> None:
        if not self.writable:
            raise StoreError(f"{self.path}: opened for reading in this process; open it with write=True to change it.")

    def _require_tap(self, stored: StoredRecipe, tap: str) -> None:
        if tap not in stored.layout.taps:
            raise InputError(f"recipe {stored.recipe.id} has no tap {tap!r}; it has {', '.join(stored.layout.taps)}.")

    # ---- failures and files ------------------------------------------------------------------------------------------

    def failures(self, recipe_id: str) -> dict[bytes, tuple[str, str]]:
        """Key -> (reader with version, message) of contents that can't be extracted in this recipe, ever."""
        return records.load_failures(self._own(), self._stored(recipe_id).number)

    def add_failures(self, recipe_id: str, failures: Iterable[tuple[bytes, str, str]]) -> None:
        """Remember deterministic failures: (key, reader with version, message). A later row for the key removes it."""
        records.save_failures(self._own(), self._stored(recipe_id).number, failures)

    def clear_failures(self, recipe_id: str, keys: Iterable[bytes] | None = None) -> None:
        """Forget failures of these keys, or all of the recipe's."""
        records.clear_failures(self._own(), self._stored(recipe_id).number, keys)

    def payloads(self, paths: Sequence[str]) -> dict[str, StatRecord]:
        """What is remembered of files that were hashed, by path."""
        return records.load_payloads(self._own(), paths)

    def payload_table(self, paths: pl.Series) -> pl.DataFrame:
        """The same of many paths at once: a row a path that has a record, with the columns of StatRecord."""
        return records.load_payload_table(self._own(), paths)

    def remember_payloads(self, payloads: Iterable[StatRecord]) -> None:
        """Remember files as hashed."""
        records.save_payloads(self._own(), payloads)

    # ---- bindings ----------------------------------------------------------------------------------------------------

    def bind(self, binding: Binding, *, replace: bool = False) -> None:
        """Keep a binding under its name; a name that is bound to another manifest path needs `replace`.

        Raises:
            InputError: the name is taken, or a view's recipe is not in the store.
        """
        self._require_writable()
        for recipe_id in binding.recipes.values():
            self._stored(recipe_id)
        bindings.save_binding(self._index, binding, replace=replace)
        with storage_errors(f"{self.path}: binding {binding.name!r} failed"):
            publish_generation(self._index, self._paths)

    def bindings(self) -> list[str]:
        """Names of the datasets, sorted."""
        return bindings.binding_names(self._own())

    def binding(self, name: str) -> Binding:
        """A dataset by its name.

        Raises:
            InputError: there is none; names the nearest.
        """
        return bindings.load_binding(self._own(), name)

    def resolve(self, binding: Binding, view: str, recipe_id: str | None = None, *, replica: int = 0) -> ResolvedView:
        """The cells of a view and the rows that hold their features now; kept while the generation stays the same.

        A cell is done where its key has a row, whatever it was when bound; one that was done and has no row is pending.
        In another recipe than the view's own, a cell that failed is pending, unless it failed there as well or its
        content is unknown.

        Args:
            binding: of this store.
            view: one of its views.
            recipe_id: None for the recipe that the view was extracted with.
            replica: which one, in a recipe that has them.
        """
        if view not in binding.recipes:
            raise InputError(f"dataset {binding.name!r} has no view {view!r}; it has {', '.join(binding.recipes)}.")
        index, chosen = self._own(), recipe_id or binding.recipes[view]
        generation, name = index.meta().generation, (binding.digest, view, self._stored(chosen).recipe.id, replica)
        cached = self._resolved.get(name)
        if cached is None or cached[0] != generation:
            stored = self._stored(chosen, fresh=True)
            own = stored.recipe.digest.startswith(binding.recipes[view].lower())
            resolved = bindings.resolve_cells(index, stored.number, binding, view, own=own, replica=replica)
            self._resolved[name] = cached = (generation, resolved)
        return cached[1]

    # ---- about the store ---------------------------------------------------------------------------------------------

    def info(self) -> dict[str, Any]:
        """What is in the store, as plain JSON values: recipes with taps, rows and failures, datasets, generation."""
        return {"path": str(self.path), **catalogue.summary(self._own())}


def _reopen(path: str) -> FeatureStore:
    """A store for reading that opens nothing before its first use: what a pickle becomes."""
    store = FeatureStore.__new__(FeatureStore)
    store.path = Path(path)
    store._paths = StorePaths(store.path)
    store._lock, store._writer_pid = None, 0
    store._reset()
    return store
