"""Case 11: a corpus of odd and broken files through the command: right pixels, or one line with the reason."""

from __future__ import annotations

import csv
import io
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from extract_kit import features, image, json_of, read_rows, states, write_images, write_manifest
from image_files import chunk, encoded, photo, png
from PIL import Image
from zygote import shared

from featurecache.store.store import FeatureStore
from featurecache.store.verify import verify

SIDE = 32
TAP = "bn1@none"  # a map: what is turned or shifted shows
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a[:, ::-1].transpose(1, 0, 2),
}
"""EXIF orientation -> what makes the stored pixels (height, width, 3) upright."""


def good_files() -> dict[str, tuple[bytes, np.ndarray, float]]:
    """Name -> file, the pixels it stands for (uint8), and by how many grey levels a decoder may differ."""
    picture = photo(SIDE, SIDE)
    pixels = np.asarray(picture)
    jpeg = np.asarray(Image.open(io.BytesIO(encoded(picture, "JPEG"))))
    corpus: dict[str, tuple[bytes, np.ndarray, float]] = {}
    for orientation, upright in TURNS.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        corpus[f"exif{orientation}.jpg"] = (encoded(picture, "JPEG", exif=exif), upright(jpeg), 0)
        corpus[f"exif{orientation}.png"] = (encoded(picture, "PNG", exif=exif), upright(pixels), 0)
    grey = pixels[:, :, 0]
    corpus["16bit-grey.png"] = (
        encoded(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"), np.dstack([grey] * 3), 0
    )  # fmt: skip
    deep = (pixels.astype(">u2") * 257).astype(">u2").tobytes()
    corpus["16bit-colour.png"] = (png(SIDE, SIDE, 16, 2, deep), pixels, 0)
    cmyk = encoded(picture.convert("CMYK"), "JPEG", quality=100, subsampling=0)
    corpus["cmyk.jpg"] = (cmyk, np.asarray(Image.open(io.BytesIO(cmyk)).convert("RGB")), 1)
    alpha = np.where(np.arange(SIDE)[:, None] % 3 == 0, 0, 255).astype(np.uint8) * np.ones((SIDE, SIDE), np.uint8)
    corpus["alpha.png"] = (
        encoded(Image.fromarray(np.dstack([pixels, alpha])), "PNG"), np.where(alpha[:, :, None] == 0, 255, pixels), 0
    )  # fmt: skip
    palette = picture.quantize(16)
    corpus["palette.png"] = (encoded(palette, "PNG"), np.asarray(palette.convert("RGB")), 0)
    corpus["single-frame.gif"] = (encoded(palette, "GIF"), np.asarray(palette.convert("RGB")), 0)
    corpus["grey.bmp"] = (encoded(picture.convert("L"), "BMP"), np.dstack([np.asarray(picture.convert("L"))] * 3), 0)
    return corpus


def bad_files() -> dict[str, tuple[bytes, str]]:
    """Name -> file, and what is said of it."""
    picture = photo(SIDE, SIDE)
    jpeg, frames = encoded(picture, "JPEG"), [Image.new("RGB", (9, 7), colour) for colour in ("red", "lime", "blue")]
    animated = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0))
    bomb = head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    huge = bytearray(jpeg)
    at = huge.find(b"\xff\xc0") + 5
    huge[at : at + 4] = struct.pack(">HH", 65_000, 65_000)
    holes = np.full((SIDE, SIDE), np.nan, np.float32)
    return {
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated JPEG: "),
        "truncated.png": (encoded(picture, "PNG")[:-30], "truncated PNG: "),
        "bomb.png": (
            b"\x89PNG\r\n\x1a\n" + bomb, "PNG of 30000 x 30000 pixels: 900,000,000 exceed the limit of 100,000,000"
        ),
        "huge.jpg": (bytes(huge), "JPEG of 65000 x 65000 pixels: 4,225,000,000 exceed the limit of 100,000,000"),
        "strip.png": (encoded(picture.resize((100_000, 1)), "PNG"), "too elongated"),
        "empty.png": (b"", "0 bytes: the file is empty"),
        "text.jpg": (b"hello, a text", "not an image that can be read: found text that begins with 'hello, a text'"),
        "animated.gif": (animated, "GIF with 3 frames: choose one with --frame"),
        "nan.tiff": (encoded(Image.fromarray(holes), "TIFF"), "the image holds NaN or infinite values"),
    }  # fmt: skip


def words(manifest: Path, store: Path, *more: str) -> list[str]:
    return [
        "extract", str(manifest), "--store", str(store), "--view", "image=image", "--body", "plugin_extract:steady",
        "--tap", "bn1:none", "--precision", "fp32", "--store-dtype", "float32", "--engine", "torch", "--json", *more,
    ]  # fmt: skip


