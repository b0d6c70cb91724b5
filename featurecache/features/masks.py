"""Masks that a table's column names, as dense targets: read once, brought to what the body sees, kept in a file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from torch import Tensor

from featurecache.config import ManifestConfig
from featurecache.data.dense import BACKGROUND, DENSE, IGNORE, MOST_CLASSES, DenseTarget
from featurecache.data.manifest import Manifest, read_manifest
from featurecache.data.paths import locate
from featurecache.data.preprocessing import Preprocessing
from featurecache.data.readers.base import Decoded, ReadFailure, read
from featurecache.data.readers.mask import MaskReader
from featurecache.data.tables import as_text
from featurecache.errors import InputError, ReadError
from featurecache.stageone.keys import Cell, read_payload
from featurecache.store.binding import Binding
from featurecache.store.recipe import Recipe

UNKNOWN = -1  # in a map of pixel values
MOST_HELD = 64 << 20  # bytes of masks in RAM; more are mapped from a file that goes away with the process
TOGETHER = 256  # masks read before they are put down
MEANING = {"ignore": UNKNOWN, "zero": 0, "one": 1}


@dataclass(frozen=True)
class MaskFiles:
    """The masks of samples, and how they are brought to the size that the body sees.

    Attributes:
        column: of the table.
        ids: (n,) of the samples.
        cells: (n,) where the mask of each is; None where it has none.
        preprocessing: of the view that the masks lie on.
        values: how a pixel says its class: `index`, `inside` or `alpha`, see `MaskReader`.
        uncertain: pixel value as text -> `ignore` (unknown), `zero` or `one`.
    """

    column: str
    ids: Sequence[str]
    cells: Sequence[Cell | None]
    preprocessing: Preprocessing
    values: str = "index"
    uncertain: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of every mask."""
        size = self.preprocessing.size()
        if size is None:
            raise InputError("masks need a body that sees images of one size: give --image-size")
        return size

    def load(self, sample: int, bring: Callable[[Decoded, Preprocessing], Tensor] | None = None) -> Map | str | None:
        """The mask of a sample; None where it has none, or why it can't be read.

        Args:
            sample: its position.
            bring: brings (height, width, k) to (k, *size), as it does with the image; default the plain preprocessing.
        """
        cell = self.cells[sample]
        if cell is None:
            return None
        payload = read_payload(cell)
        if isinstance(payload, ReadFailure):
            return payload.message
        selector = {name: value for name, value in json.loads(cell.selector).items() if name != "frame"}
        found = read(MaskReader(values=self.values), payload.data, selector)
        if isinstance(found, ReadFailure):
            return found.message
        try:
            return self._brought(found.array[:, :, 0].astype(np.int32), bring or _plainly)
        except ReadError as error:
            return str(error)

    def _brought(self, values: NDArray[np.int32], bring: Callable[[Decoded, Preprocessing], Tensor]) -> Map:
        """Each class resized as the image is, and for each pixel the one that covers most of it: no shift, no mixture.

        What lies beside the image (a border, the corners of a rotation) is unknown.
        """
        for value, meaning in self.uncertain.items():
            values = np.where(values == int(value), MEANING[meaning], values)
        present = np.unique(values)
        if len(present) > MOST_CLASSES:
            raise ReadError(
                f"{len(present)} different values, which are no classes. For masks with soft edges give "
                "--masks inside or --masks alpha."
            )
        hot = (values[:, :, None] == present).astype(np.float32)
        count = len(present)
        way = replace(self.preprocessing, channels=count, mean=(0.0,) * count, std=(1.0,) * count)
        covered = bring(Decoded(hot, 1.0), way)
        best = present[covered.argmax(dim=0).numpy()]
        return Map(np.where(covered.amax(dim=0).numpy() > 0, best, UNKNOWN), present[present != UNKNOWN])


@dataclass(frozen=True)
class Map:
    """A mask: `values` (height, width) int32 pixel values, UNKNOWN where none, and those `present` before resizing."""

    values: NDArray[np.int32]
    present: NDArray[np.int32]

    def indices(self, classes: Sequence[str]) -> NDArray[np.uint8]:
        """(height, width) uint8 class indices, IGNORE where unknown."""
        known = np.array([int(name) for name in classes], dtype=np.int32)
        place = np.minimum(np.searchsorted(known, self.values), len(known) - 1)
        return np.where(known[place] == self.values, place, IGNORE).astype(np.uint8)


def _plainly(decoded: Decoded, preprocessing: Preprocessing) -> Tensor:
    return preprocessing.apply(decoded)


def mask_cells(manifest: Manifest, config: ManifestConfig, column: str, view: str) -> list[Cell | None]:
    """Where the mask of each sample of a manifest is, cut and mirrored as the first image of `view` is.

    Raises:
        InputError: no such column, files that are missing or outside the root.
    """
    written = as_text(manifest.column(column)).str.strip_chars()
    written = pl.select(pl.when(written != "").then(written)).to_series()
    root = config.root if config.root is not None else (
        manifest.path if manifest.path.is_dir() else manifest.path.parent
    )  # fmt: skip
    located = locate(written.drop_nulls(), str(root), allow_outside=config.allow_outside)
    wrong = located.filter(pl.col("problem").is_not_null())
    if wrong.height:
        lines = [f"column {column!r}: {value}: {problem}" for value, _, problem in wrong.iter_rows()]
        raise InputError.from_problems(f"{manifest.path.name}: {wrong.height} masks can't be had", lines)
    places = dict(zip(located["value"].to_list(), located["location"].to_list(), strict=True))
    first = manifest.cells.filter((pl.col("view") == view) & (pl.col("ordinal") == 0))
    selectors = dict(zip(first["sample"].to_list(), first["selector"].to_list(), strict=True))
    return [
        None if value is None else Cell(row, "file", value, places[value], selectors.get(row) or "{}")
        for row, value in enumerate(written.to_list())
    ]


