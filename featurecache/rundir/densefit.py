"""What a decoder says of samples: masks written as files, their pixels counted against the true ones, pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from featurecache.data.dense import IGNORE, DenseTarget, foreground, pixel_counts
from featurecache.data.targets import Target
from featurecache.evaluation.dense import nan_mean
from featurecache.reporting.thumbnails import encode
from featurecache.rundir.densepredictions import DensePredictions
from featurecache.rundir.maskfiles import FOLDER, SHOWN, MaskFolder, read_mask
from featurecache.rundir.record import dump_json

PICTURES = "pictures"
FILE = "masks.json"
SIZE = 224  # pixels of the longest edge
PALETTE = np.array(
    [(31, 41, 55), (45, 156, 219), (242, 153, 74), (39, 174, 96), (155, 81, 224), (235, 87, 87), (242, 201, 76),
     (86, 204, 242), (111, 207, 151), (187, 107, 217)], dtype=np.uint8,
)  # fmt: skip
NOWHERE = (158, 158, 158)  # the colour of pixels that count nowhere
Masks = Iterable[tuple[NDArray[np.int64], NDArray[np.uint8]]]


class Counted(NamedTuple):
    """Pixels of n samples as the evaluation takes them.

    Attributes:
        target: `values` (n, classes) float64 pixels of each class; NaN where the sample has no mask.
        scores: (n, classes, 2) float64 pixels said to be of the class, and the right ones.
        files: (n,) where the mask was written, relative to the run; '' where it was not.
    """

    target: Target
    scores: NDArray[np.float64]
    files: list[str]


def count_masks(
    said: Masks,
    target: DenseTarget,
    *,
    directory: Path,
    sample_ids: Sequence[str] | NDArray[Any],
    written: NDArray[np.bool_],
) -> Counted:
    """Compare predicted masks with the true ones, and write some of them.

    Args:
        said: positions among the samples and class indices (k, height, width), each sample once.
        target: of the n samples.
        directory: of the run; masks go into masks/ there.
        sample_ids: (n,).
        written: (n,) whose masks are written.
    """
    folder, files = MaskFolder(directory / FOLDER, target.classes), [""] * len(target)

    def passing() -> Masks:
        for places, masks in said:
            for place, mask in zip(places.tolist(), masks, strict=True):
                if written[place]:
                    files[place] = folder.write(str(sample_ids[place]), mask)
            yield places, masks

    return Counted(*count_pixels(passing(), target), files)


def count_pixels(said: Masks, target: DenseTarget) -> tuple[Target, NDArray[np.float64]]:
    """`target` and `scores` of `Counted`; of a sample without a mask all pixels are counted that were said."""
    n, classes = len(target), len(target.classes)
    known = target.known
    true, scores = np.full((n, classes), np.nan), np.zeros((n, classes, 2))
    for places, masks in said:
        counts = pixel_counts(target.values[target.rows[places]], masks, classes)
        scores[places] = counts[:, :, 1:]
        seen = known[places]
        true[places[seen]] = counts[seen, :, 0]
        for place in np.flatnonzero(~seen).tolist():
            scores[places[place], :, 0] = np.bincount(masks[place].reshape(-1), minlength=classes)
    return Target(target.task, target.names, target.classes, true), scores


def write_masks(
    said: Masks, sample_ids: Sequence[str] | NDArray[Any], classes: Sequence[str], folder: Path | None
) -> tuple[NDArray[np.float64], list[str]]:
    """Write the masks of samples whose true ones nobody knows.

    Args:
        said: positions among the samples and class indices (k, height, width), each sample once.
        sample_ids: (n,).
        classes: pixel values as text.
        folder: where they go; None for nowhere.

    Returns:
        The share of the pixels that each class takes (n, classes), and the files, relative to what the folder lies in.
    """
    writer = MaskFolder(folder, classes) if folder is not None else None
    shares, files = np.zeros((len(sample_ids), len(classes))), [""] * len(sample_ids)
    for places, masks in said:
        for place, mask in zip(places.tolist(), masks, strict=True):
            shares[place] = np.bincount(mask.reshape(-1), minlength=len(classes)) / mask.size
            if writer is not None:
                files[place] = writer.write(str(sample_ids[place]), mask)
    return shares, files


def kept(splits: NDArray[Any]) -> NDArray[np.bool_]:
    """(n,) the samples whose masks a run keeps: those of test, or where there are none of validation."""
    return np.asarray(splits == (SHOWN if (splits == SHOWN).any() else "valid"))


def write_pictures(
    directory: Path,
    predictions: DensePredictions,
    target: DenseTarget,
    picture: Callable[[str], NDArray[np.uint8] | None],
    *,
    images: int | Literal["none"],
) -> None:
    """Image, true and predicted mask of some samples, into pictures/ and masks.json.

    Half of them are those with the lowest IoU, the others evenly spread over the rest.

    Args:
        directory: of the run being written; its predicted masks are read back.
        predictions: of all samples.
        target: their true masks.
        picture: of a sample, as the body sees it: (height, width[, 3]) uint8; None where it can't be had.
        images: how many; 0 or `none` for none.
    """
    most = 0 if images == "none" else int(images)
    iou = nan_mean(predictions.overlap("iou")[:, foreground(predictions.classes)])
    dice = nan_mean(predictions.overlap("dice")[:, foreground(predictions.classes)])
    shown: list[dict[str, Any]] = []
    for row in chosen(np.where(predictions.known() & (predictions.masks != ""), iou, np.nan), most).tolist():
        name = str(predictions.sample_ids[row])
        said = read_mask(directory / str(predictions.masks[row]), predictions.classes)
        views = {"image": picture(name), "true": painted(target.values[target.rows[row]]), "predicted": painted(said)}
        files = {}
        for what, array in views.items():
            if array is not None:
                data = encode(array, SIZE)
                kind = "webp" if data[:4] == b"RIFF" else "jpg"
                (directory / PICTURES).mkdir(exist_ok=True)
                files[what] = f"{PICTURES}/{len(shown):03}-{re.sub(r'[^a-z]', '_', what)}.{kind}"
                (directory / files[what]).write_bytes(data)
        shown.append({"sample_id": name, "iou": float(iou[row]), "dice": float(dice[row]), "pictures": files})
    colours = {label: "#{:02x}{:02x}{:02x}".format(*colour(n)) for n, label in enumerate(predictions.classes)}
    record = {"schema": 1, "colours": colours, "samples": shown}
    (directory / FILE).write_text(dump_json(record), encoding="utf-8")


def chosen(iou: NDArray[np.float64], most: int) -> NDArray[np.int64]:
    """Rows in the order of `iou` (n,): the lowest, and some of the rest; those without one are left out."""
    order = np.argsort(iou, kind="stable")[: int(np.count_nonzero(~np.isnan(iou)))]
    if len(order) <= most:
        return order
    low = most // 2
    rest = np.linspace(low, len(order) - 1, most - low).round().astype(np.int64) if most else np.empty(0, np.int64)
    return np.asarray(order[np.concatenate([np.arange(low), rest])])


def colour(index: int) -> tuple[int, int, int]:
    """Of a class."""
    red, green, blue = PALETTE[index % len(PALETTE)].tolist()
    return red, green, blue


def painted(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Class indices (height, width) in colours (height, width, 3); grey where unknown."""
    table = np.array([colour(index) for index in range(256)], dtype=np.uint8)
    table[IGNORE] = NOWHERE
    return np.asarray(table[mask])
