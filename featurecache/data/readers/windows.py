"""How DICOM turns stored values into grey: modality LUT, rescaling, VOI LUT, window (PS3.3, C.11.1 and C.11.2)."""

from __future__ import annotations

from typing import Any

import numpy as np

from featurecache.errors import ReadError

FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")


def full_range(
    array: np.ndarray, bits: int, signed: bool, dataset: Any, modality: Any
) -> tuple[np.ndarray, float, float]:
    """Stored values in the units of the modality, with the least and largest value that they could have.

    Args:
        array: (height, width) integers or floats as stored.
        bits: stored of each.
        signed: whether they may be negative.
        dataset: may hold a modality LUT.
        modality: holds slope and intercept, where there are any.

    Returns:
        The values, integers where they stay whole by themselves, else float64; their range, (0, 0) if it is unknown.
    """
    if array.dtype.kind == "f":
        low = high = 0.0
    elif signed:
        low, high = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    else:
        low, high = 0.0, 2.0**bits - 1
    if dataset.get("ModalityLUTSequence"):
        table = dataset.ModalityLUTSequence[0]
        return look_up(array, table) * np.float64(_top(table)), 0.0, float(_top(table))
    slope, intercept = (float(value if (value := modality.get(name)) not in (None, "") else neutral)
                        for name, neutral in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0)))  # fmt: skip
    if not (np.isfinite(slope) and np.isfinite(intercept)) or slope == 0:
        raise ReadError(f"damaged DICOM: rescale slope {slope}, intercept {intercept}")
    if (slope, intercept) == (1.0, 0.0):
        return array, low, high
    ends = sorted((low * slope + intercept, high * slope + intercept))
    return array * np.float64(slope) + intercept, ends[0], ends[1]


def windowed(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """Values through a window: (height, width) float32 from 0 to 1.

    Args:
        values: in the units of the window.
        centre: the value in its middle.
        width: from black to white, at least 1 for LINEAR, else above 0.
        function: `LINEAR`, `LINEAR_EXACT` or `SIGMOID`.

    Raises:
        ReadError: a width that can't be, or another function.
    """
    if function not in FUNCTIONS:
        raise ReadError(f"DICOM with the VOI LUT function {function!r}: known are {', '.join(FUNCTIONS)}")
    if not np.isfinite(centre) or not np.isfinite(width) or width < (1 if function == "LINEAR" else np.nextafter(0, 1)):
        raise ReadError(f"damaged DICOM: window centre {centre}, width {width}")
    real = values.astype(np.float64)
    if function == "SIGMOID":
        with np.errstate(over="ignore"):
            return np.asarray(1 / (1 + np.exp(-4 * (real - centre) / width)), np.float32)
    if function == "LINEAR":
        if width == 1:  # a threshold: half open as the standard has it
            return np.asarray(real > centre - 0.5, np.float32)
        return np.asarray(((real - (centre - 0.5)) / (width - 1) + 0.5).clip(0, 1), np.float32)
    return np.asarray(((real - centre) / width + 0.5).clip(0, 1), np.float32)


def look_up(values: np.ndarray, table: Any) -> np.ndarray:
    """Values through a modality or VOI LUT: (height, width) float32 from 0 to 1, 1 for the most that its bits hold.

    Raises:
        ReadError: the table does not hold what its descriptor promises.
    """
    entries, first, bits = (int(number) for number in table.LUTDescriptor)
    entries = entries or 65536
    if first >= 32768 and values.min() < 0:  # written as unsigned although the pixels are signed
        first -= 65536
    data = table.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, "<u2" if len(data) >= 2 * entries else "u1")
    numbers = np.atleast_1d(np.asarray(data)).astype(np.int64) & 0xFFFF
    if not 1 <= bits <= 16 or len(numbers) < entries:
        raise ReadError(f"damaged DICOM: a LUT of {entries} entries of {bits} bits holds {len(numbers)}")
    index = np.clip(np.rint(values).astype(np.int64) - first, 0, entries - 1)
    return np.asarray((numbers[index] / _top(table)).clip(0, 1), np.float32)


def _top(table: Any) -> int:
    """The largest value of a LUT's bits."""
    return int(2 ** int(table.LUTDescriptor[2]) - 1)
