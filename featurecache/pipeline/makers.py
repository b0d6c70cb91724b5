"""Small real data sets that come with the project or with scikit-learn, in the forms that real projects have them in.

A maker writes what it must into a folder and leaves a `manifest.csv` (or class folders) there; it returns what relative
paths start from, where that is not the folder itself. Everything is the same on every machine and in every run.
"""

from __future__ import annotations

import csv
import hashlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from featurecache.data.shipped import shipped_path
from featurecache.errors import InputError, did_you_mean

VERSION = 1  # raised whenever a maker would write something else
MANIFEST = "manifest.csv"
Maker = Callable[..., Path | None]
_MAKERS: dict[str, Maker] = {}
FACES = "Smileys & Emotion"


def maker(name: str) -> Callable[[Maker], Maker]:
    """Register a maker."""

    def register(function: Maker) -> Maker:
        if name in _MAKERS:
            raise ValueError(f"two makers are called {name!r}")
        _MAKERS[name] = function
        return function

    return register


def maker_names() -> list[str]:
    """All makers, sorted."""
    return sorted(_MAKERS)


def check_maker(name: str, options: Mapping[str, Any]) -> None:
    """Refuse what no maker knows.

    Raises:
        InputError: names the nearest maker or option.
    """
    if name not in _MAKERS:
        raise InputError(f"no data maker {name!r}.{did_you_mean(name, _MAKERS)} Known: {', '.join(maker_names())}.")
    known = list(inspect.signature(_MAKERS[name]).parameters)[1:]
    for option in options:
        if option not in known:
            near = did_you_mean(option, known)
            raise InputError(f"data maker {name!r}: no option {option!r}.{near} Known: {', '.join(known)}.")


def made_at(folder: Path, name: str, options: Mapping[str, Any]) -> Path:
    """Where below `folder` the data of a maker with these options are, or will be."""
    about = json.dumps([VERSION, name, dict(options)], sort_keys=True)
    return folder / f"{name}-{hashlib.sha256(about.encode()).hexdigest()[:8]}"


