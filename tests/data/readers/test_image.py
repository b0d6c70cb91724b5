"""The image reader: right pixels for every format, bit depth, orientation and part of an image."""

from __future__ import annotations

import io

import numpy as np
import pytest
from image_files import RGB, chunk, encoded, photo, pixels, png, refusal
from PIL import Image, ImageOps

from featurecache.data.readers import ReadFailure, decoders, read
from featurecache.data.readers.image import ImageReader


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_deflate"}),
    ],
)
def test_lossless_formats_give_the_pixels_that_were_stored(kind, options):
    image = photo()
    assert np.array_equal(pixels(encoded(image, kind, **options)), np.asarray(image))


@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"progressive": True},
        {"optimize": True, "restart_marker_rows": 1},
    ],
)
def test_jpeg_gives_the_pixels_of_libjpeg(options):
    payload = encoded(photo(), "JPEG", quality=90, **options)
    assert np.array_equal(pixels(payload), np.asarray(Image.open(io.BytesIO(payload)).convert("RGB")))


def test_without_torchvisions_decoder_pillow_gives_the_same_pixels(monkeypatch):
    payloads = [
        encoded(photo(), "JPEG", quality=90),
        encoded(photo(50, 31), "JPEG", progressive=True, subsampling=1),
        encoded(photo().convert("L"), "JPEG"),
        encoded(photo().convert("CMYK"), "JPEG"),
    ]
    readers = [RGB, ImageReader(channels=1)]
    before = [pixels(payload, reader) for payload in payloads for reader in readers]
    deep = png(4, 3, 16, 2, bytes(72))
    assert RGB.decode(deep, {}).limit == 65535.0
    monkeypatch.setattr(decoders, "_operator", lambda name: None)
    after = [pixels(payload, reader) for payload in payloads for reader in readers]
    for one, other in zip(before[:-1], after[:-1], strict=True):
        assert np.array_equal(one, other)
    failure = read(RGB, deep, {})
    assert failure == ReadFailure("ReadError", "16 bit PNG needs a torchvision with its image extension", False)


def test_grey_jpeg_is_repeated_and_colour_becomes_luma():
    grey = encoded(photo().convert("L"), "JPEG")
    reference = np.asarray(Image.open(io.BytesIO(grey)))
    assert np.array_equal(pixels(grey), np.repeat(reference[:, :, None], 3, axis=2))
    assert np.array_equal(pixels(grey, ImageReader(channels=1))[:, :, 0], reference)
    colour = encoded(photo(), "JPEG", quality=95)
    luma = np.asarray(Image.open(io.BytesIO(colour)).convert("L")).astype(int)
    assert np.abs(pixels(colour, ImageReader(channels=1))[:, :, 0] - luma).max() <= 1
    assert pixels(colour, ImageReader(channels=4)).shape == (23, 37, 4)
    assert (pixels(colour, ImageReader(channels=4))[:, :, 3] == 255).all()


