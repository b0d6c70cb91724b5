"""Predicted masks as PNG files, a grey value per class, as the masks that were learned from have them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FOLDER = "masks"  # of a run
SHOWN = "test"  # the split whose masks a run keeps; `predict` gives those of any samples
TOGETHER = 64  # masks in RAM at a time


class MaskFolder:
    """Writes masks into a folder, each under its sample's id as far as a file can be called so.

    Args:
        folder: made with the first mask.
        classes: pixel values as text.
    """

    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        self.folder = folder
        values = [int(name) for name in classes]
        self._values = np.array(values, dtype=np.uint8 if max(values) < 256 else np.uint16)
        self._taken: set[str] = set()

    def write(self, sample_id: str, mask: NDArray[np.uint8]) -> str:
        """Write class indices (height, width); returns `FOLDER/FILE.png`, relative to what the folder lies in."""
        stem = re.sub(r"[^\w.+-]", "_", sample_id).strip(".")[:100] or "_"
        name, number = stem, 1
        while name.lower() in self._taken:
            number += 1
            name = f"{stem}-{number}"
        self._taken.add(name.lower())
        self.folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self._values[mask]).save(self.folder / f"{name}.png", optimize=False)
        return f"{self.folder.name}/{name}.png"


def read_mask(path: Path, classes: Sequence[str]) -> NDArray[np.uint8]:
    """Class indices (height, width) of a file that `MaskFolder` wrote."""
    with Image.open(path) as image:
        values = np.asarray(image)
    known = np.array([int(name) for name in classes])
    return np.searchsorted(known, values).astype(np.uint8)


def read_in_parts(
    base: Path, names: Sequence[str], classes: Sequence[str]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    """Positions and masks (k, height, width) of such files, some at a time."""
    for start in range(0, len(names), TOGETHER):
        part = names[start : start + TOGETHER]
        yield np.arange(start, start + len(part)), np.stack([read_mask(base / name, classes) for name in part])
