"""Notices drifted numbers: each recipe keeps the features of four synthetic inputs, compared before appending."""

from __future__ import annotations

import importlib.metadata
import io
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from featurecache.bodies.engines import Engine
from featurecache.data.preprocessing import stack
from featurecache.data.readers.base import Decoded, Reader
from featurecache.data.readers.text import TextReader
from featurecache.data.transforms import Preprocessing
from featurecache.errors import StoreError
from featurecache.stageone.replicas import DrawnVersion

INPUTS = 4
KEPT = 256  # values kept per input and tap: enough to see drift, small enough for an attribute of a Zarr group
# Relative centred error ||a - b|| / ||b - mean(b)|| beyond which a process may not append. Between correct kernels
# fp32 features differ by about 1e-6 and low-precision ones by up to 0.014.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.03, "fp16": 0.01}
LIBRARIES = ("featurecache", "torch", "torchvision", "openvino", "timm", "pillow", "pydicom", "numpy")


def versions() -> dict[str, str]:
    """Versions of what the numbers may depend on, for the record."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def changed_versions(recorded: Mapping[str, Any]) -> list[str]:
    """`torch 2.13.0 then, 2.14.1 now`: the libraries that differ from those recorded beside a recipe."""
    before, after = recorded.get("versions", {}), versions()
    return [
        f"{library} {before.get(library, 'absent')} then, {after.get(library, 'absent')} now"
        for library in sorted({*before, *after})
        if before.get(library) != after.get(library)
    ]


def synthetic_images(size: int = 256) -> list[NDArray[np.uint8]]:
    """Four fixed RGB images, (size, size, 3): gradients, rings, stripes and blocks, made by integer arithmetic."""
    y, x = np.mgrid[0:size, 0:size].astype(np.int64)
    rings = (x - size // 2) ** 2 + (y - size // 3) ** 2
    planes = [
        (x, y, (x + y) // 2),
        (rings // 37, rings // 53 + x, rings // 71 + y),
        ((x // 9 * 67 + y) * 3, y // 5 * 41, (x + 2 * y) // 7 * 29),
        ((x // 16) * (y // 16) * 7, (x // 32 + y // 32) * 83, (x ^ y)),
    ]
    return [np.stack([plane % 256 for plane in channels], axis=-1).astype(np.uint8) for channels in planes]


def canary_batch(reader: Reader, preprocessing: Preprocessing | DrawnVersion) -> torch.Tensor:
    """The synthetic inputs as the body gets them: through the reader of the view where that reads images or texts."""
    outputs = []
    for number, pixels in enumerate(synthetic_images()):
        if isinstance(reader, TextReader):
            turned = number * len(reader.alphabet) // INPUTS
            text = f"x{reader.alphabet[turned:]}{reader.alphabet[:turned]}"
            decoded = reader.decode(text.encode(), {})
        elif reader.name == "image":
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, format="PNG")
            decoded = reader.decode(buffer.getvalue(), {})
        else:
            repeats = -(-preprocessing.channels // 3)
            decoded = Decoded(np.ascontiguousarray(np.tile(pixels, repeats)[..., : preprocessing.channels]), 255.0)
        outputs.append(preprocessing.apply(decoded))
    return stack(outputs)


VERSION = 1  # of the synthetic inputs and of which values are kept
Song = dict[str, Any]


def sing(engine: Engine, reader: Reader, preprocessing: Preprocessing | DrawnVersion, names: list[str]) -> Song:
    """The canary: `{"version": 1, "taps": {name: INPUTS lists of up to KEPT values}}`, taken evenly over the features.

    What is not finite is None, since JSON has no word for it.
    """
    taps: dict[str, list[list[float | None]]] = {}
    for name, features in zip(names, engine(canary_batch(reader, preprocessing)), strict=True):
        flat = np.asarray(features, dtype=np.float64).reshape(INPUTS, -1)
        kept = np.linspace(0, flat.shape[1] - 1, min(KEPT, flat.shape[1])).round().astype(int)
        taps[name] = [[float(f"{value:.9g}") if np.isfinite(value) else None for value in row] for row in flat[:, kept]]
    return {"version": VERSION, "taps": taps}


def drift(now: Any, then: Any) -> float:
    """Centred relative distance of one tap's values, ||now - then|| / ||then - mean||; infinite where shapes differ."""
    new, old = np.array(now, dtype=np.float64), np.array(then, dtype=np.float64)  # None becomes NaN
    if new.shape != old.shape or not np.array_equal(np.isnan(new), np.isnan(old)):
        return float("inf")
    new, old = np.nan_to_num(new), np.nan_to_num(old)
    spread = float(np.linalg.norm(old - old.mean(axis=0))) or 1.0
    return float(np.linalg.norm(new - old)) / spread


def check_canary(
    now: Song, then: Mapping[str, Any] | None, precision: str, recorded: Mapping[str, Any], recipe: str
) -> None:
    """Refuse to append where this process computes other numbers than the one that made the recipe.

    Args:
        now: what this process sings.
        then: what the recipe keeps.
        precision: of the recipe, which says how much may differ.
        recorded: beside the recipe; its `versions` are told.
        recipe: its id.

    Raises:
        StoreError: drift beyond tolerance, naming the library versions that differ; or nothing to compare with.
    """
    if then is None or then.get("version") != VERSION:
        kept = "none" if then is None else f"one of version {then.get('version')}"
        raise StoreError(
            f"recipe {recipe}: whether this process computes the same features can't be told: it compares canaries of "
            f"version {VERSION}, and the recipe keeps {kept}. Nothing was added to it. Update featurecache, or use a "
            "new store."
        )
    for name, rows in then["taps"].items():
        found = drift(now["taps"].get(name, []), rows)
        if found <= TOLERANCE[precision]:
            continue
        changed = changed_versions(recorded)
        raise StoreError(
            f"recipe {recipe}: this process computes other features than the one that made it. Tap {name} drifts "
            f"by {found:.3g} (tolerance {TOLERANCE[precision]:g}). Nothing was added to it. Versions: "
            f"{'; '.join(changed) or 'the same, so the hardware or its kernels differ'}. Use the versions of then, "
            "another --precision, or a new store."
        )
