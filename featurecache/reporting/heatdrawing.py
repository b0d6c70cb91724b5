"""Heat maps and feature maps as pictures: all views of a sample side by side, in PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SIDE = 256  # pixels of a view's shorter panel side
GAP, LINE, SIZE = 12, 22, 15
FONT = Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")  # Pillow's own knows no more than English
INK, PAPER, FAINT = (22, 25, 29), (255, 255, 255), (110, 118, 128)
# Anchors of matplotlib's `inferno` (CC0), which rises in brightness all the way, also for the colour-blind.
INFERNO = np.array(
    [
        (0, 0, 4), (40, 11, 84), (101, 21, 110), (159, 42, 99),
        (212, 72, 66), (245, 125, 21), (250, 193, 39), (252, 255, 164),
    ]
)  # fmt: skip


def colours(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Numbers of 0..1 as (..., 3) colours."""
    at = np.clip(values, 0, 1) * (len(INFERNO) - 1)
    found = [np.interp(at, np.arange(len(INFERNO)), INFERNO[:, channel]) for channel in range(3)]
    return np.stack(found, axis=-1).astype(np.uint8)


def overlay(image: NDArray[np.uint8], heat: NDArray[np.floating]) -> NDArray[np.uint8]:
    """A heat map of 0..1 (height, width) over an image (height, width, 3), which stays visible where it is cool."""
    grey = image.astype(np.float32).mean(axis=2, keepdims=True).repeat(3, axis=2)
    share = 0.08 + 0.67 * np.sqrt(np.clip(heat, 0, 1))[..., None]
    mixed: NDArray[np.uint8] = np.rint(grey * (1 - share) + colours(heat) * share).astype(np.uint8)
    return mixed


def as_colour(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(channels, height, width) as (height, width, 3): one channel is grey, of many the first three count."""
    shown = image[:3] if len(image) >= 3 else image[:1].repeat(3, axis=0)
    return np.ascontiguousarray(shown.transpose(1, 2, 0))


def draw_sample(
    path: Path,
    images: Mapping[str, NDArray[np.uint8]],
    heats: Mapping[str, NDArray[np.floating]],
    *,
    title: str,
    subtitle: str,
) -> None:
    """One picture: a column per view, above the image as the network saw it, below it its heat map.

    Args:
        path: of the PNG.
        images: per view (channels, height, width).
        heats: per view (height, width) from 0 on; the hottest pixel of all views is 1 in the picture.
        title: the first line.
        subtitle: the second.
    """
    most = max((float(heat.max()) for heat in heats.values()), default=0.0) or 1.0
    panels = []
    for view, image in images.items():
        shown = as_colour(image)
        panels.append((view, [shown, overlay(shown, heats[view] / most)]))
    draw_panels(path, panels, title=title, subtitle=subtitle)


def draw_panels(
    path: Path,
    panels: Sequence[tuple[str, Sequence[NDArray[np.uint8]]]],
    *,
    title: str,
    subtitle: str = "",
    side: int = SIDE,
) -> None:
    """Columns of pictures with a name below each; all are scaled to one width."""
    columns = []
    for name, pictures in panels:
        scaled = []
        for picture in pictures:
            image = Image.fromarray(picture)
            kind = Image.Resampling.NEAREST if image.width * 3 <= side else Image.Resampling.BICUBIC
            scaled.append(image.resize((side, max(round(image.height * side / image.width), 1)), kind))
        columns.append((name, scaled))
    tall = max(sum(image.height + GAP for image in images) for _, images in columns)
    lines = [line for line in (title, subtitle) if line]
    font = ImageFont.truetype(FONT, SIZE)
    wide = max(len(columns) * (side + GAP) + GAP, 2 * GAP + round(max(font.getlength(line) for line in lines)))
    sheet = Image.new("RGB", (wide, GAP + LINE * len(lines) + tall + LINE), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        pen.text((GAP, GAP // 2 + LINE * number), line, INK if not number else FAINT, font)
    for place, (name, images) in enumerate(columns):
        x, y = GAP + place * (side + GAP), GAP + LINE * len(lines)
        for image in images:
            sheet.paste(image, (x, y))
            y += image.height + GAP
        pen.text((x, y - GAP // 2), name, FAINT, font)
    sheet.save(path, "PNG", optimize=True)


def grid(maps: NDArray[np.floating], across: int) -> NDArray[np.uint8]:
    """Maps (n, height, width) as one picture, each brought to its own 0..1, `across` in a row."""
    n, height, width = maps.shape
    down = -(-n // across)
    sheet = np.full((down * (height + 1) - 1, across * (width + 1) - 1, 3), 255, dtype=np.uint8)
    for number, one in enumerate(maps):
        low, high = float(one.min()), float(one.max())
        row, column = divmod(number, across)
        y, x = row * (height + 1), column * (width + 1)
        sheet[y : y + height, x : x + width] = colours((one - low) / (high - low if high > low else 1))
    return sheet