def write_corpus(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, payload in files.items():
        (folder / name).write_bytes(payload)
    return write_manifest(folder / "samples.csv", [{"sample_id": name, "label": 0, "image": name} for name in files])


def test_a_corpus_of_odd_and_broken_files(tmp_path):
    good, bad = good_files(), bad_files()
    files = {**{name: entry[0] for name, entry in good.items()}, **{name: entry[0] for name, entry in bad.items()}}
    names = sorted(files, key=lambda name: zlib.crc32(name.encode()))  # good and bad ones mixed
    manifest = write_corpus(tmp_path / "data", {name: files[name] for name in names})
    references = write_corpus(
        tmp_path / "upright", {name: encoded(Image.fromarray(entry[1]), "PNG") for name, entry in good.items()}
    )
    done = shared().run(tmp_path / "out", *words(manifest, tmp_path / "store"))
    reference = shared().run(tmp_path / "out2", *words(references, tmp_path / "reference"))
    assert reference.status == 0, reference.err
    assert done.status == 3, done.err
    figures = json_of(done.out)
    assert (figures["computed"] + figures["reused"], figures["n_failed"]) == (len(good), len(bad))

    found, expected = features(tmp_path / "store", tap=TAP), features(tmp_path / "reference", tap=TAP)
    assert found.keys() == expected.keys() == good.keys()
    level = max(float(np.abs(expected[f"exif{a}.png"] - expected["exif1.png"]).max()) for a in TURNS) / 255
    for name, (_, _, levels) in good.items():
        difference = float(np.abs(found[name] - expected[name]).max())
        assert difference <= (3 * levels * level if levels else 1e-5), f"{name}: {difference} of {level} a grey level"
    for a, b in zip([1, 1, 2, 3, 5, 6], [2, 3, 4, 4, 6, 8], strict=True):
        assert np.abs(expected[f"exif{a}.jpg"] - expected[f"exif{b}.jpg"]).max() > 50 * level

    listed = {entry["sample_id"]: entry["error"] for entry in figures["failed"]}
    assert len(listed) == len(figures["failed"]), "each once"
    assert listed.keys() == bad.keys()
    for name, (_, message) in bad.items():
        assert message in listed[name], f"{name}: {listed[name]}"
    with (tmp_path / "store" / "failures.csv").open(newline="", encoding="utf-8") as handle:
        assert {row["sample_id"]: row["error"] for row in csv.DictReader(handle)} == listed
    assert states(tmp_path / "store") == {name: "done" if name in good else "failed" for name in names}
    assert verify(tmp_path / "store").ok

    again = json_of(shared().run(tmp_path / "out", *words(manifest, tmp_path / "store")).out)
    assert (again["computed"], again["reused"], again["failed"]) == (0, len(good), figures["failed"])
    (tmp_path / "data" / "text.jpg").write_bytes(files["exif6.jpg"] + b"\0")
    third = json_of(shared().run(tmp_path / "out", *words(manifest, tmp_path / "store")).out)
    assert (third["computed"], third["reused"], third["n_failed"]) == (1, len(good), len(bad) - 1)


def test_zeros_are_features_and_nan_is_listed(tmp_path):
    """Case 8: zero is a number like any other; what is not finite is no feature."""
    manifest = write_images(tmp_path / "data", 5)
    Image.new("RGB", (SIDE, SIDE), "white").save(tmp_path / "data" / "image0003.png")
    line = words(manifest, tmp_path / "store", "--codec", "zstd", "--rows-per-chunk", "2")
    line[line.index("plugin_extract:steady")] = "plugin_extract:zero_or_nan"
    line[line.index("bn1:none")] = "penultimate"
    done = shared().run(tmp_path / "out", *line)
    assert done.status == 3, done.err
    (failure,) = json_of(done.out)["failed"]
    assert (failure["sample_id"], failure["error"]) == ("s0003", "penultimate@none: features are not finite in float32")
    found = features(tmp_path / "store")
    assert len(found) == 4
    assert all((row == 0).all() for row in found.values())
    report = verify(tmp_path / "store")
    assert (report.ok, report.rows, report.chunks) == (True, 4, 2)


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True], ids=["after it was read", "before it was read"])
def test_bytes_that_change_during_the_run(tmp_path, late):
    """What is stored belongs to the bytes that were read; the next run computes the others, and nothing else."""
    n = 224
    manifest, store = write_images(tmp_path / "data", n, side=8), tmp_path / "store"
    line = words(manifest, store, "--batch-size", "16", "--rows-per-chunk", "32")
    line[line.index("plugin_extract:steady")] = "plugin_extract:slow"
    process = shared().start(tmp_path / "out", *line)
    while process.poll() is None and not any(store.glob("features.zarr/*/key/c.0.0")):
        time.sleep(0.005)
    changed = tmp_path / "data" / read_rows(manifest)[n - 1 if late else 0]["image"]
    image(999, 8).save(changed)
    assert process.wait() == 0, process.err
    assert json_of(process.out)["computed"] == n
    again = json_of(shared().run(tmp_path / "out", *line).out)
    assert (again["computed"], again["reused"], again["failed"]) == ((0, n, []) if late else (1, n - 1, []))
    reference = shared().run(tmp_path / "out", *words(manifest, tmp_path / "reference"))
    assert reference.status == 0
    found, expected = features(store, tap=TAP), features(tmp_path / "reference", tap=TAP)
    for sample, row in expected.items():
        np.testing.assert_allclose(found[sample], row, atol=1e-5, rtol=0)
    assert FeatureStore(store).recipes()[0].rows == (n if late else n + 1)