def test_cmyk_jpeg_is_inverted_as_adobe_writes_it():
    image = photo().convert("CMYK")
    payload = encoded(image, "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in payload
    wanted = np.asarray(Image.open(io.BytesIO(payload)).convert("RGB")).astype(int)
    assert np.abs(pixels(payload) - wanted).max() <= 1
    assert np.abs(wanted - np.asarray(photo())).mean() < 6  # it is the picture, not its negative


def test_palette_bitmap_and_grey_png():
    image = photo()
    palette = image.quantize(16)
    assert np.array_equal(pixels(encoded(palette, "PNG")), np.asarray(palette.convert("RGB")))
    bitmap = image.convert("1")
    assert np.array_equal(pixels(encoded(bitmap, "PNG"))[:, :, 0], np.asarray(bitmap.convert("L")))
    grey = image.convert("L")
    assert np.array_equal(pixels(encoded(grey, "PNG"), ImageReader(channels=1))[:, :, 0], np.asarray(grey))
    assert np.array_equal(
        pixels(encoded(image, "PNG"), ImageReader(channels=1))[:, :, 0], np.asarray(image.convert("L"))
    )


def test_transparency_is_composited_onto_the_background():
    array = np.dstack([np.asarray(photo()), np.tile(np.arange(37, dtype=np.uint8) * 7, (23, 1))])
    payload = encoded(Image.fromarray(array), "PNG")
    colour, alpha = array[:, :, :3].astype(float), array[:, :, 3:].astype(float) / 255
    assert np.abs(pixels(payload) - (colour * alpha + 255 * (1 - alpha))).max() <= 0.5 + 1e-9
    black = ImageReader(background=(0, 0, 0))
    assert np.abs(pixels(payload, black) - colour * alpha).max() <= 0.5 + 1e-9
    assert np.array_equal(pixels(payload, ImageReader(channels=4)), array)
    green = ImageReader(background=(0, 255, 0))
    assert pixels(payload, green)[0, 0].tolist() == [0, 255, 0]  # hidden colours of transparent pixels don't show


def test_transparent_palette_and_colour_key():
    palette = photo().quantize(8)
    index = int(np.asarray(palette)[0, 0])
    shown = pixels(encoded(palette, "PNG", transparency=index))
    assert shown[0, 0].tolist() == [255, 255, 255]
    keep = np.asarray(palette) != index
    assert np.array_equal(shown[keep], np.asarray(palette.convert("RGB"))[keep])
    gif = pixels(encoded(palette, "GIF", transparency=index))
    assert gif[0, 0].tolist() == [255, 255, 255]
    grey = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    assert pixels(encoded(grey, "PNG", transparency=5))[:, :, 0].tolist() == [
        [0, 1, 2, 3],
        [4, 255, 6, 7],
        [8, 9, 10, 11],
    ]


def test_grey_and_alpha():
    array = np.zeros((2, 2, 2), np.uint8)
    array[..., 0], array[0, :, 1] = 100, 255
    payload = encoded(Image.merge("LA", [Image.fromarray(array[..., i]) for i in (0, 1)]), "PNG")
    assert pixels(payload)[:, :, 0].tolist() == [[100, 100], [255, 255]]
    assert pixels(payload, ImageReader(channels=1)).tolist() == [[[100], [100]], [[255], [255]]]
    assert pixels(payload, ImageReader(channels=4))[1, 0].tolist() == [100, 100, 100, 0]


def test_sixteen_bit_is_kept():
    grey = np.arange(0, 60000, 5000, dtype=np.uint16).reshape(3, 4)
    for payload in (encoded(Image.fromarray(grey), "PNG"), encoded(Image.fromarray(grey), "TIFF")):
        decoded = ImageReader(channels=1).decode(payload, {})
        assert decoded.limit == 65535.0
        assert decoded.array.dtype == np.uint16
        assert np.array_equal(decoded.array[:, :, 0], grey)
        assert RGB.decode(payload, {}).array.shape == (3, 4, 3)


def test_sixteen_bit_colour_alpha_and_colour_key():
    rng = np.random.default_rng(1)
    colour = rng.integers(0, 65536, (3, 4, 3), dtype=np.uint16)
    decoded = RGB.decode(png(4, 3, 16, 2, colour.astype(">u2").tobytes()), {})
    assert (decoded.limit, decoded.array.dtype) == (65535.0, np.uint16)
    assert np.array_equal(decoded.array, colour)
    alpha = np.dstack([colour, np.full((3, 4), 32768, np.uint16)])
    mixed = pixels(png(4, 3, 16, 6, alpha.astype(">u2").tobytes()))
    share = 32768 / 65535
    assert np.abs(mixed - (colour * share + 65535 * (1 - share))).max() <= 0.5 + 1e-6
    key = chunk(b"tRNS", colour[1, 2].astype(">u2").tobytes())
    keyed = pixels(png(4, 3, 16, 2, colour.astype(">u2").tobytes(), key))
    assert keyed[1, 2].tolist() == [65535] * 3
    assert np.array_equal(np.delete(keyed.reshape(-1, 3), 6, axis=0), np.delete(colour.reshape(-1, 3), 6, axis=0))
    grey_alpha = np.dstack([colour[:, :, 0], np.full((3, 4), 65535, np.uint16)])
    assert np.array_equal(pixels(png(4, 3, 16, 4, grey_alpha.astype(">u2").tobytes()))[:, :, 2], colour[:, :, 0])


def test_luma_of_sixteen_bit_does_not_overflow():
    white = np.full((2, 2, 3), 65535, np.uint16)
    payload = png(2, 2, 16, 2, white.astype(">u2").tobytes())
    assert (pixels(payload, ImageReader(channels=1)) == 65535).all()


def test_tiff_of_inverted_grey_and_float():
    grey = np.arange(12, dtype=np.uint16).reshape(3, 4) * 1000
    inverted = encoded(Image.fromarray(grey), "TIFF", tiffinfo={262: 0})
    assert np.array_equal(pixels(inverted, ImageReader(channels=1))[:, :, 0], 65535 - grey)
    real = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    decoded = ImageReader(channels=1).decode(encoded(Image.fromarray(real), "TIFF"), {})
    assert (decoded.limit, decoded.array.dtype) == (1.0, np.float32)
    assert np.array_equal(decoded.array[:, :, 0], real)
    holes = real.copy()
    holes[0, 0] = np.nan
    assert refusal(encoded(Image.fromarray(holes), "TIFF")) == "the image holds NaN or infinite values"
    whole = Image.fromarray(np.arange(12, dtype=np.int32).reshape(3, 4))
    assert "pixels of kind 'I' have no known value range" in refusal(encoded(whole, "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_in_every_format(kind, orientation):
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    exif = Image.Exif()
    exif[0x0112] = orientation
    payload = encoded(photo(), kind, exif=exif, **options)
    stored = np.asarray(Image.open(io.BytesIO(encoded(photo(), kind, **options))).convert("RGB"))
    seen = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(payload))).convert("RGB"))
    assert seen.shape[0] == (23 if orientation < 5 else 37)
    assert np.array_equal(pixels(payload), seen)
    assert np.array_equal(pixels(payload, ImageReader(exif=False)), stored)


