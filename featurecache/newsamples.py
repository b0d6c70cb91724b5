"""New samples for a run: a manifest read as the run's own was, or image files, which are given a manifest."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featurecache.config import ManifestConfig
from featurecache.errors import InputError, MissingFileError, RunError, did_you_mean
from featurecache.run import Run

TABLES = (".csv", ".parquet", ".pq", ".tsv")
ID = "sample_id"


@dataclass(frozen=True)
class NewSamples:
    """Where new samples come from, and what differs from how the run's own samples were read.

    Attributes:
        sources: one manifest (table or folder), or image files; for several views `VIEW=FILE`.
        store: where features are cached; None computes them into a temporary store.
        manifest: options of ManifestConfig that differ from the run's.
        body: `body`, `weights` (one for all views, or per view: the same bodies found at another place), and
            `trust_factory`.
        device: where bodies run.
        batch_size: images at a time, or `auto`.
        workers: threads that read and decode, or `auto`.
        tta: augmented versions of each sample to average over; for joint runs.
    """

    sources: tuple[str, ...]
    store: Path | None = None
    manifest: Mapping[str, Any] | None = None
    body: Mapping[str, Any] | None = None
    device: str = "auto"
    batch_size: int | str = "auto"
    workers: int | str = "auto"
    tta: int = 0


def is_table(source: str) -> bool:
    """Whether a source is a manifest rather than an image file."""
    return Path(source).is_dir() or Path(source).suffix.lower() in TABLES


def manifest_config(run: Run, new: NewSamples, scratch: Path) -> ManifestConfig:
    """How the new samples are read: as the run's own were, unless said otherwise. Files get a manifest in `scratch`.

    Raises:
        InputError: manifests and files are mixed, files that can't be told apart by view, a view that the run has not.
        RunError: the run's record is incomplete.
    """
    recorded = run.record.get("manifest_config")
    if not isinstance(recorded, dict):
        raise RunError(f"{run.path}: run.json holds no manifest_config, so it can't be told how samples are read")
    # A root belongs to the manifest that it was given for, and what may be read is for the user to say, not for a run.
    kept = {name: value for name, value in recorded.items() if name not in ("manifest", "root", "allow_outside")}
    if kept.get("views"):
        kept["views"] = {view: column for view, column in kept["views"].items() if view in run.views}
    given = {name: value for name, value in (new.manifest or {}).items() if value}
    tables = [source for source in new.sources if is_table(source)]
    if len(tables) == 1 and len(new.sources) == 1:
        unknown = [view for view in given.get("views", {}) if view not in run.views]
        if unknown:
            raise InputError(
                f"--view {unknown[0]}=...: this run has no view {unknown[0]!r}.{did_you_mean(unknown[0], run.views)} "
                f"It has: {', '.join(run.views)}."
            )
        if given.get("views"):
            given["views"] = {**kept.get("views", {}), **given["views"]}
        return ManifestConfig.create({**kept, **given, "manifest": tables[0]}, source=str(run.path))
    if tables:
        raise InputError(f"{tables[0]}: give one manifest or folder, or image files, not both")
    own = {
        "layout": "wide",
        "views": {view: view for view in run.views},
        "view_column": None,
        "path_column": None,
        "id": ID,
        "box": {},
        "frame": {},
        "flip_if": {},
        "allow_outside": True,
        "manifest": write_file_manifest(new.sources, run.views, scratch / "files.csv"),
    }
    return ManifestConfig.create({**kept, **own}, source=str(run.path))


def write_file_manifest(sources: Sequence[str], views: Sequence[str], path: Path) -> Path:
    """A manifest for single files: one a sample, or `VIEW=FILE` where the run has several views.

    The k-th file of each view belongs to the k-th sample, which is named by its first file.

    Raises:
        MissingFileError: a file is not there.
        InputError: files without a view where there are several, or a file that is given twice for a view.
    """
    files: dict[str, list[str]] = {view: [] for view in views}
    for source in sources:
        view, equals, file = source.partition("=")
        if equals and view in files:
            files[view].append(file)
        elif len(views) == 1:
            files[views[0]].append(source)
        else:
            near = did_you_mean(view, views) if equals else ""
            raise InputError(
                f"{source!r}: this run has the views {', '.join(views)}, so files are given as "
                f"{' '.join(f'{view}=FILE' for view in views)}, once per sample.{near}"
            )
    for view, given in files.items():
        for file in given:
            if not Path(file).is_file():
                raise MissingFileError(f"{file}: no such file (view {view!r})")
    count = max(len(given) for given in files.values())
    names: set[str] = set()
    with open(path, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow([ID, *views])
        for row in range(count):
            cells = [files[view][row] if row < len(files[view]) else "" for view in views]
            name = next(cell for cell in cells if cell)
            if name in names:
                raise InputError(f"{name}: is given twice")
            names.add(name)
            writer.writerow([name, *(str(Path(cell).resolve()) if cell else "" for cell in cells)])
    return path
