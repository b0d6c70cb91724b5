"""What the tests of stage one share: images, manifests, configurations, and what is in a store afterwards."""

from __future__ import annotations

import csv
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from PIL import Image

from featurecache.config import ExtractConfig
from featurecache.extract import Summary, extract
from featurecache.store.store import FeatureStore

BODY = "plugin_extract:steady"


def image(seed: int, side: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def write_images(folder: Path, n: int, *, views: tuple[str, ...] = ("image",), side: int = 32) -> Path:
    """`samples.csv` with n samples, a PNG per view; old enough for `--check stat` to trust their times."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(n):
        row = {"sample_id": f"s{i:04d}", "label": i % 2}
        for k, view in enumerate(views):
            row[view] = f"{view}{i:04d}.png"
            image(1000 * k + i, side).save(folder / row[view])
        rows.append(row)
    return write_manifest(folder / "samples.csv", rows)


def write_manifest(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def settle() -> None:
    """Wait until files written just now count as settled: records younger than two seconds are not trusted."""
    time.sleep(2.1)


def config(manifest: Path, store: Path, **options: Any) -> ExtractConfig:
    views = {} if manifest.is_dir() else {"views": {"image": "image"}}
    numbers = {"engine": "torch", "precision": "fp32", "store_dtype": "float32"}  # as the live forward pass has them
    base = {"manifest": manifest, "store": store, **views, "body": BODY, **numbers}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    return ExtractConfig.create({**base, **plain})


def run(manifest: Path, store: Path, **options: Any) -> Summary:
    return extract(config(manifest, store, **options))


def counts(summary: Summary) -> tuple[int, int, int]:
    """(computed, reused, failed)"""
    assert summary.images == summary.computed + summary.reused + summary.failed
    return summary.computed, summary.reused, summary.failed


def features(path: Path, name: str = "samples", view: str = "image", tap: str = "") -> dict[str, np.ndarray]:
    """Sample id -> features of the first image of a view, of the samples that have a row."""
    store = FeatureStore(path)
    binding = store.binding(name)
    recipe = store.recipe(binding.recipes[view])
    cells = store.resolve(binding, view)
    done = (cells.rows >= 0) & (cells.ordinal == 0)
    values = store.read(recipe.id, tap or next(iter(recipe.taps)), cells.rows[done])
    ids = binding.sample_ids[cells.sample[done]]
    store.close()
    return dict(zip(ids.tolist(), values, strict=True))


def states(path: Path, name: str = "samples", view: str = "image") -> dict[str, str]:
    """Sample id -> state of the first image of a view, as bound."""
    binding = FeatureStore(path).binding(name)
    cells = binding.cells.filter(view=view, ordinal=0)
    return dict(zip(binding.sample_ids[cells["sample"].to_numpy()].tolist(), cells["state"].to_list(), strict=True))


def plain_rows(path: Path, recipe: str, tap: str) -> dict[bytes, np.ndarray]:
    """Key -> features with nothing but zarr; a key that comes twice fails."""
    group = zarr.open_group(path / "features.zarr", mode="r")[recipe]
    keys, values = group["key"][:], group[tap][:]
    held = keys.any(axis=1)
    rows = {key.tobytes(): value for key, value in zip(keys[held], values[held], strict=True)}
    assert len(rows) == held.sum()
    return rows


def recipe_ids(path: Path) -> list[str]:
    return [info.id for info in FeatureStore(path).recipes()]


def tree(path: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file and folder below: size, time of change, bytes."""
    return {
        str(item.relative_to(path)): (
            item.stat().st_size if item.is_file() else 0,
            item.stat().st_mtime_ns,
            item.read_bytes() if item.is_file() else b"",
        )
        for item in sorted(path.rglob("*"))
    }


def main(*words: Any, capsys: Any) -> tuple[int, str, str]:
    """Run the command line in this process: (exit status, stdout, stderr)."""
    import signal
    import sys

    from featurecache.cli import main as entry

    before, handler = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = ["featurecache", *map(str, words)]
    capsys.readouterr()
    try:
        entry()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.argv = before
        signal.signal(signal.SIGTERM, handler)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def json_of(text: str) -> dict[str, Any]:
    """The one object on stdout."""
    assert text.count("\n") == 1
    return json.loads(text)


def command_environment() -> dict[str, str]:
    """For the installed command: plug-in bodies can be imported."""
    here = str(Path(__file__).parent)
    return {**os.environ, "PYTHONPATH": here, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
