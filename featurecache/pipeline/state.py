"""What a pipeline has done already: per stage the digest of all that it depended on, in OUT/state."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from featurecache.errors import FeatureCacheError
from featurecache.run import Run, load_run
from featurecache.rundir.files import RECORD, sha256_file


def digest_of(value: Mapping[str, Any]) -> str:
    """SHA-256 of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def files_digest(locations: Iterable[str | None]) -> str:
    """SHA-256 over path, size and time of change of files: as long as it stays, so did they, in all likelihood."""
    digest = hashlib.sha256()
    for location in sorted({location for location in locations if location}):
        try:
            status = os.stat(location)
            known = f"{location}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}\n"
        except OSError:
            known = f"{location}\0gone\n"
        digest.update(known.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def cells_digest(cells: pl.DataFrame) -> str:
    """The same of a manifest's cells; texts by what they say."""
    texts = cells.filter((pl.col("kind") == "text") & pl.col("value").is_not_null())["value"].to_list()
    return digest_of({"files": files_digest(cells["location"].to_list()), "texts": texts})


def run_digest(path: Path) -> str:
    """What a run is: its record lists the hashes of all its files."""
    return sha256_file(path / RECORD)


def whole_run(path: Path) -> Run | None:
    """The run at `path`, None where there is none or it is damaged."""
    try:
        return load_run(path)
    except FeatureCacheError:
        return None


@dataclass(frozen=True)
class State:
    """The marks of a pipeline's stages, a file each: what was begun, and what was finished with which figures."""

    folder: Path

    def _read(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, name: str, values: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{name}.tmp"
        temporary.write_text(json.dumps(values, indent=1, default=str), encoding="utf-8")
        os.replace(temporary, self.folder / f"{name}.json")

    def finished(self, name: str, digest: str) -> dict[str, Any] | None:
        """The figures of a stage that was finished with this digest, else None."""
        found = self._read(name)
        return found.get("figures", {}) if found.get("finished") == digest else None

    def begun(self, name: str, digest: str) -> bool:
        """Whether a stage of this digest was begun by an earlier command that did not end."""
        return self._read(name).get("begun") == digest

    def known(self, name: str) -> bool:
        """Whether a stage was ever finished, with whatever digest."""
        return "finished" in self._read(name)

    def begin(self, name: str, digest: str) -> None:
        """Note that a stage starts."""
        self._write(name, {**self._read(name), "begun": digest})

    def finish(self, name: str, digest: str, figures: Mapping[str, Any]) -> None:
        """Note that a stage is complete."""
        self._write(name, {"finished": digest, "figures": dict(figures)})
