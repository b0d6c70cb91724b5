"""How much memory a run takes: the peak of anonymous resident memory of the command, for few images and for many.

The body takes no time, so that what grows with the number of images is all that is seen to grow.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

WIDE = "memory_body:wide"
TAPS = {"pooled": "penultimate", "maps": "maps:none"}
EVERY = 0.02  # seconds between looks


def write_images(folder: Path, n: int) -> Path:
    """Small PNG files of different content, a hundred a folder, and their manifest."""
    random = np.random.default_rng(n)
    lines = ["sample_id,label,image"]
    for i in range(n):
        name = f"images/{i // 100:05d}/image{i:07d}.png"
        if i % 100 == 0:
            (folder / name).parent.mkdir(parents=True)
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name, compress_level=0)
        lines.append(f"s{i:07d},{i % 2},{name}")
    (folder / "samples.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "samples.csv"


def anonymous(pid: int) -> int:
    """Bytes of anonymous resident memory that a process holds now; 0 where it has ended."""
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return 1024 * int(found.group(1)) if found else 0


def peak(manifest: Path, store: Path, tap: str, body: str = WIDE) -> int:
    """Highest anonymous resident memory of the installed command on a manifest."""
    random = ("--weights", "none", "--seed", "0", "--image-size", "64") if "/" in body else ()
    command = [
        str(Path(sys.executable).with_name("featurecache")), "extract", str(manifest), "--store", str(store), "--quiet",
        "--view", "image=image", "--body", body, "--tap", tap, "--engine", "torch", "--precision", "fp32",
        "--device", "cpu", "--batch-size", "32", *random,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_WAIT_POLICY": "passive"}
    highest = 0
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            highest = max(highest, anonymous(process.pid))
            time.sleep(EVERY)
    if process.returncode:
        raise SystemExit(process.returncode)
    return highest


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--few", type=int, default=1_000)
    parser.add_argument("--many", type=int, default=10_000)
    parser.add_argument("--tap", choices=TAPS, default="pooled")
    parser.add_argument(
        "--dir", type=Path, help="where files and stores are made for the time; default a temporary one"
    )
    parser.add_argument("--body", default=WIDE, help="another body (of random weights, at 64 x 64), only for pooled")
    options = parser.parse_args()
    found = {}
    for n in (options.few, options.many):
        folder = Path(tempfile.mkdtemp(prefix="memory-", dir=options.dir))
        try:
            found[n] = peak(write_images(folder, n), folder / "store", TAPS[options.tap], options.body)
        finally:
            shutil.rmtree(folder)
    few, many = found[options.few], found[options.many]
    rows = options.many - options.few
    result = {
        "body": options.body,
        "tap": options.tap,
        "images": [options.few, options.many],
        "peak_bytes": [few, many],
        "baseline": f"the peak for {options.few:,} images",
        "ratio": round(many / few, 4),
        "bytes_per_row": round((many - few) / rows, 1),
        "bytes_per_row_beyond_5_percent": round((many - 1.05 * few) / rows, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
