"""Which samples take part: every image is read once, what fails is set aside, and the rest is split."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurecache.config import SplitConfig
from featurecache.data.splits import check_leaks, make_splits, sample_groups
from featurecache.errors import FeatureCacheError, InputError
from featurecache.joint.images import Failure, Loaded, SampleImages
from featurecache.joint.start import Start
from featurecache.progress import Reporter

FAILURE_COLUMNS = ("sample_id", "view", "path", "error")


@dataclass(frozen=True)
class Samples:
    """The samples that take part.

    Attributes:
        rows: int64, their rows in the manifest's table.
        splits: `train`, `valid`, `test` per row; '' where the target is unknown, or where the reused split has no say.
        groups: what the split kept together, per row.
        present: (n, n_views) bool.
        content: per row the keys of its images.
        failed: those that had to be left out since an image can't be read.
    """

    rows: NDArray[np.int64]
    splits: NDArray[Any]
    groups: NDArray[Any]
    present: NDArray[np.bool_]
    content: tuple[tuple[str, ...], ...]
    failed: tuple[Failure, ...]

    def of(self, split: str) -> NDArray[np.int64]:
        """Rows of the manifest's table in one split."""
        found: NDArray[np.int64] = self.rows[self.splits == split]
        return found

    def without(self, failed: Iterable[Failure]) -> Samples:
        """What is left when further samples turned out to be unreadable."""
        more = tuple(failed)
        keep = ~np.isin(self.rows, [failure.sample for failure in more])
        known = {failure.sample for failure in self.failed}
        fresh = tuple({f.sample: f for f in more if f.sample not in known}.values())
        content = tuple(keys for keys, kept in zip(self.content, keep.tolist(), strict=True) if kept)
        arrays = (self.rows[keep], self.splits[keep], self.groups[keep], self.present[keep])
        return Samples(*arrays, content, (*self.failed, *fresh))


def choose_samples(start: Start, images: SampleImages, *, workers: int, reporter: Reporter) -> Samples:
    """Read every image once and split what can be used.

    A sample takes part if it has an image and all its images can be read; without a known target it is predicted only.
    Reading all of them first finds what fails before hours of training, and the keys by which a split must not be torn.

    Raises:
        InputError: a view is missing and that is not allowed, the split is not valid, or no sample is left to train on.
    """
    config, ids = start.config, start.manifest.table["sample_id"].to_list()
    present = images.present
    wanted = np.flatnonzero(present.any(axis=1))
    lacking = wanted[~present[wanted].all(axis=1)]
    if config.missing == "error" and len(lacking):
        raise InputError(
            f"{len(lacking)} samples lack one of {', '.join(images.views)} (first: {ids[lacking[0]]}), and "
            "--missing error refuses that. Use --missing zero or drop."
        )
    if config.missing == "drop":
        wanted = np.setdiff1d(wanted, lacking)
    rows, failed, content = [], [], {}
    reporter.begin("read", len(wanted), "samples")
    try:
        for item in images.items(wanted, workers=workers):
            if isinstance(item, Loaded):
                rows.append(item.sample)
                content[item.sample] = tuple(key.hex() for key in item.keys)
            else:
                failed.append(item)
            reporter.advance("read", 1, status=f"{len(failed)} failed" if failed else "")
    finally:
        reporter.end("read")
    if not rows:
        raise FeatureCacheError(
            f"none of the {len(wanted)} samples with images can be read; the first: {failed[0].error}"
            if failed
            else f"{start.manifest.path}: no sample has an image"
        )
    kept = np.array(rows, dtype=np.int64)
    keys = [content[row] for row in rows]
    splits, groups = _split(start, kept, keys)
    return Samples(kept, splits, groups, present[kept], tuple(keys), tuple(failed))


def _split(start: Start, kept: NDArray[np.int64], content: list[tuple[str, ...]]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Split and group of the kept samples."""
    config = SplitConfig(**start.config.fields_of(SplitConfig))
    table = start.manifest.table[kept]
    groups = sample_groups(table, config.group)
    if start.splits is None:
        source = str(start.manifest.path)
        return make_splits(table, start.target.subset(kept), config, content=content, source=source), groups
    splits = np.where(start.target.known[kept], start.splits[kept], "")
    # Images may have changed since the head's split was made.
    check_leaks(table["sample_id"].to_list(), splits, groups, content, source=str(start.manifest.path))
    return splits, groups


def failure_rows(ids: list[str], failed: Iterable[Failure]) -> list[dict[str, str]]:
    """Failures as rows of failures.csv."""
    return [{"sample_id": ids[f.sample], "view": f.view, "path": f.path, "error": f.error} for f in failed]


def write_failures(path: Path, ids: list[str], failed: Iterable[Failure]) -> list[dict[str, str]]:
    """RUN/failures.csv, where a sample failed; returns its rows."""
    rows = failure_rows(ids, failed)
    if rows:
        with path.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, FAILURE_COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    return rows


def from_progress(failed: Iterable[Mapping[str, Any]]) -> list[Failure]:
    """Failures that a checkpoint remembers."""
    return [Failure(int(f["sample"]), str(f["view"]), str(f["path"]), str(f["error"])) for f in failed]
