"""How long a command takes before it works: DenseNet-121, from the command line to the first batch.

    python benchmarks/startup.py

The command is timed as a whole, in a process of its own, with one image: start-up, one small batch, one commit. So the
figures are upper bounds of the time to the first batch. In turn, and again in each round:
- `first`: a fresh store, and an empty cache of converted graphs;
- `again`: another image into the same store, everything cached;
- `unchanged`: nothing new, so no engine is made;
- `torch`: `import torch, torchvision`, the floor under every tool that uses them.
Ratios are to `torch` of the same round. `cpu` counts user and system time of the process: on a busy machine the more
reliable figure. Prints one JSON object; medians over the rounds.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

LIMITS = {"first": 14.0, "again": 6.0, "unchanged": 4.0}  # seconds on a quiet 2-core machine
FLOOR = (sys.executable, "-c", "import torch, torchvision")


def timed(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Seconds and processor seconds of a command.

    Raises:
        SystemExit: it failed; shows what it said.
    """
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return {"seconds": seconds, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def write_images(folder: Path, count: int) -> None:
    """`1.csv`, `2.csv`, ...: manifests of the first 1, 2, ... images."""
    random = np.random.default_rng(0)
    names = [f"{index}.jpg" for index in range(count)]
    for index, name in enumerate(names, 1):
        Image.fromarray(random.integers(0, 256, (375, 500, 3), dtype=np.uint8)).save(folder / name)
        with (folder / f"{index}.csv").open("w", newline="", encoding="utf-8") as handle:
            csv.writer(handle).writerows([["sample_id", "image_path"], *([name, name] for name in names[:index])])


def one_round(folder: Path, options: list[str]) -> dict[str, dict[str, float]]:
    """Time each of the four once."""
    home = folder / "home"
    for made in (home, folder / "store"):
        shutil.rmtree(made, ignore_errors=True)
    home.mkdir()
    environment = {**os.environ, "FEATURECACHE_CACHE": str(home)}
    command = shutil.which("featurecache", path=os.path.dirname(sys.executable)) or "featurecache"

    def extract(images: int) -> dict[str, float]:
        manifest, store = str(folder / f"{images}.csv"), str(folder / "store")
        given = ["--view", "image=image_path", "--name", "startup", "--replace", "--quiet", *options]
        return timed([command, "extract", manifest, "--store", store, *given], environment)

    times = {"torch": timed([*FLOOR], dict(os.environ))}
    for name, images in (("first", 1), ("again", 2)):
        times[name] = extract(images)
    time.sleep(2.1)  # a file's record is trusted once it is two seconds older than the look at it
    extract(2)
    times["unchanged"] = extract(2)
    return times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--body", default="torchvision/densenet121")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    options = ["--body", chosen.body, "--weights", "none", "--seed", "0", "--engine", chosen.engine]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, 2)
        timed([*FLOOR], dict(os.environ))  # warms the file cache
        rounds = [one_round(folder, options) for _ in range(chosen.rounds)]

    def median(what: str, unit: str) -> float:
        return round(statistics.median(times[what][unit] for times in rounds), 2)

    figures: dict[str, object] = {"benchmark": "startup", "body": chosen.body, "engine": chosen.engine}
    for what in rounds[0]:
        figures |= {f"seconds_{what}": median(what, "seconds"), f"cpu_{what}": median(what, "cpu")}
    for what, limit in LIMITS.items():
        ratio = statistics.median(times[what]["seconds"] / times["torch"]["seconds"] for times in rounds)
        figures |= {f"ratio_{what}": round(ratio, 2), f"limit_seconds_{what}": limit}
    load = os.getloadavg()[0]
    print(json.dumps({**figures, "rounds": len(rounds), "cores": os.cpu_count(), "load_average": round(load, 1)}))


if __name__ == "__main__":
    main()
