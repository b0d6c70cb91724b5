"""How fast a run on unchanged images is: samples of two views, every feature in the store, nothing to compute.

The files hold random bytes, and the store is filled with known features for them: no body has to run over hundreds of
thousands of images first. The run that is timed is the installed command, start-up included.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from featurecache.stageone.keys import Cell, Payload, key_array, read_payload
from featurecache.store.store import FeatureStore

VIEWS = ("frontal", "lateral")
PER_FOLDER = 1000
BLOCK = 4096
SETTLED = 2.1  # seconds after which a file's record is trusted


def write_table(path: Path, columns: list[list[str]]) -> None:
    """A manifest with an id, a label and a path per view."""
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["sample_id", "label", *VIEWS])
        writer.writerows([f"s{i:07d}", i % 2, *paths] for i, paths in enumerate(zip(*columns, strict=True)))


def make_files(root: Path, samples: int, size: int) -> list[Path]:
    """`samples.csv` with its files of `size` bytes, and `seed.csv` with four real images; returns the files."""
    random = np.random.default_rng(0)
    columns: list[list[str]] = []
    for view in VIEWS:
        names = [f"{view}/{i // PER_FOLDER:04d}/image{i:07d}.png" for i in range(samples)]
        for folder in sorted({os.path.dirname(name) for name in names}):
            (root / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            (root / name).write_bytes(random.bytes(size))
        columns.append(names)
    write_table(root / "samples.csv", columns)
    seeds = [[f"{view}-{i}.png" for i in range(4)] for view in VIEWS]
    for name in (name for names in seeds for name in names):
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / name)
    write_table(root / "seed.csv", seeds)
    return [root / name for names in columns for name in names]


def fill(store_path: Path, files: list[Path]) -> None:
    """Rows and stat records for all files, as a run over them would have left them."""
    time.sleep(SETTLED)
    with FeatureStore(store_path, write=True) as store, ThreadPoolExecutor() as pool:
        (recipe,) = store.recipes()
        shapes = {name: tap.shape for name, tap in recipe.taps.items()}
        with store.appender(recipe.id) as appender:
            for start in range(0, len(files), BLOCK):
                cells = [Cell(0, "file", path.name, str(path), "{}") for path in files[start : start + BLOCK]]
                found = [payload for payload in pool.map(read_payload, cells) if isinstance(payload, Payload)]
                features = {name: np.ones((len(found), *shape), np.float32) for name, shape in shapes.items()}
                appender.append(key_array([payload.key for payload in found]), features)
                store.remember_payloads([payload.record for payload in found if payload.record is not None])


def extract(manifest: Path, store: Path, body: str, *options: str) -> tuple[float, dict[str, Any]]:
    """Seconds of the installed command, and what it printed."""
    command = [
        str(Path(sys.executable).with_name("featurecache")), "extract", str(manifest), "--store", str(store), "--json",
        *(word for view in VIEWS for word in ("--view", f"{view}={view}")), "--body", body, "--weights", "none",
        "--seed", "0", "--engine", "torch", "--precision", "fp32", "--device", "cpu", *options,
    ]  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - start, json.loads(done.stdout)


def timed(work: Callable[[Path], object], files: list[Path], threads: int) -> float:
    """Seconds that a plain pool of threads takes to do something with every file."""
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(
            pool.map(
                lambda part: [work(path) for path in part], [files[i : i + 512] for i in range(0, len(files), 512)]
            )
        )
    return time.perf_counter() - start


def digest(path: Path) -> bytes:
    """SHA-256 of a file."""
    with open(path, "rb") as handle:
        return hashlib.sha256(handle.read()).digest()


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="where files and store are made; kept, and used again")
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--bytes", type=int, default=2_000, help="size of a file")
    parser.add_argument("--body", default="torchvision/resnet18")
    parser.add_argument("--content", action="store_true", help="also time --check content")
    options = parser.parse_args()
    root, store = options.dir.resolve(), options.dir.resolve() / "store"
    files = [root / f"{view}/{i // PER_FOLDER:04d}/image{i:07d}.png" for view in VIEWS for i in range(options.samples)]
    if not (root / "ready").exists():
        files = make_files(root, options.samples, options.bytes)
        extract(root / "seed.csv", store, options.body)
        fill(store, files)
        extract(root / "samples.csv", store, options.body)
        (root / "ready").touch()
    threads = len(os.sched_getaffinity(0))
    stat = timed(os.stat, files, 1)
    seconds, told = extract(root / "samples.csv", store, options.body)
    assert (told["computed"], told["reused"]) == (0, len(files)), told
    result = {
        "samples": options.samples,
        "files": len(files),
        "seconds": round(seconds, 2),
        "seconds_in_python": told["seconds_total"],
        "samples_per_second": round(options.samples / seconds),
        "baseline": "os.stat of the same files in one thread",
        "baseline_seconds": round(stat, 2),
        "ratio": round(stat / seconds, 3),
    }
    if options.content:
        plain = timed(digest, files, threads)
        seconds, told = extract(root / "samples.csv", store, options.body, "--check", "content")
        assert (told["computed"], told["reused"]) == (0, len(files)), told
        result |= {
            "content_seconds": round(seconds, 2),
            "content_baseline": f"open, read and SHA-256 of the same files in {threads} threads",
            "content_baseline_seconds": round(plain, 2),
            "content_ratio": round(plain / seconds, 3),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
