"""A store of portraits for tests that take people out of it: two recipes, two datasets, failures, records of files."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from featurecache.store.binding import CELL_SCHEMA, Binding
from featurecache.store.recipe import Recipe, content_key
from featurecache.store.records import StatRecord
from featurecache.store.store import FeatureStore
from featurecache.store.verify import verify

NAMES = tuple(
    f"{name}{100 + 7 * i}" for i, name in enumerate(("anna", "bruno", "carla", "dario", "elena", "fabio") * 4)
)
TWIN, BROKEN = NAMES[5], NAMES[7]  # the face of TWIN is that of NAMES[6], byte for byte; BROKEN's back can't be read
TAPS = {"t@none": ((6,), ("features",))}
VIEWS = ("face", "back")
REPLICAS = 2


def recipe(**fields: Any) -> Recipe:
    base = {"reader": {"name": "image", "version": 1, "parameters": {}}, "storage_dtype": "float16"}
    return Recipe({**base, **fields}, ({"name": "t@none", "pool": "none"},))


PLAIN, AUGMENTED = recipe(), recipe(augmentation={"flip": 0.5, "seed": 1})


def sha(name: str, view: str) -> bytes:
    owner = TWIN if (name, view) == (NAMES[6], "face") else name
    return hashlib.sha256(f"{owner} {view}".encode()).digest()


def key(name: str, view: str) -> bytes:
    return content_key("file", "{}", sha(name, view))


def place(name: str, view: str) -> str:
    return f"/data/portraits/{name}/{view}.png"


def row(key: bytes, replica: int = 0) -> np.ndarray:
    """(6,) float16"""
    return np.random.default_rng([*key, replica]).normal(size=6).astype(np.float16)


def cells_of(names: tuple[str, ...], view: str) -> list[tuple[int, str, int, bytes, str]]:
    return [
        (i, view, 0, key(name, view), "failed" if (name, view) == (BROKEN, "back") else "done")
        for i, name in enumerate(names)
    ]


def binding(dataset: str, names: tuple[str, ...], recipes: dict[str, str], manifest: Path) -> Binding:
    rows = [cell for view in recipes for cell in cells_of(names, view)]
    cells = pl.DataFrame(rows, schema=dict(CELL_SCHEMA), orient="row").sort("sample", maintain_order=True)
    paths = {view: [place(name, view) for name in names] for view in VIEWS}
    table = pl.DataFrame(
        {
            "sample_id": list(names),
            "patient": [f"P-{name}" for name in names],
            "label": [len(n) % 2 for n in names],
            **paths,
        }
    )
    config = {"manifest": {"manifest": str(manifest), "views": {view: view for view in recipes}, "reader": {}}}
    return Binding(dataset, str(manifest), "0" * 64, table, config, recipes, "error", cells)


def write_people(path: Path) -> Path:
    """`people` has all of NAMES with both views, `faces` every other one and view face, bound to AUGMENTED."""
    contents = list(dict.fromkeys(key(name, view) for name in NAMES for view in VIEWS))
    good = [content for content in contents if content != key(BROKEN, "back")]
    keys = np.frombuffer(b"".join(good), np.uint8).reshape(-1, 32)
    with FeatureStore(path, write=True) as store:
        for made in (PLAIN, AUGMENTED):
            store.add_recipe(made, TAPS, rows_per_chunk=16)
            with store.appender(made.id) as appender:
                for replica in range(REPLICAS if made.has_replicas else 1):
                    values = {"t@none": np.stack([row(content, replica) for content in good])}
                    number = np.full(len(keys), replica) if made.has_replicas else None
                    appender.append(keys, values, number)
            store.add_failures(made.id, [(key(BROKEN, "back"), "image/1", f"{BROKEN}: can't be read")])
        store.remember_payloads(
            StatRecord(place(name, view), 1, 2, 3, 4, 10**12, sha(name, view)) for name in NAMES for view in VIEWS
        )
        store.bind(binding("people", NAMES, dict.fromkeys(VIEWS, PLAIN.id), path.parent / "people.csv"))
        store.bind(binding("faces", NAMES[::2], {"face": AUGMENTED.id}, path.parent / "faces.csv"))
    with open(path / "failures.csv", "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerows([("sample_id", "view", "path", "error"), (BROKEN, "back", place(BROKEN, "back"), "broken")])
    return path


def secrets(name: str) -> dict[str, bytes]:
    """All that a store may hold of somebody, as bytes."""
    found = {"id": name.encode()}
    for view in VIEWS:
        found[f"path of {view}"] = place(name, view).encode()
        if (name, view) in ((TWIN, "face"), (NAMES[6], "face")):
            continue  # another one's as well
        found[f"hash of {view}"] = sha(name, view)
        found[f"key of {view}"] = key(name, view)
        for replica in range(REPLICAS):
            found[f"features of {view} {replica}"] = row(key(name, view), replica).tobytes()
    return found


def traces(path: Path, name: str) -> dict[str, list[str]]:
    """Which files of a store hold which of somebody's bytes."""
    files = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    names = {"the names of files": "\n".join(files).encode(), **files}
    found = {
        what: [file for file, content in names.items() if secret in content] for what, secret in secrets(name).items()
    }
    return {what: where for what, where in found.items() if where}


def people(path: Path, dataset: str = "people") -> set[str]:
    return set(FeatureStore(path).binding(dataset).table["sample_id"])


def check_people(path: Path, names: set[str]) -> None:
    """Every image of these is there, in both recipes, with its own features."""
    store = FeatureStore(path)
    wanted = [k for name in NAMES if name in names for view in VIEWS if (k := key(name, view)) != key(BROKEN, "back")]
    keys = np.frombuffer(b"".join(wanted), np.uint8).reshape(-1, 32)
    for made in (PLAIN, AUGMENTED):
        for replica in range(REPLICAS if made.has_replicas else 1):
            rows = store.rows(made.id, keys, replica)
            assert (rows >= 0).all()
            expected = np.stack([row(content, replica) for content in wanted])
            np.testing.assert_array_equal(store.read(made.id, "t@none", rows), expected)
    store.close()


def check_sound(path: Path) -> None:
    report = verify(path)
    assert report.ok, report.problems
    assert report.notes == []
