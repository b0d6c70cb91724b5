"""The mask reader: inside, opaque, or class numbers; never a colour."""

from __future__ import annotations

import io

import numpy as np
import pytest
from image_files import encoded, refusal
from PIL import Image

from featurecache.data.readers import get_reader
from featurecache.data.readers.mask import MaskReader
from featurecache.errors import InputError


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def test_inside_is_any_colour_but_black():
    grey = png(np.array([[0, 1], [255, 0]], np.uint8))
    decoded = MaskReader().decode(grey, {})
    assert (decoded.array[:, :, 0].tolist(), decoded.array.dtype, decoded.limit) == (
        [[0, 255], [255, 0]],
        np.uint8,
        255,
    )
    colours = np.zeros((1, 3, 4), np.uint8)
    colours[0] = [(9, 0, 0, 255), (0, 0, 0, 255), (9, 9, 9, 0)]
    assert MaskReader(channels=3).decode(png(colours), {}).array.tolist() == [[[255] * 3, [0] * 3, [0] * 3]]


def test_alpha_and_class_numbers():
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = (0, 127, 128)
    assert MaskReader(values="alpha").decode(png(pixels), {}).array[0, :, 0].tolist() == [0, 0, 255]
    decoded = MaskReader(values="index").decode(png(np.array([[0, 3, 7]], np.uint8)), {"flip": True})
    assert (decoded.array[0, :, 0].tolist(), decoded.array.dtype, decoded.limit) == ([7, 3, 0], np.uint16, 1.0)


def test_what_is_refused():
    assert refusal(encoded(Image.new("L", (4, 4)), "JPEG"), MaskReader()).startswith("a JPEG is no mask")
    colours = png(np.array([[[1, 2, 3]]], np.uint8))
    assert "grey values should be class numbers" in refusal(colours, MaskReader(values="index"))
    assert "exceed the limit of 3" in refusal(png(np.zeros((2, 2), np.uint8)), MaskReader(max_pixels=3))
    assert refusal(b"", MaskReader()).startswith("0 bytes")


def test_parameters():
    reader = get_reader("mask", channels=3, values="alpha")
    assert get_reader("mask", **reader.parameters()) == reader
    assert reader.identity() == "mask/1 max_pixels=100000000"
    with pytest.raises(InputError, match="values='colour', but one of inside, alpha, index"):
        get_reader("mask", values="colour")
    with pytest.raises(InputError, match="channels=0, but at least 1"):
        get_reader("mask", channels=0)
