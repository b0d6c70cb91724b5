"""From what a decoder hands over to the channels that were asked for: palettes, alpha, grey, 8 and 16 bit."""

from __future__ import annotations

import numpy as np
from PIL import Image

from featurecache.errors import ReadError

# Pillow modes that become another one first, exactly and without loss.
_CONVERT = {
    "1": "L",
    "PA": "RGBA",
    "La": "LA",
    "RGBa": "RGBA",
    "RGBX": "RGB",
    "CMYK": "RGB",
    "YCbCr": "RGB",
    "HSV": "RGB",
}
_SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")
# ITU-R BT.601 luma in 16 fractional bits, as libjpeg and Pillow round it; the weights add up to 65536.
_LUMA = np.array([19595, 38470, 7471], dtype=np.uint32)


def from_pillow(image: Image.Image) -> tuple[np.ndarray, float]:
    """A loaded Pillow image as (height, width, 1 to 4 channels) and the value that stands for 1.0.

    2 and 4 channels end in alpha. Palettes are looked up and colour keys become alpha; 16 bit grey stays 16 bit.

    Raises:
        ReadError: a mode that has no pixel values with a known range.
    """
    mode = image.mode
    if mode in _SIXTEEN:
        return np.asarray(image).astype(np.uint16)[:, :, None], 65535.0
    if mode == "F":
        array = np.array(image, dtype=np.float32)[:, :, None]
        if not np.isfinite(array).all():
            raise ReadError("the image holds NaN or infinite values")
        return array, 1.0
    if mode in ("P", "1", "L", "RGB") and "transparency" in image.info:
        image = image.convert("RGBA")
    elif mode == "P":
        image = image.convert("RGB")
    elif mode in _CONVERT:
        image = image.convert(_CONVERT[mode])
    elif mode not in ("L", "LA", "RGB", "RGBA"):
        raise ReadError(f"pixels of kind {mode!r} have no known value range: only 8 and 16 bit and float are read")
    array = np.array(image)
    return (array[:, :, None] if array.ndim == 2 else array), 255.0


def to_channels(array: np.ndarray, limit: float, channels: int, background: tuple[int, int, int]) -> np.ndarray:
    """(height, width, 1 to 4) as 1 (grey), 3 (RGB) or 4 (RGBA) channels of the same type.

    Alpha is composited onto the background, rounding to nearest, unless it was asked for. Grey is repeated for RGB; RGB
    becomes grey as luma.

    Args:
        array: grey, grey and alpha, RGB or RGBA; uint8, uint16 or float32.
        limit: the value that stands for 1.0.
        channels: 1, 3 or 4.
        background: RGB, 0 to 255.
    """
    found = array.shape[2]
    if channels == 4:
        if found in (1, 2):
            array = np.concatenate([np.repeat(array[:, :, :1], 3, axis=2), array[:, :, 1:]], axis=2)
        if array.shape[2] == 3:
            opaque = np.full((*array.shape[:2], 1), limit, dtype=array.dtype)
            array = np.concatenate([array, opaque], axis=2)
        return array
    if found in (2, 4):
        array = _composite(array, limit, background)
    if array.shape[2] == channels:
        return array
    return np.repeat(array, 3, axis=2) if channels == 3 else _luma(array)


def _composite(array: np.ndarray, limit: float, background: tuple[int, int, int]) -> np.ndarray:
    """Alpha composited onto the background: grey stays grey if the background is grey."""
    colour, alpha = array[:, :, :-1], array[:, :, -1:]
    if (alpha == array.dtype.type(limit)).all():
        return np.ascontiguousarray(colour)
    if colour.shape[2] == 1 and len(set(background)) > 1:
        colour = np.repeat(colour, 3, axis=2)
    behind = np.array(background[: colour.shape[2]])
    if array.dtype == np.float32:
        mixed: np.ndarray = colour * alpha + (behind / 255).astype(np.float32) * (1 - alpha)
        return mixed
    # Exact: round((c * a + b * (top - a)) / top), in integers.
    top = np.uint32(limit)
    shade = (behind * int(limit) // 255).astype(np.uint32)
    wide = alpha.astype(np.uint32)
    total = colour * wide + shade * (top - wide) + top // np.uint32(2)
    return (total // top).astype(array.dtype)


def _luma(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.float32:
        grey: np.ndarray = array @ (_LUMA.astype(np.float32) / np.float32(65536))[:, None]
        return grey
    total = array.astype(np.uint32) @ _LUMA[:, None]  # at most 65535 * 65536, which fits with the rounding term
    return ((total + np.uint32(32768)) >> np.uint32(16)).astype(array.dtype)
