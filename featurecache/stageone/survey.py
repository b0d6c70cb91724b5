"""What can be found out before any body is loaded, found out while torch is being imported: the manifest, its files."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from threading import Event, Thread
from types import TracebackType
from typing import Self

import numpy as np
import polars as pl

from featurecache.config import ExtractConfig
from featurecache.data.manifest import Manifest, read_manifest
from featurecache.machine import scouts
from featurecache.store.format import StorePaths
from featurecache.store.records import unchanged_files
from featurecache.store.store import FeatureStore


class Survey:
    """Reads the manifest in a thread, and then compares its files with what the store remembers of them.

    A context manager: at its end, nothing reads the store any more.
    """

    def __init__(self, config: ExtractConfig) -> None:
        """Begin."""
        self._manifest: Future[Manifest] = Future()
        self._unchanged: Future[pl.DataFrame | None] = Future()
        self._store_is_free = Event()
        Thread(target=self._work, args=(config,), name="survey", daemon=True).start()

    def manifest(self) -> Manifest:
        """The manifest.

        Raises:
            InputError: it is not valid.
        """
        return self._manifest.result()

    def wait_for_store(self) -> None:
        """Wait until the store isn't read any more, so that it can be opened for writing."""
        self._store_is_free.wait()

    def unchanged(self) -> pl.DataFrame | None:
        """Records of the files whose stat is what it was, see `unchanged_files`; None where nobody looked."""
        return self._unchanged.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wait_for_store()

    def _work(self, config: ExtractConfig) -> None:
        unchanged = None
        try:
            with ExitStack() as ending:
                looks = _Looks(config, ending)
                manifest = read_manifest(config, early=looks.begin)
                self._manifest.set_result(manifest)
                unchanged = self._compare(manifest, looks)
        except BaseException as error:
            # Of the manifest it is told to whoever asks for it; a damaged store is found out again by whom it concerns.
            if not self._manifest.done():
                self._manifest.set_exception(error)
        finally:
            self._store_is_free.set()
            self._unchanged.set_result(unchanged)

    def _compare(self, manifest: Manifest, looks: _Looks) -> pl.DataFrame | None:
        if looks.answers is None:
            return None
        records = looks.remembered(manifest.cells["location"].drop_nulls().unique())
        self._store_is_free.set()
        return unchanged_files(records, looks.at(records["path"])).select("path", "sha256")


class _Looks:
    """What is found out of the manifest's files, beginning before it is known that all of them are there.

    Processes look at them; meanwhile a thread reads what the store remembers of them, nearly all of it within SQLite.
    """

    def __init__(self, config: ExtractConfig, ending: ExitStack) -> None:
        self._config, self._ending = config, ending
        self._paths = pl.Series([], dtype=pl.String)
        self._records: Future[pl.DataFrame] = Future()
        self.answers: scouts.Answers | None = None

    def begin(self, paths: pl.Series) -> None:
        """Look at these and read their records, if that is worth it."""
        config = self._config
        if config.check == "stat" and len(paths) >= scouts.WORTH_IT and StorePaths(config.store).index.is_file():
            self._paths = paths
            self.answers = self._ending.enter_context(closing(scouts.ask("look", paths, max(1, scouts.cores() - 1))))
            reading = self._ending.enter_context(ThreadPoolExecutor(1, "records"))
            self._records = reading.submit(self._read, paths)

    def remembered(self, locations: pl.Series) -> pl.DataFrame:
        """The store's records of all of these, each once, and perhaps of others."""
        looked = self._paths.alias("location").to_frame()
        elsewhere = locations.to_frame().join(looked, on="location", how="anti")["location"]  # behind links
        found = self._records.result()
        return pl.concat([found, self._read(elsewhere)]) if len(elsewhere) else found

    def _read(self, paths: pl.Series) -> pl.DataFrame:
        with FeatureStore(self._config.store) as store:
            return store.payload_table(paths)

    def at(self, paths: pl.Series) -> scouts.Records:
        """(n,) records of the stat of these, each once; those behind links were not yet looked at."""
        places = self._paths.alias("path").to_frame().with_row_index("place")
        at = paths.alias("path").to_frame().join(places, on="path", how="left", maintain_order="left")["place"]
        seen, found = at.is_not_null().to_numpy(), np.zeros(len(paths), scouts.RECORD)
        found[seen] = scouts.gather(self._paths, self.answers or ())[at.drop_nulls().to_numpy()]
        found[~seen] = scouts.look(paths.filter(~seen))
        return found