def check_uncertain(uncertain: Mapping[str, str]) -> None:
    """Refuse pixel values that are no whole numbers.

    Raises:
        InputError: names it.
    """
    for value, meaning in uncertain.items():
        if not value.isdecimal() or meaning not in MEANING:
            raise InputError(
                f"--uncertain {value}={meaning}: of masks, give a pixel value and ignore, zero or one: 255=ignore"
            )


def bound_masks(
    binding: Binding,
    sample_ids: Sequence[str],
    columns: Sequence[str],
    recipes: Mapping[str, Recipe],
    *,
    values: str,
    uncertain: Mapping[str, str],
) -> MaskFiles:
    """The masks of a dataset's samples.

    Args:
        binding: the dataset; its manifest says where relative paths start.
        sample_ids: the samples, in order.
        columns: the target; one column.
        recipes: of the view that the masks lie on; one view.
        values: see `MaskFiles`.
        uncertain: see `MaskFiles`.

    Raises:
        InputError: several columns or views, several images of a view, masks that can't be had.
    """
    check_dense(columns, tuple(recipes), binding.multi, uncertain)
    config = ManifestConfig.create({**binding.config["manifest"], "manifest": Path(binding.manifest_path)})
    manifest = read_manifest(config, images=False)
    [(view, recipe)] = recipes.items()
    cells = mask_cells(manifest, config, columns[0], view)
    place = dict(zip(manifest.table["sample_id"].to_list(), cells, strict=True))
    way = Preprocessing.from_parameters(recipe.fields["preprocessing"])
    return MaskFiles(columns[0], sample_ids, [place.get(name) for name in sample_ids], way, values, uncertain)


def check_dense(columns: Sequence[str], views: Sequence[str], multi: str, uncertain: Mapping[str, str]) -> None:
    """Refuse what a mask can't lie on.

    Raises:
        InputError: several columns or views, several images of a view that are averaged, an uncertain value.
    """
    if len(columns) != 1:
        raise InputError(f"{len(columns)} target columns ({', '.join(columns)}): a dense target is one column of masks")
    if len(views) != 1:
        raise InputError(f"a mask lies on the images of one view, not of {', '.join(views)}: choose with --views")
    if multi in ("mean", "max"):
        raise InputError(f"--multi {multi}: a mask lies on one image. Extract with --multi first or error.")
    check_uncertain(uncertain)


def read_masks(files: MaskFiles, *, source: str = "", classes: Sequence[str] | None = None) -> DenseTarget:
    """Read all masks, by as many threads as there are cores.

    Args:
        files: which.
        source: what messages begin with.
        classes: those of a model; by default the pixel values that are there.

    Raises:
        InputError: masks that can't be read or hold a class that the model does not know, no mask, one class.
    """
    head = f"{source}: " if source else ""
    n, size = len(files.cells), files.size
    values = _room((n, *size))
    has, filled = np.zeros(n, bool), np.zeros(n, bool)
    codes = {int(name): number for number, name in enumerate(classes or ())}
    problems: list[str] = []
    with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="masks") as pool:
        for start in range(0, n, TOGETHER):
            rows = range(start, min(start + TOGETHER, n))
            for row, found in zip(rows, pool.map(files.load, rows), strict=True):
                if isinstance(found, Map):
                    new = [value for value in found.present.tolist() if value not in codes]
                    if classes is None and len(codes) + len(new) <= MOST_CLASSES:
                        codes |= {value: len(codes) + place for place, value in enumerate(new)}
                    elif new:
                        found = f"pixel value {new[0]} is none of {', '.join(map(str, sorted(codes)))}"
                if isinstance(found, str):
                    problems.append(f"sample {files.ids[row]!r}: {files.cells[row].value}: {found}")  # type: ignore[union-attr]
                elif found is not None:
                    has[row], filled[row] = True, bool((found.present != int(BACKGROUND)).any())
                    values[row] = _coded(found.values, codes)
    if problems:
        raise InputError.from_problems(f"{head}column {files.column!r}: {len(problems)} masks can't be used", problems)
    if not has.any():
        raise InputError(f"{head}column {files.column!r}: no sample has a mask")
    if classes is None:
        classes = [str(value) for value in sorted(codes)]
        _recoded(values, [classes.index(str(value)) for value in codes])
    if len(classes) < 2:
        raise InputError(f"{head}column {files.column!r}: all pixels are {', '.join(classes)}; two classes are needed")
    return DenseTarget(DENSE, (files.column,), tuple(classes), values, np.arange(n), has, filled)


def _coded(values: NDArray[np.int32], codes: Mapping[int, int]) -> NDArray[np.uint8]:
    found = np.full(values.shape, IGNORE, np.uint8)
    for value in np.unique(values).tolist():
        found[values == value] = codes.get(value, IGNORE)
    return found


def _recoded(values: NDArray[np.uint8], order: Sequence[int]) -> None:
    """Number the classes by value rather than by when they were met."""
    if list(order) != sorted(order):
        table = np.arange(256, dtype=np.uint8)
        table[: len(order)] = order
        for row in range(len(values)):
            values[row] = table[values[row]]


def _room(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """An array of IGNORE, in RAM or in a file without a name, which no kill leaves behind."""
    if int(np.prod(shape)) <= MOST_HELD:
        return np.full(shape, IGNORE, np.uint8)
    with tempfile.TemporaryFile(prefix="featurecache-masks-") as file:
        room = np.memmap(file, dtype=np.uint8, mode="w+", shape=shape)
    for row in range(shape[0]):
        room[row] = IGNORE
    return room
