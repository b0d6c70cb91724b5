"""Image files for tests: made in memory, also of kinds that Pillow can't write, and what a reader makes of them."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

from featurecache.data.readers import ReadFailure, read
from featurecache.data.readers.base import Reader
from featurecache.data.readers.image import ImageReader

RGB = ImageReader()


def photo(width: int = 37, height: int = 23, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise: no symmetry, survives JPEG."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    array = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray(np.clip(array + rng.normal(0, 4, array.shape), 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(payload: bytes, reader: Reader = RGB, **selector) -> np.ndarray:
    decoded = reader.decode(payload, selector)
    assert decoded.array.flags.c_contiguous
    assert decoded.array.ndim == 3
    return decoded.array


def refusal(payload: bytes, reader: Reader = RGB, **selector) -> str:
    failure = read(reader, payload, selector)
    assert isinstance(failure, ReadFailure)
    assert failure.kind == "ReadError"
    assert failure.deterministic
    return failure.message


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG of raw scan lines (without their filter bytes), for what Pillow can't write."""
    per_row = len(rows) // height
    lines = b"".join(b"\0" + rows[i * per_row : (i + 1) * per_row] for i in range(height))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