def test_damaged_exif_means_no_rotation():
    exif = Image.Exif()
    exif[0x0112] = 6
    good = encoded(photo(), "JPEG", exif=exif)
    assert pixels(good).shape == (37, 23, 3)
    for written in (b"MM\0*\xff\0\0\x08", b"XX\0*\0\0\0\x08"):
        wrong = good.replace(b"MM\0*\0\0\0\x08", written, 1)
        assert wrong != good
        assert pixels(wrong).shape == (23, 37, 3)


def test_box_is_in_pixels_after_orientation_and_flip_comes_last():
    exif = Image.Exif()
    exif[0x0112] = 6
    payload = encoded(photo(), "PNG", exif=exif)
    whole = pixels(payload)
    assert whole.shape == (37, 23, 3)
    assert np.array_equal(pixels(payload, box=[3, 5, 20, 30]), whole[5:30, 3:20])
    assert np.array_equal(pixels(payload, box=[3, 5, 20, 30], flip=True), whole[5:30, 3:20][:, ::-1])
    assert np.array_equal(pixels(payload, flip=True), whole[:, ::-1])
    assert refusal(payload, box=[3, 5, 24, 30]) == "box 3,5,24,30 is not inside the image of 23 x 37 pixels"


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_animations_need_a_frame(kind, options):
    frames = [Image.new("RGB", (9, 7), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    payload = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert refusal(payload) == f"{kind} with 3 frames: choose one with --frame VIEW=COLUMN, or split the file"
    for number, frame in enumerate(frames):
        assert np.array_equal(pixels(payload, frame=number), np.asarray(frame))
    assert refusal(payload, frame=3) == f"{kind} has no frame 3: it holds 3, counted from 0"


def test_one_frame_needs_no_choice():
    gif = encoded(photo().quantize(200), "GIF")
    assert np.array_equal(pixels(gif), pixels(gif, frame=0))
    assert "JPEG has no frame 1" in refusal(encoded(photo(), "JPEG"), frame=1)
