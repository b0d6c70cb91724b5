"""Decoders of JPEG and 16 bit PNG: torchvision's operators where they are, for JPEG else Pillow with the same pixels.

The operators are called as such: since torchvision 0.29 the functions around them (`torchvision.io.decode_jpeg`) warn
that decoding will move to TorchCodec. A JPEG's pixels are those of libjpeg-turbo with its accurate integer DCT and
fancy upsampling, which both torchvision and Pillow hand through.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import torch
from PIL import JpegImagePlugin

from featurecache.data.readers.headers import Header
from featurecache.data.readers.pixels import from_pillow
from featurecache.errors import ReadError

with contextlib.suppress(ImportError):
    from featurecache.machine.lean import torchvision  # noqa: F401  registers the operators

_UNCHANGED, _GREY, _RGB = 0, 1, 3  # torchvision's ImageReadMode


def _operator(name: str) -> Any:
    """An operator of torchvision's image extension, None where this build has none."""
    return getattr(torch.ops.image, name, None)


def _bytes(payload: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8)  # a copy: torch warns of read-only buffers


def jpeg(header: Header, channels: int) -> tuple[np.ndarray, float]:
    """(height, width, 1 or 3) uint8 without EXIF orientation applied; grey where one channel is wanted, else RGB."""
    decode = _operator("decode_jpeg")
    if decode is None:
        image = JpegImagePlugin.JpegImageFile(io.BytesIO(header.pixels))
        if channels == 1:
            image.draft("L", image.size)  # the luma that the file holds, as the operator gives it
        image.load()
        return from_pillow(image)
    pixels = decode(_bytes(header.pixels), _GREY if channels == 1 else _RGB, False)
    array: np.ndarray = pixels.permute(1, 2, 0).numpy()
    return array, 255.0


def png16(header: Header) -> tuple[np.ndarray, float]:
    """(height, width, 1 to 4) uint16 of a 16 bit PNG of any colour type; Pillow would drop the low bits of colour."""
    decode = _operator("decode_png")
    if decode is None:
        raise ReadError("16 bit PNG needs a torchvision with its image extension", deterministic=False)
    pixels = decode(_bytes(header.pixels), _UNCHANGED, False)
    array: np.ndarray = pixels.permute(1, 2, 0).numpy().astype(np.uint16)
    if header.transparent:  # a colour key, which this decoder ignores
        key = np.frombuffer(header.transparent, dtype=">u2")
        alpha = np.where((array == key).all(axis=2, keepdims=True), 0, 65535).astype(np.uint16)
        array = np.concatenate([array, alpha], axis=2)
    return array, 65535.0
