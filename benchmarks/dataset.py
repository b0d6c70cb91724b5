"""Reading features: mapped batches against fancy indexing in RAM, streamed epochs against zarr alone, memory.

Makes stores of made-up features in a folder (kept for the next time), reads them from the page cache and prints JSON.

    python benchmarks/dataset.py --folder /tmp/features
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import zarr
from feature_stores import TAP, make_store, open_dataset

from featurecache.features.features import as_float32

BATCH = 1024


def best(action: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of some repeats, after one to warm up."""
    action()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        found.append(time.perf_counter() - start)
    return min(found)


def mapped(path: Path, repeats: int) -> dict[str, float]:
    """Batches of random samples: rows as stored, and as float32."""
    dataset = open_dataset(path)
    assert dataset.features.mode == "mapped"
    everything = np.arange(len(dataset))
    arrays = [dataset.features.gather(everything)[:, block.start : block.stop].copy() for block in dataset.blocks]
    rng = np.random.default_rng(0)
    batches = [rng.choice(len(dataset), BATCH, replace=False) for _ in range(20)]

    def all_of(read: Callable[[np.ndarray], object]) -> Callable[[], object]:
        return lambda: [read(batch) for batch in batches]

    ram = best(all_of(lambda rows: [array[rows] for array in arrays]), repeats)
    ram_float32 = best(all_of(lambda rows: [as_float32(array[rows]) for array in arrays]), repeats)
    ours = best(all_of(dataset.features.gather), repeats)
    ours_float32 = best(all_of(lambda rows: dataset.features[rows]), repeats)
    group = zarr.open_group(path / "features.zarr", mode="r")
    array = next(iter(group.groups()))[1][TAP]
    start = time.perf_counter()
    for _ in dataset.blocks:
        array.oindex[np.sort(batches[0])]
    by_zarr = (time.perf_counter() - start) * len(batches)
    return {
        "ratio_mapped": ram / ours,
        "ratio_mapped_float32": ram_float32 / ours_float32,
        "ratio_zarr_indexing": ram / by_zarr,
        "samples_per_second_mapped": BATCH * len(batches) / ours,
        "samples_per_second_ram": BATCH * len(batches) / ram,
    }


def chunk_arrays(path: Path) -> Iterator[np.ndarray]:
    """All chunks of the features, by zarr alone, in a shuffled order."""
    group = zarr.open_group(path / "features.zarr", mode="r")
    array = next(iter(group.groups()))[1][TAP]
    written = len(list((path / "features.zarr").glob(f"*/{TAP}/c.*")))
    rows = array.chunks[0]
    for chunk in np.random.default_rng(0).permutation(written):
        yield array[chunk * rows : (chunk + 1) * rows]


def streamed(path: Path, repeats: int) -> dict[str, float]:
    """An epoch of shuffled float32 batches against reading the chunks once with zarr."""
    dataset = open_dataset(path, memory=0)
    assert dataset.features.mode == "streamed"
    stream = dataset.stream(batch_size=BATCH)
    alone = best(lambda: [None for _ in chunk_arrays(path)], repeats)
    ours = best(lambda: [None for _ in stream], repeats)
    codec = path.name.rpartition("-")[2]
    return {f"ratio_streamed_{codec}": alone / ours, f"samples_per_second_streamed_{codec}": len(dataset) / ours}


MEMORY = """
import sys
sys.path.insert(0, {folder!r})
from pathlib import Path
from feature_stores import open_dataset

def anonymous(field):
    lines = open("/proc/self/status", encoding="ascii").read().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024

dataset = open_dataset(Path({path!r}), memory={memory})
before, most = anonymous("RssAnon:"), 0
for x, y in dataset.stream(batch_size=1024):
    most = max(most, anonymous("RssAnon:"))
print(most - before, dataset.features.nbytes, dataset.features.mode)
"""


def memory(path: Path) -> dict[str, float]:
    """Peak of what is resident and no page cache while an epoch is streamed, for a fifth of the features as budget."""
    budget = open_dataset(path).features.nbytes // 5
    code = MEMORY.format(folder=str(Path(__file__).parent), path=str(path), memory=budget)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    peak, nbytes, mode = done.stdout.split()
    assert mode == "streamed"
    codec = path.name.rpartition("-")[2]
    return {
        f"bytes_features_{codec}": int(nbytes),
        f"bytes_budget_{codec}": budget,
        f"bytes_peak_{codec}": int(peak),
        f"ratio_peak_to_budget_and_300_mb_{codec}": int(peak) / (budget + 300e6),
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    found: dict[str, float] = {}
    for codec in ("none", "zstd"):
        path = make_store(options.folder, options.samples, options.width, codec=codec)
        if codec == "none":
            found |= mapped(path, options.repeats)
        found |= streamed(path, options.repeats) | memory(path)
    print(json.dumps({name: round(value, 3) for name, value in found.items()}, indent=2))


if __name__ == "__main__":
    main()
