"""The image reader: JPEG through torchvision, PNG, WebP, TIFF, BMP and GIF through Pillow, with rules of our own.

Pixels are as stored: colour profiles and gamma are not applied. CMYK JPEGs are taken as inverted, as Adobe writes them
and every browser reads them. An image of several frames (GIF, APNG, WebP, TIFF) is refused unless a frame is chosen.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import BmpImagePlugin, GifImagePlugin, ImageFile, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from featurecache.data.readers.base import Decoded, FileReader, select
from featurecache.data.readers.decoders import jpeg, png16
from featurecache.data.readers.headers import Header, inspect, sniff
from featurecache.data.readers.orientation import exif_orientation, oriented, unoriented
from featurecache.data.readers.pixels import from_pillow, to_channels
from featurecache.errors import InputError, ReadError

# Opened by class rather than by Image.open, which would warn about large images before our own limit is asked.
_PLUGINS: dict[str, type[ImageFile.ImageFile]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
}
_COLOUR_TIFF = {2: "RGB", 5: "CMYK", 6: "YCbCr"}
# Only TIFF makes Pillow warn; filters are global to the process, so one thread at a time may change them.
_WARNINGS = threading.Lock()


@dataclass(frozen=True)
class ImageReader(FileReader):
    """Reads photographs and drawings.

    Attributes:
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        exif: whether EXIF orientation is applied.
        background: RGB that transparent pixels are composited onto (with 1 or 3 channels).
        max_pixels: larger images (width x height) are refused by their header, before anything is decoded; not part of
            the recipe.
    """

    name: ClassVar[str] = "image"
    version: ClassVar[int] = 1

    channels: int = 3
    exif: bool = True
    background: tuple[int, int, int] = (255, 255, 255)
    max_pixels: int = 100_000_000

    def __post_init__(self) -> None:
        """Refuse what can't be.

        Raises:
            InputError: channels, background or max_pixels out of range.
        """
        if self.channels not in (1, 3, 4):
            raise InputError(
                f"image reader: channels={self.channels}, but images have 1 (grey), 3 (RGB) or 4 (RGBA). "
                "For other counts use arrays (--reader array)."
            )
        object.__setattr__(self, "background", tuple(self.background))
        if len(self.background) != 3 or not all(isinstance(c, int) and 0 <= c <= 255 for c in self.background):
            raise InputError(f"image reader: background={self.background}, but three numbers from 0 to 255 are needed")
        if self.max_pixels < 1:
            raise InputError(f"image reader: max_pixels={self.max_pixels}, but at least 1 is needed")

    def parameters(self) -> dict[str, Any]:
        """Part of the recipe. RGBA keeps its alpha, so that there the background is left out."""
        shown = {"background": list(self.background)} if self.channels != 4 else {}
        return {"channels": self.channels, "exif": self.exif, **shown}

    def decode(self, payload: bytes, selector: Mapping[str, Any]) -> Decoded:
        """Decode one image.

        Returns:
            (height, width, channels) uint8 with limit 255; uint16 with limit 65535 (or 4095) for 16 (12) bit PNG and
            TIFF; float32 with limit 1.0 for float TIFF.

        Raises:
            ReadError: empty, not an image, truncated, damaged, too large, of several frames where none is chosen, or of
                a variety that is not read; says what was found.
        """
        kind = sniff(payload)
        frame = selector.get("frame")
        try:
            if kind == "TIFF":
                array, limit = self._tiff(payload, frame)
            else:
                header = inspect(payload, kind)
                self._check_size(kind, header.width, header.height)
                self._check_frame(kind, header.frames, frame)
                array, limit = jpeg(header, self.channels) if kind == "JPEG" else _decode(header, frame)
                if self.exif and header.exif:
                    array = oriented(array, exif_orientation(header.exif))
        except (ReadError, MemoryError):
            raise
        except Exception as error:  # decoders raise nearly anything; the payload is in memory, so it will fail again
            message = " ".join(str(error).split()) or type(error).__name__
            if "alloc" in message.lower() and isinstance(error, RuntimeError):
                raise MemoryError(message) from None
            raise ReadError(f"{kind} can't be decoded: {message}") from None
        array = to_channels(select(array, selector), limit, self.channels, self.background)
        return Decoded(np.ascontiguousarray(array), limit)

    def _check_size(self, kind: str, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            raise ReadError(
                f"{kind} of {width} x {height} pixels: {width * height:,} exceed the limit of {self.max_pixels:,}"
            )

    @staticmethod
    def _check_frame(kind: str, frames: int, frame: int | None) -> None:
        if frame is None and frames > 1:
            raise ReadError(f"{kind} with {frames} frames: choose one with --frame VIEW=COLUMN, or split the file")
        if frame is not None and not 0 <= frame < frames:
            raise ReadError(f"{kind} has no frame {frame}: it holds {frames}, counted from 0")

    def _tiff(self, payload: bytes, frame: int | None) -> tuple[np.ndarray, float]:
        with _WARNINGS, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            image = TiffImagePlugin.TiffImageFile(io.BytesIO(payload))
            self._check_size("TIFF", *image.size)
            self._check_frame("TIFF", image.n_frames, frame)
            image.seek(frame or 0)
            self._check_size("TIFF", *image.size)
            tags = image.tag_v2
            bits = tuple(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
            colours = _COLOUR_TIFF.get(tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 0))
            if colours and bits[0] > 8:
                raise ReadError(
                    f"TIFF with {bits[0]} bit {colours}: only grey TIFF is read with more than 8. Convert it to PNG."
                )
            for offsets, counts in ((273, 279), (324, 325)):
                ends = [int(a) + int(b) for a, b in zip(tags.get(offsets, ()), tags.get(counts, ()), strict=False)]
                if ends and max(ends) > len(payload):
                    raise ReadError(f"truncated TIFF: {len(payload):,} bytes, but its pixels lie up to {max(ends):,}")
            inverted = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
            orientation = int(tags.get(274, 1))
        for warning in caught:
            if "truncated" in str(warning.message).lower():
                raise ReadError(f"truncated TIFF: {' '.join(str(warning.message).split())}")
        image.load()  # turns it as its orientation says
        array, limit = from_pillow(image)
        if image.mode.startswith("I;16"):
            limit = 4095.0 if bits[0] == 12 else limit
            array = np.uint16(limit) - array if inverted else array
        return (array if self.exif or orientation not in range(2, 9) else unoriented(array, orientation)), limit


def _decode(header: Header, frame: int | None) -> tuple[np.ndarray, float]:
    if header.format == "PNG" and header.depth == 16:
        return png16(header)
    image = _PLUGINS[header.format](io.BytesIO(header.pixels))
    if image.size != (header.width, header.height):
        raise ReadError(f"damaged {header.format}: header and data disagree on its size")
    if frame is not None:
        image.seek(frame)
    image.load()
    return from_pillow(image)
