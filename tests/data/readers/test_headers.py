"""What is refused before or while decoding: each file with one clear reason, and nothing printed."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from image_files import RGB, chunk, encoded, photo, pixels, refusal
from PIL import Image

from featurecache.data.readers import Decoded, read
from featurecache.data.readers.image import ImageReader


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "0 bytes: the file is empty"),
        (
            b"hello, this is a text",
            "not an image that can be read: found text that begins with 'hello, this is a text'",
        ),
        (b"\0" * 500, "not an image that can be read: found 500 bytes that begin with zeros"),
        (b"%PDF-1.7 ...", "not an image that can be read: found a PDF"),
        (b"\0" * 128 + b"DICM" + b"\0" * 9, "not an image that can be read: found a DICOM file"),
        (b"\x93NUMPY\x01\0", "not an image that can be read: found a NumPy array (use --reader array)"),
        (b"\x01\x02\xfe\xff", "not an image that can be read: found bytes that begin with 01 02 fe ff"),
        (b"\xff\xd8\xff", "truncated JPEG: it ends after 3 bytes, within its header"),
        (b"\xff\xd8\xff\xd9", "JPEG without image data"),
        (b"\x89PNG\r\n\x1a\n", "truncated PNG: no IEND chunk in its 8 bytes"),
        (b"GIF89a", "truncated GIF: it ends after 6 bytes, within its header"),
    ],
)
def test_what_is_no_image_is_named(payload, message):
    assert refusal(payload) == message


CASES = [
    ("JPEG", {}, "RGB"),
    ("JPEG", {"progressive": True}, "RGB"),
    ("PNG", {}, "RGB"),
    ("PNG", {}, "I;16"),
    ("GIF", {}, "P"),
    ("WEBP", {}, "RGB"),
    ("WEBP", {"lossless": True}, "RGBA"),
    ("BMP", {}, "RGB"),
    ("TIFF", {}, "RGB"),
    ("TIFF", {"compression": "tiff_lzw"}, "RGB"),
    ("TIFF", {"compression": "jpeg"}, "RGB"),
]


@pytest.mark.parametrize(("kind", "options", "mode"), CASES)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.99])
def test_truncated_files_are_refused(kind, options, mode, share, capfd):
    image = photo(160, 120)
    image = (
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        if mode == "I;16"
        else image.convert(mode)
    )
    payload = encoded(image, kind, **options)
    assert isinstance(read(RGB, payload, {}), Decoded)
    length = int(len(payload) * share)
    assert kind in refusal(payload[:length])
    if kind != "TIFF":  # whose last byte may say nothing
        assert kind in refusal(payload[:-1])
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_jpeg_without_its_end_is_refused_and_bytes_behind_it_are_not():
    payload = encoded(photo(), "JPEG")
    assert refusal(payload[:-2]) == f"truncated JPEG: no end-of-image marker in its {len(payload) - 2:,} bytes"
    assert refusal(payload[: len(payload) // 2] + b"\0" * 5000).startswith("truncated JPEG")
    assert np.array_equal(pixels(payload + b"\0" * 100), pixels(payload))


def test_thumbnail_does_not_hide_truncation():
    thumbnail = encoded(photo(8, 8), "JPEG")
    payload = encoded(photo(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" + thumbnail)
    assert pixels(payload).shape == (23, 37, 3)
    assert refusal(payload[:-2]).startswith("truncated JPEG: no end-of-image marker")


def test_every_damaged_byte_of_a_png_is_found():
    payload = encoded(photo(), "PNG")
    rng = np.random.default_rng(0)
    for position in rng.integers(8, len(payload), 60):
        damaged = bytearray(payload)
        damaged[position] ^= 1 << rng.integers(0, 8)
        assert refusal(bytes(damaged))


@pytest.mark.parametrize(("marker", "name"), [(0xC3, "lossless"), (0xC9, "arithmetic-coded"), (0xC5, "hierarchical")])
def test_rare_kinds_of_jpeg_are_refused_by_name(marker, name):
    payload = encoded(photo(), "JPEG").replace(b"\xff\xc0", bytes([0xFF, marker]), 1)
    assert refusal(payload) == f"{name} JPEG: only baseline, extended and progressive ones are read"
    twelve = bytearray(encoded(photo(), "JPEG"))
    twelve[twelve.find(b"\xff\xc0") + 4] = 12
    assert refusal(bytes(twelve)) == "JPEG of 12 bits per channel: only 8 are read"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_large_images_are_refused_by_their_header(kind):
    image = photo().quantize(16) if kind == "GIF" else photo()
    message = refusal(encoded(image, kind), ImageReader(max_pixels=850))
    assert message == f"{kind} of 37 x 23 pixels: 851 exceed the limit of 850"
    assert isinstance(read(ImageReader(max_pixels=851), encoded(image, kind), {}), Decoded)


def test_bomb_is_refused_without_being_decoded_and_without_a_warning():
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )
    assert refusal(bomb) == "PNG of 30000 x 30000 pixels: 900,000,000 exceed the limit of 100,000,000"


def test_colour_tiff_of_sixteen_bit_is_refused_rather_than_cut():
    payload = bytearray(encoded(photo(4, 3), "TIFF"))
    at = payload.find(struct.pack("<HHI", 258, 3, 3))
    offset = struct.unpack_from("<I", payload, at + 8)[0]
    payload[offset : offset + 6] = struct.pack("<HHH", 16, 16, 16)
    assert (
        refusal(bytes(payload)) == "TIFF with 16 bit RGB: only grey TIFF is read with more than 8. Convert it to PNG."
    )


def test_warnings_of_tiff_neither_print_nor_raise(capfd):
    payload = bytearray(encoded(photo(), "TIFF"))
    at = payload.find(struct.pack("<HHI", 284, 3, 1))
    payload[at + 4] = 2  # two planar configurations where there must be one: Pillow warns
    with pytest.warns(UserWarning, match="Metadata Warning"):
        Image.open(io.BytesIO(bytes(payload))).load()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = read(RGB, bytes(payload), {})
    assert isinstance(result, Decoded)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("kind", "options", "mode"), CASES)
def test_damaged_files_never_raise(kind, options, mode, capfd):
    image = photo(40, 30)
    grey = np.asarray(image.convert("L"))
    payload = encoded(
        Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode), kind, **options
    )
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(80):
            damaged = bytearray(payload)
            for position in rng.integers(0, min(len(payload), 400), 2):
                damaged[position] = rng.integers(0, 256)
            result = read(RGB, bytes(damaged), {})
            assert isinstance(result, Decoded) or (result.kind == "ReadError" and result.deterministic), result
    if kind != "JPEG" and "compression" not in options:  # libjpeg and libtiff write to stderr beneath Python
        captured = capfd.readouterr()
        assert (captured.out, captured.err) == ("", "")
