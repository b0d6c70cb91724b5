"""EXIF orientation: read from an EXIF block by a rule of our own, and applied to an array."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np

_TAG = 0x0112

# EXIF 2.32, 4.6.4: how the stored rows and columns become the picture as it was seen.
_APPLY: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda array: array,
    2: lambda array: array[:, ::-1],
    3: lambda array: array[::-1, ::-1],
    4: lambda array: array[::-1],
    5: lambda array: array.swapaxes(0, 1),
    6: lambda array: array[::-1].swapaxes(0, 1),
    7: lambda array: array[::-1, ::-1].swapaxes(0, 1),
    8: lambda array: array[:, ::-1].swapaxes(0, 1),
}
_INVERSE = {6: 8, 8: 6}


def exif_orientation(exif: bytes) -> int:
    """The orientation (1 to 8) that an EXIF block (a TIFF structure) gives; 1 where it gives none or is damaged."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", exif, entry)
            if tag == _TAG:
                return value if kind == 3 and value in _APPLY else 1
    except struct.error:
        return 1
    return 1


def oriented(array: np.ndarray, orientation: int) -> np.ndarray:
    """(height, width, channels) as EXIF orientation 1 to 8 wants it seen; a view, not a copy."""
    return _APPLY[orientation](array)


def unoriented(array: np.ndarray, orientation: int) -> np.ndarray:
    """Undo `oriented`."""
    return _APPLY[_INVERSE.get(orientation, orientation)](array)
