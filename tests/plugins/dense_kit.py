"""What the tests of dense targets share: squares on noise with their masks, and taps of two depths of a tiny body."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from extract_kit import write_manifest
from PIL import Image

from featurecache.config import ExtractConfig
from featurecache.extract import extract

SIDE = 32
BODY = "plugin_joint:tiny"
TAPS = ("features.2:none", "features.7:none")


def square(seed: int, side: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """An image (side, side, 3) with a bright square, and where it is (side, side) bool."""
    random = np.random.default_rng(seed)
    image = random.integers(0, 90, (side, side, 3))
    size, (top, left) = int(random.integers(8, 16)), random.integers(0, side - 16, 2)
    inside = np.zeros((side, side), bool)
    inside[top : top + size, left : left + size] = True
    image[inside] += 150
    return image.astype(np.uint8), inside


def write_squares(folder: Path, n: int, *, inside: int = 255, first: int = 0, without: tuple[int, ...] = ()) -> Path:
    """`squares.csv` with n samples: image, mask, group (two samples each), site; some without a mask."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for number in range(n):
        image, where = square(first + number)
        name = f"q{first + number:03d}"
        Image.fromarray(image).save(folder / f"{name}.png")
        Image.fromarray((where * inside).astype(np.uint8)).save(folder / f"{name}-mask.png")
        mask = "" if number in without else f"{name}-mask.png"
        row = {"sample_id": name, "image": f"{name}.png", "mask": mask, "group": f"g{number // 2}"}
        rows.append({**row, "site": "ab"[number % 2], "label": number % 2})
    return write_manifest(folder / "squares.csv", rows)


def options(manifest: Path, **more: Any) -> dict[str, Any]:
    """Of stage one and of joint training."""
    return {"manifest": manifest, "views": {"image": "image"}, "body": BODY, "tap": list(TAPS), "device": "cpu",
            "workers": 1, "precision": "fp32", **more}  # fmt: skip


def store_squares(manifest: Path, store: Path) -> Path:
    extract(ExtractConfig.create(options(manifest, store=store, engine="torch")))
    return store