def make(folder: Path, name: str, options: Mapping[str, Any]) -> tuple[Path, Path | None]:
    """Make the data of a maker unless they are there.

    Returns:
        The manifest (or the folder of class folders), and what its paths start from if that is another folder.

    Raises:
        InputError: no such maker or option.
    """
    check_maker(name, options)
    target = made_at(folder, name, options)
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder))
        try:
            root = _MAKERS[name](scratch, **options)
            (scratch / ".root").write_text(str(root or ""), encoding="utf-8")
            if not target.exists():
                os.replace(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    root_text = (target / ".root").read_text(encoding="utf-8")
    manifest = target / MANIFEST
    return manifest if manifest.is_file() else target, Path(root_text) if root_text else None


def emoji_rows(n: int | None = None) -> list[dict[str, str]]:
    """Rows of the shipped manifest; n of them, evenly spread, so that all categories are among them."""
    with shipped_path("emoji/manifest.csv").open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    if n is None or n >= len(rows):
        return rows
    return [rows[int(place)] for place in np.linspace(0, len(rows) - 1, n).round()]


def emoji_image(row: Mapping[str, str], view: str) -> Image.Image:
    """One drawing, RGBA, 64 x 64."""
    return Image.open(shipped_path("emoji") / row[view]).convert("RGBA")


def on_white(image: Image.Image) -> Image.Image:
    """RGB, what is transparent white."""
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def write_table(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """manifest.csv."""
    with (folder / MANIFEST).open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def side_of(group: str) -> str:
    """train, valid or test for a group, 70 : 15 : 15, by a hash of its name: the same for any choice of views."""
    place = int(hashlib.sha256(group.encode()).hexdigest()[:8], 16) / 16**8
    return "train" if place < 0.7 else "valid" if place < 0.85 else "test"


def shares(count: int, seed: int) -> np.ndarray:
    """(count,) numbers from 0 to 1, drawn."""
    drawn: np.ndarray = np.random.default_rng(seed).random(count)
    return drawn


@maker("emoji")
def emoji(folder: Path, n: int | None = None, missing: float = 0.0) -> Path:
    """Emoji drawn by Google and by Twitter: google, twitter, category, group, split; some lack the second drawing."""
    rows = emoji_rows(n)
    for row, share in zip(rows, shares(len(rows), 1), strict=True):
        row["twitter"] = "" if share < missing else row["twitter"]
        row["split"] = side_of(row["group"])
    write_table(folder, rows)
    return shipped_path("emoji")


@maker("emoji-families")
def emoji_families(folder: Path, n: int | None = None) -> None:
    """A folder per family of emoji (one drawing in several states) with the drawings of both houses, RGB on white."""
    families: dict[str, list[dict[str, str]]] = {}
    for row in emoji_rows():
        families.setdefault(row["group"], []).append(row)
    names = sorted(families)
    chosen = (
        names if n is None or n >= len(names) else [names[int(k)] for k in np.linspace(0, len(names) - 1, n).round()]
    )
    for name in chosen:
        (folder / name).mkdir()
        for row in families[name]:
            for house in ("google", "twitter"):
                on_white(emoji_image(row, house)).save(folder / name / f"{row['sample_id']}-{house}.png")


@maker("emoji-findings")
def emoji_findings(
    folder: Path, n: int | None = None, findings: int = 40, missing: float = 0.2, uncertain: float = 0.03
) -> Path:
    """Two views, `finding_01` ... (1, 0, -1 uncertain, empty unknown), patient_id; some lack the lateral view.

    A finding is a word of the emoji's name or subcategory (`face`, `clock`), the most frequent first.
    """
    rows, every = emoji_rows(n), emoji_rows()
    words = [_words(row) for row in every]
    counts: dict[str, int] = {}
    for held in words:
        for word in held:
            counts[word] = counts.get(word, 0) + 1
    chosen = sorted(counts, key=lambda word: (-counts[word], word))[:findings]
    held_by = {row["sample_id"]: held for row, held in zip(every, words, strict=True)}
    table = []
    for number, row in enumerate(rows):
        drawn = shares(findings + 1, 100 + number)
        held = held_by[row["sample_id"]]
        labels = {
            f"finding_{k + 1:02d}": -1 if drawn[k] < uncertain else "" if drawn[k] > 0.98 else int(word in held)
            for k, word in enumerate(chosen)
        }
        lateral = "" if drawn[-1] < missing else row["twitter"]
        table.append({"sample_id": row["sample_id"], "patient_id": row["group"], "frontal": row["google"],
                      "lateral": lateral, **labels})  # fmt: skip
    write_table(folder, table)
    return shipped_path("emoji")


def _words(row: Mapping[str, str]) -> set[str]:
    """The words of an emoji: its name, category and subcategory."""
    text = "_".join(row[name] for name in ("sample_id", "subcategory", "category")).lower()
    return set(text.replace("-", "_").replace(" ", "_").split("_")) - {"", "&"}


@maker("emoji-studies")
def emoji_studies(folder: Path, n: int | None = None, missing: float = 0.25, uncertain: float = 0.05) -> Path:
    """A row per image, as MIMIC-CXR-JPG lists them: subject_id, study_id, ViewPosition, path, and a column per finding.

    Some studies have two frontal images, some no lateral one; a finding is 1, 0, -1 (uncertain) or empty.
    """
    rows = emoji_rows(n)
    categories = sorted({row["category"] for row in rows})
    table = []
    for number, row in enumerate(rows):
        drawn = shares(len(categories) + 2, 200 + number)
        labels = {
            category: -1 if share < uncertain else "" if share > 0.97 else int(row["category"] == category)
            for category, share in zip(categories, drawn, strict=False)
        }
        study = {"subject_id": row["group"], "study_id": f"s{number:05d}"}
        images = [("PA" if number % 2 else "AP", row["google"])]
        if drawn[-1] < 0.2 and number and rows[number - 1]["group"] == row["group"]:
            images.append(("AP", rows[number - 1]["google"]))
        if drawn[-2] >= missing:
            images.append(("LATERAL" if number % 3 else "LL", row["twitter"]))
        table += [{**study, "ViewPosition": position, "path": path, **labels} for position, path in images]
    write_table(folder, table)
    return shipped_path("emoji")


@maker("emoji-folder")
def emoji_folder(folder: Path, n: int | None = None, classes: Sequence[str] = (FACES, "Animals & Nature")) -> None:
    """A folder per class with PNG files, RGB on white."""
    chosen = [row for row in emoji_rows() if row["category"] in classes]
    if not chosen:
        raise InputError(f"data maker 'emoji-folder': no emoji of {', '.join(classes)}")
    if n is not None and n < len(chosen):
        chosen = [chosen[int(place)] for place in np.linspace(0, len(chosen) - 1, n).round()]
    for row in chosen:
        place = folder / row["category"].replace(" & ", "-and-").replace(" ", "-").lower()
        place.mkdir(exist_ok=True)
        on_white(emoji_image(row, "google")).save(place / f"{row['sample_id']}.png")


@maker("emoji-tiles")
def emoji_tiles(folder: Path, n: int | None = None, positive: str = "Food & Drink") -> None:
    """TIFF tiles in one folder and a CSV of id, path, label (few positives) and slide, as histopathology has them."""
    (folder / "tiles").mkdir()
    table = []
    for row in emoji_rows(n):
        path = f"tiles/{hashlib.sha1(row['sample_id'].encode()).hexdigest()}.tif"
        on_white(emoji_image(row, "google")).save(folder / path, compression="tiff_lzw")
        table.append({"id": Path(path).stem, "path": path, "label": int(row["category"] == positive),
                      "slide": row["group"]})  # fmt: skip
    write_table(folder, table)


@maker("emoji-names")
def emoji_names(folder: Path, n: int | None = None) -> Path:
    """Names as texts: columns name, category, group, and the drawing."""
    rows = emoji_rows(n)
    table = [{"sample_id": r["sample_id"], "name": r["sample_id"].replace("_", " "), "category": r["category"],
              "group": r["group"], "google": r["google"]} for r in rows]  # fmt: skip
    write_table(folder, table)
    return shipped_path("emoji")


@maker("emoji-masks")
def emoji_masks(folder: Path, n: int = 200, size: int = 96) -> None:
    """Emoji at random places over photo-like backgrounds; the mask is where the emoji is opaque."""
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    table = []
    for number, row in enumerate(emoji_rows(n)):
        random = np.random.default_rng(300 + number)
        picture = background(random, size)
        side = int(random.integers(size // 3, 2 * size // 3))
        drawing = emoji_image(row, "google").resize((side, side), Image.Resampling.LANCZOS)
        at = int(random.integers(0, size - side)), int(random.integers(0, size - side))
        picture.paste(drawing, at, drawing)
        mask = Image.new("L", (size, size))
        mask.paste(drawing.getchannel("A").point(lambda alpha: 255 * (alpha > 127)), at)
        entry = {"sample_id": row["sample_id"], "group": row["group"], "category": row["category"]}
        for name, image in (("image", picture), ("mask", mask)):
            entry[name] = f"{name}s/{row['sample_id']}.png"
            image.save(folder / entry[name])
        table.append(entry)
    write_table(folder, table)


def background(random: np.random.Generator, size: int) -> Image.Image:
    """Clouds of colour with grain: noise of several scales, the coarse ones stronger, as photographs have it."""
    picture = np.zeros((size, size, 3))
    for cells, strength in ((2, 90), (5, 50), (12, 25), (size, 8)):
        coarse = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        picture += (np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), float) - 128) * strength / 128
    return Image.fromarray((picture + random.integers(70, 190, 3)).clip(0, 255).astype(np.uint8))


@maker("digits")
def digits(folder: Path, n: int | None = None) -> None:
    """scikit-learn's handwritten digits, 8 x 8 grey: columns image, digit."""
    _digits(folder, n, {"image": (0, 8)})


@maker("digits-halves")
def digits_halves(folder: Path, n: int | None = None) -> None:
    """The same digits cut into a left and a right half, two views: columns left, right, digit."""
    _digits(folder, n, {"left": (0, 4), "right": (4, 8)})


def _digits(folder: Path, n: int | None, views: Mapping[str, tuple[int, int]]) -> None:
    from sklearn.datasets import load_digits

    found = load_digits()
    images, labels = found.images[:n], found.target[:n]
    (folder / "images").mkdir()
    table = []
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        row: dict[str, Any] = {"sample_id": f"d{number:04d}", "digit": int(label)}
        for view, (start, stop) in views.items():
            row[view] = f"images/{number:04d}-{view}.png"
            Image.fromarray((image[:, start:stop] * (255 / 16)).astype(np.uint8)).save(folder / row[view])
        table.append(row)
    write_table(folder, table)
