"""Small pictures of the images behind a dataset, for pages and files that people look at; bounded in size."""

from __future__ import annotations

import base64
import io
import json
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from featurecache.config import ManifestConfig
from featurecache.data.manifest import Manifest, read_manifest
from featurecache.data.preprocessing import Preprocessing
from featurecache.data.readers import PLUGIN, get_reader
from featurecache.data.readers.base import Decoded, Reader, ReadFailure, read
from featurecache.errors import DependencyError, InputError
from featurecache.stageone.keys import Cell, present_cells, read_payload
from featurecache.store.binding import Binding
from featurecache.store.recipe import Recipe

SIZES = (112, 96, 80, 64, 48, 40, 32)  # longest edge in pixels, the first that fits
TRIED = 24  # images by which the size is chosen
MOST_OF_A_VIEW = 4
MOST_TEXT = 300


@dataclass(frozen=True)
class Picture:
    """What a sample shows in one view: an encoded image, or the text of a text view."""

    view: str
    data: bytes = b""
    text: str = ""

    def uri(self) -> str:
        """The image as a data URI; '' for text."""
        if not self.data:
            return ""
        kind = "webp" if self.data[:4] == b"RIFF" else "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(self.data).decode('ascii')}"

    def size(self) -> int:
        """Characters that it takes in a page."""
        return 4 * len(self.data) // 3 + len(self.text) + 40


