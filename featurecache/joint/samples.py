"""Which samples take part: every image is read once, what fails is set aside, and the rest is split."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurecache.amounts import counted
from featurecache.config import SplitConfig
from featurecache.data.everyone import taking_part
from featurecache.data.splits import check_leaks, sample_groups
from featurecache.errors import FeatureCacheError, InputError
from featurecache.joint.images import Failure, SampleImages
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
        failed: images that can't be read: missing views, but where the sample has no other or training had begun.
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
        known = {(failure.sample, failure.view, failure.path) for failure in self.failed}
        fresh = tuple({f.sample: f for f in more if (f.sample, f.view, f.path) not in known}.values())
        content = tuple(keys for keys, kept in zip(self.content, keep.tolist(), strict=True) if kept)
        arrays = (self.rows[keep], self.splits[keep], self.groups[keep], self.present[keep])
        return Samples(*arrays, content, (*self.failed, *fresh))


def choose_samples(start: Start, images: SampleImages, *, workers: int, reporter: Reporter) -> Samples:
    """Read every image once and split what can be used.

    A sample takes part if it has an image that can be read; one that can't counts as missing, as it does for a head on
    cached features. Without a known target a sample is predicted only. Reading all of them first finds what fails
    before hours of training, and the keys by which a split must not be torn.

    Raises:
        InputError: a view is missing and that is not allowed, the split is not valid, or no sample is left to train on.
    """
    wanted = _allowed(start, images, np.flatnonzero(images.present.any(axis=1)))
    failed: list[Failure] = []
    content: dict[int, tuple[str, ...]] = {}
    reporter.begin("read", len(wanted), "samples")
    try:
        for item, unread in images.readable(wanted, workers=workers):
            failed += unread
            if not isinstance(item, Failure):
                content[item.sample] = tuple(key.hex() for key in item.keys)
            reporter.advance("read", 1, status=f"{len(failed)} failed" if failed else "")
    finally:
        reporter.end("read")
    kept = _allowed(start, images, np.array(list(content), dtype=np.int64))
    if not len(kept):
        raise FeatureCacheError(
            f"none of the {len(wanted)} samples with images can be used; the first: {failed[0].path}: {failed[0].error}"
            if failed
            else f"{start.manifest.path}: no sample has an image"
        )
    if failed:
        reporter.note(_what_failed(failed, kept, start.manifest.table["sample_id"].to_list()))
    keys = [content[row] for row in kept.tolist()]
    splits, groups = _split(start, kept, content)
    return Samples(kept, splits, groups, images.present[kept], tuple(keys), tuple(failed))


def _allowed(start: Start, images: SampleImages, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those of some samples that `--missing` admits, with what is missing by now."""
    lacking = rows[~images.present[rows].all(axis=1)]
    if start.config.missing == "error" and len(lacking):
        raise InputError(
            f"{len(lacking)} samples lack one of {', '.join(images.views)} "
            f"(first: {start.manifest.table['sample_id'][int(lacking[0])]}), and "
            "--missing error refuses that. Use --missing zero or drop."
        )
    found: NDArray[np.int64] = np.setdiff1d(rows, lacking) if start.config.missing == "drop" else rows
    return found


def _what_failed(failed: list[Failure], kept: NDArray[np.int64], ids: list[str]) -> str:
    """What becomes of images that can't be read, in a line."""
    first, out = failed[0], {failure.sample for failure in failed} - set(kept.tolist())
    where = f"first: {ids[first.sample]}, {first.view} {first.path}: {first.error}"
    lost = f", which leaves out {counted(len(out), 'sample')} (first: {ids[min(out)]})" if out else ""
    return f"{counted(len(failed), 'image')} can't be read, taken as missing ({where}){lost}"


def _split(
    start: Start, kept: NDArray[np.int64], content: Mapping[int, tuple[str, ...]]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Split and group of the kept samples; `content` by row of the manifest's table."""
    config = SplitConfig(**start.config.fields_of(SplitConfig))
    table = start.manifest.table[kept]
    groups = sample_groups(table, config.group)
    if start.splits is None:
        source = str(start.manifest.path)
        every = start.manifest.table
        keys = [content.get(row) for row in range(every.height)]
        return taking_part(every, start.target, config, kept, content=keys, source=source), groups
    splits = np.where(start.target.known[kept], start.splits[kept], "")
    # Images may have changed since the head's split was made.
    keys = [content[row] for row in kept.tolist()]
    check_leaks(table["sample_id"].to_list(), splits, groups, keys, source=str(start.manifest.path))
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
