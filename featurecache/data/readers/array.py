"""The array reader: `.npy` files of (height, width) or (height, width, channels), never a pickle."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from featurecache.data.readers.base import Decoded, FileReader, select
from featurecache.errors import InputError, ReadError

MAGIC = b"\x93NUMPY"


@dataclass(frozen=True)
class ArrayReader(FileReader):
    """Reads uint8, uint16 and float arrays from `.npy`.

    Attributes:
        channels: channels that come out; an array of one channel is repeated for 3, any other difference is refused.
        max_pixels: larger arrays (height x width) are refused before their data are touched; not part of the recipe.
    """

    name: ClassVar[str] = "array"
    version: ClassVar[int] = 1

    channels: int = 3
    max_pixels: int = 100_000_000

    def __post_init__(self) -> None:
        """Refuse what can't be.

        Raises:
            InputError: channels or max_pixels below 1.
        """
        if self.channels < 1:
            raise InputError(f"array reader: channels={self.channels}, but at least 1 is needed")
        if self.max_pixels < 1:
            raise InputError(f"array reader: max_pixels={self.max_pixels}, but at least 1 is needed")

    def parameters(self) -> dict[str, Any]:
        """Part of the recipe."""
        return {"channels": self.channels}

    def decode(self, payload: bytes, selector: Mapping[str, Any]) -> Decoded:
        """Read one array.

        uint8 and uint16 keep their type (limit 255 and 65535), floats become float32 and count 1.0 as white.

        Raises:
            ReadError: not an array file, truncated, of another type or shape, or not finite.
        """
        if not payload:
            raise ReadError("0 bytes: the file is empty")
        if not payload.startswith(MAGIC):
            raise ReadError("not a .npy file: it does not start with the NumPy magic bytes")
        if selector.get("frame") is not None:
            raise ReadError("an array file has no frames to choose from")
        array = self._load(payload)
        if array.ndim == 2:
            array = array[:, :, None]
        if array.shape[2] == 1 and self.channels == 3:
            array = np.repeat(array, 3, axis=2)
        if array.shape[2] != self.channels:
            found = " x ".join(str(length) for length in array.shape)
            turned = array.shape[0] == self.channels
            hint = "; it looks like (channels, height, width): transpose it to (height, width, channels)"
            raise ReadError(
                f"array of {found} has {array.shape[2]} channels where {self.channels} are expected"
                + (hint if turned else "")
            )
        return self._finish(select(array, selector))

    def _load(self, payload: bytes) -> np.ndarray:
        stream = io.BytesIO(payload)
        try:
            version = np.lib.format.read_magic(stream)
            header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, fortran, dtype = header[version](stream)
        except Exception as error:  # a damaged header is parsed as Python literals, which fails in many ways
            raise ReadError(f"the header of the .npy file can't be read: {' '.join(str(error).split())}") from None
        if dtype.hasobject:
            raise ReadError("the .npy file holds Python objects (a pickle), which are never loaded")
        if dtype.kind not in "uf" or (dtype.kind == "u" and dtype.itemsize > 2):
            raise ReadError(f"array of {dtype}: accepted are uint8, uint16 and floats")
        if len(shape) not in (2, 3) or min(shape) < 1:
            found = " x ".join(str(length) for length in shape) or "no dimensions"
            raise ReadError(f"array of {found}: accepted are (height, width) and (height, width, channels)")
        if shape[0] * shape[1] > self.max_pixels:
            raise ReadError(f"{shape[1]} x {shape[0]} pixels exceed the limit of {self.max_pixels:,}")
        start = stream.tell()
        count = math.prod(shape)
        if len(payload) - start < count * dtype.itemsize:
            raise ReadError(
                f"truncated: {len(payload) - start:,} bytes of data where its header promises "
                f"{count * dtype.itemsize:,}"
            )
        flat = np.frombuffer(payload, dtype=dtype, count=count, offset=start)
        array: np.ndarray = flat.reshape(shape[::-1]).transpose() if fortran else flat.reshape(shape)
        return array

    @staticmethod
    def _finish(array: np.ndarray) -> Decoded:
        if array.dtype.kind == "u":
            array = array.astype(array.dtype.newbyteorder("="))  # a copy: frombuffer is read-only
            return Decoded(array, 255.0 if array.dtype.itemsize == 1 else 65535.0)
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise ReadError("the array holds NaN or infinite values")
        return Decoded(array, 1.0)
