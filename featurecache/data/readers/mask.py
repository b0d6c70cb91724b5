"""The mask reader: which class each pixel of a mask image belongs to, never a colour and never a mixture of two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from featurecache.data.readers.base import Decoded, FileReader
from featurecache.data.readers.image import ImageReader
from featurecache.errors import InputError, ReadError

VALUES = ("inside", "alpha", "index")


@dataclass(frozen=True)
class MaskReader(FileReader):
    """Reads PNG, TIFF, BMP and GIF masks.

    Attributes:
        channels: how often the mask is repeated, for a body that takes so many.
        values: `inside`: any colour but black is inside; `alpha`: what is more than half opaque is inside; `index`: the
            grey value is the number of the class.
        max_pixels: larger masks are refused by their header; not part of the recipe.
    """

    name: ClassVar[str] = "mask"
    version: ClassVar[int] = 1

    channels: int = 1
    values: str = "inside"
    max_pixels: int = 100_000_000

    def __post_init__(self) -> None:
        """Refuse what can't be.

        Raises:
            InputError: unknown `values`, or channels or max_pixels below 1.
        """
        if self.values not in VALUES:
            raise InputError(f"mask reader: values={self.values!r}, but one of {', '.join(VALUES)} is needed")
        for name in ("channels", "max_pixels"):
            if getattr(self, name) < 1:
                raise InputError(f"mask reader: {name}={getattr(self, name)}, but at least 1 is needed")

    def parameters(self) -> dict[str, Any]:
        """Part of the recipe."""
        return {"channels": self.channels, "values": self.values}

    def decode(self, payload: bytes, selector: Mapping[str, Any]) -> Decoded:
        """Decode one mask.

        Returns:
            (height, width, channels): uint8 0 and 255 with limit 255 for `inside` and `alpha`, so that 1.0 is inside;
            uint16 class numbers with limit 1.0 for `index`, which stay what they are.

        Raises:
            ReadError: as the image reader; a JPEG, whose edges are mixtures; colours where class numbers are expected.
        """
        if payload.startswith(b"\xff\xd8"):
            raise ReadError("a JPEG is no mask: compression mixes the classes along their edges. Save it as PNG.")
        # Without EXIF, since a mask must lie on its image as stored; on black, where transparent is outside.
        reader = ImageReader(channels=4, exif=False, max_pixels=self.max_pixels)
        image = reader.decode(payload, selector)
        colour, alpha = image.array[:, :, :3], image.array[:, :, 3:]
        if self.values == "index":
            if (colour != colour[:, :, :1]).any():
                raise ReadError("the mask has colours, but its grey values should be class numbers (values=index)")
            array = np.asarray(colour[:, :, :1], np.uint16)
            return Decoded(np.repeat(array, self.channels, axis=2), 1.0)
        opaque = alpha > image.limit / 2
        inside = opaque if self.values == "alpha" else opaque & (colour > 0).any(axis=2, keepdims=True)
        return Decoded(np.repeat(inside.astype(np.uint8) * np.uint8(255), self.channels, axis=2), 255.0)