def eight_bit(decoded: Decoded) -> NDArray[np.uint8]:
    """(height, width) or (height, width, 3) for the eye; values beyond 8 bit are stretched from least to most."""
    array = decoded.array[..., :3] if decoded.array.shape[2] >= 3 else decoded.array[..., 0]
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    values = np.nan_to_num(array.astype(np.float32), posinf=decoded.limit, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    stretched: NDArray[np.uint8] = np.rint((values - low) * (255 / (high - low) if high > low else 0)).astype(np.uint8)
    return stretched


def encode(array: NDArray[np.uint8], size: int) -> bytes:
    """An image, at most `size` pixels long and wide, as WebP, or as JPEG where Pillow has no WebP."""
    image = Image.fromarray(array)
    image.thumbnail((size, size), Image.Resampling.BOX if max(image.size) > 8 * size else Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if features.check("webp"):
        image.save(file, "WEBP", quality=72, method=2)
    else:
        image.save(file, "JPEG", quality=75)
    return file.getvalue()


class Pictures:
    """The images of a dataset's samples, read from where its manifest says they are.

    Only what is still the content that the features were made of is shown.

    Args:
        binding: the dataset.
        recipes: per view that is to be shown the recipe of its features, whose reader decodes the images.

    Attributes:
        notes: why views have no pictures, if so.
    """

    def __init__(self, binding: Binding, recipes: Mapping[str, Recipe]) -> None:
        self.notes: list[str] = []
        self._cells: dict[str, dict[str, list[tuple[Cell, bytes | None]]]] = {}
        self._readers: dict[str, Reader] = {}
        self._preprocessing: dict[str, Preprocessing] = {}
        if not Path(binding.manifest_path).exists():
            name = Path(binding.manifest_path).name
            self.notes.append(
                f"No pictures: {name} is no longer where it was. Run featurecache extract with it where it is now, "
                f"with --name {shlex.quote(binding.name)}: nothing that is there is computed again."
            )
            return
        config = ManifestConfig.create({**binding.config["manifest"], "manifest": binding.manifest_path})
        manifest = read_manifest(config, images=False)
        ids = binding.table["sample_id"].to_list()
        keys = {
            (ids[sample], view, ordinal): key
            for sample, view, ordinal, key in binding.cells.select("sample", "view", "ordinal", "key").iter_rows()
        }
        self._take(manifest, recipes, keys)

    @classmethod
    def of_manifest(cls, manifest: Manifest, recipes: Mapping[str, Recipe]) -> Self:
        """The images of a manifest as they are now."""
        found = cls.__new__(cls)
        found.notes, found._cells, found._readers, found._preprocessing = [], {}, {}, {}
        found._take(manifest, recipes, {})
        return found

    def _take(
        self, manifest: Manifest, recipes: Mapping[str, Recipe], keys: Mapping[tuple[str, str, int], bytes | None]
    ) -> None:
        """Remember where the images are, and what they must be where that is known."""
        ids = manifest.table["sample_id"].to_list()
        for view, recipe in recipes.items():
            reader = recipe.fields["reader"]
            if PLUGIN.fullmatch(reader["name"]):  # a store must not make this process import code
                self.notes.append(f"No pictures of view {view}: its reader {reader['name']} is a plug-in.")
                continue
            try:
                self._readers[view] = get_reader(reader["name"], **reader["parameters"])
            except (InputError, DependencyError):
                self.notes.append(f"No pictures of view {view}: its reader {reader['name']!r} can't be had here.")
                continue
            self._preprocessing[view] = Preprocessing.from_parameters(recipe.fields["preprocessing"])
            held = self._cells.setdefault(view, {})
            cells = present_cells(manifest.cells, view)
            samples, ordinals = cells.column("sample").to_list(), cells.column("ordinal").to_list()
            for cell, sample, ordinal in zip(cells, samples, ordinals, strict=True):
                held.setdefault(ids[sample], []).append((cell, keys.get((ids[sample], view, ordinal))))

    def of(self, sample_id: str, size: int) -> list[Picture]:
        """The pictures of one sample in the order of the views; what can't be read or has changed is left out."""
        found = []
        for view, held in self._cells.items():
            for cell, key in held.get(sample_id, ())[:MOST_OF_A_VIEW]:
                if (picture := self._picture(view, cell, key, size)) is not None:
                    found.append(picture)
        return found

    def _picture(self, view: str, cell: Cell, key: bytes | None, size: int) -> Picture | None:
        if cell.kind == "text":
            return Picture(view, text=cell.value[:MOST_TEXT])
        decoded = self._decoded(view, cell, key)
        return None if decoded is None else Picture(view, encode(eight_bit(decoded), size))

    def _decoded(self, view: str, cell: Cell, key: bytes | None) -> Decoded | None:
        payload = read_payload(cell)
        if isinstance(payload, ReadFailure) or (key is not None and payload.key != key):
            return None
        decoded = read(self._readers[view], payload.data, json.loads(cell.selector))
        return None if isinstance(decoded, ReadFailure) or decoded.array.ndim != 3 else decoded

    def seen(self, sample_id: str) -> NDArray[np.uint8] | None:
        """The first picture of a sample as the body sees it, (height, width[, 3]); None where it can't be had."""
        for view, held in self._cells.items():
            for cell, key in held.get(sample_id, ())[:1]:
                decoded = self._decoded(view, cell, key) if cell.kind == "file" else None
                if decoded is not None:
                    array = self._preprocessing[view].apply(decoded).permute(1, 2, 0).numpy()
                    limit = 255.0 if array.dtype == np.uint8 else 1.0
                    return eight_bit(Decoded(array, limit))
        return None

    def many(self, sample_ids: Iterable[str], size: int) -> Iterator[list[Picture]]:
        """`of` many samples, in order, read by threads."""
        with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="pictures") as pool:
            yield from pool.map(lambda name: self.of(name, size), sample_ids)


def fitting(pictures: Pictures, sample_ids: Sequence[str], budget: int) -> tuple[list[list[Picture]], int]:
    """Pictures of the samples that together take at most `budget` characters.

    The size is the largest that fits all; where not even the smallest does, samples evenly among them have some.

    Returns:
        Per sample its pictures, and the size in pixels.
    """
    n = len(sample_ids)
    trial = [sample_ids[i] for i in np.unique(np.linspace(0, n - 1, min(TRIED, n)).astype(int))] if n else []
    size, each = SIZES[-1], 1.0
    for size in SIZES:
        each = max(sum(p.size() for shown in pictures.many(trial, size) for p in shown) / max(len(trial), 1), 1.0)
        if each * n <= 0.9 * budget:
            break
    share = min(0.9 * budget / (each * n), 1.0) if n else 1.0
    chosen = np.zeros(n, dtype=bool)
    chosen[np.unique(np.linspace(0, n - 1, int(share * n)).astype(int)) if n else []] = True
    found: list[list[Picture]] = [[] for _ in range(n)]
    left = budget
    places = np.flatnonzero(chosen).tolist()
    for place, shown in zip(places, pictures.many([sample_ids[i] for i in places], size), strict=True):
        needed = sum(picture.size() for picture in shown)
        if needed <= left:
            found[place], left = shown, left - needed
    return found, size
