"""Pictures for the benchmarks: JPEGs of about 500 x 375 with the detail of photographs, the same on every machine."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIZES = ((500, 375), (375, 500), (500, 333), (480, 360), (500, 400))
DISTINCT = 192  # pictures; beyond that they come again with other bytes behind their end, so that each is content anew
ORIENTATION = 0x0112  # EXIF tag


def picture(seed: int) -> Image.Image:
    """Smooth noise in several octaves with shapes on it: about as hard to decode as a photograph."""
    rng = np.random.default_rng(seed)
    width, height = SIZES[seed % len(SIZES)]
    total = np.zeros((height, width, 3), np.float32)
    for cell, strength in ((128, 90), (32, 50), (8, 28), (2, 14), (1, 6)):
        noise = rng.integers(0, 256, (height // cell + 2, width // cell + 2, 3), dtype=np.uint8)
        layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        total += (np.asarray(layer, np.float32) - 128) * (strength / 64)
    image = Image.fromarray(np.clip(total + 128, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
        side, colour = int(rng.integers(20, 160)), tuple(int(c) for c in rng.integers(0, 256, 3))
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)((x, y, x + side, y + side * 2 // 3), fill=colour)
    return image


def jpeg(seed: int) -> bytes:
    """A picture as a JPEG: most 4:2:0, some 4:4:4, some turned by EXIF."""
    exif = Image.Exif()
    if seed % 8 == 3:
        exif[ORIENTATION] = 1 + seed // 8 % 8
    buffer = io.BytesIO()
    turned = {"exif": exif} if exif else {}
    picture(seed).save(buffer, "JPEG", quality=85 + seed % 3 * 5, subsampling=0 if seed % 5 == 4 else 2, **turned)
    return buffer.getvalue()


def write_jpegs(folder: Path, n: int) -> Path:
    """Write n JPEG files of different content in `folder`/images/all, and a manifest of them.

    Returns:
        The manifest, with the columns sample_id and image.
    """
    images = folder / "images" / "all"
    images.mkdir(parents=True)
    distinct = [jpeg(seed) for seed in range(min(n, DISTINCT))]
    manifest = folder / "images.csv"
    with manifest.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(("sample_id", "image"))
        for i in range(n):
            path = images / f"{i:06d}.jpg"
            path.write_bytes(distinct[i % DISTINCT] + (b"" if i < DISTINCT else i.to_bytes(8, "big")))
            writer.writerow((f"s{i:06d}", str(path.relative_to(folder))))
    return manifest
