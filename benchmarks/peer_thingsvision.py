"""thingsvision on the same images and model as benchmarks/ceiling.py, in an environment of its own.

    python benchmarks/peer_thingsvision.py --model resnet18 [--env DIR]

Makes a virtual environment (in a temporary folder, or DIR, which is used again if it is there), installs thingsvision,
extracts the penultimate features with it and with this package in turn, and prints one JSON object with the ratio.
Where it can't be installed it says so and exits with 3.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line sets it, before torch is loaded

from ceiling import run_extract
from pictures import write_jpegs

CANNOT = 3
TAPS = {"resnet18": "avgpool", "resnet50": "avgpool", "densenet121": "features", "squeezenet1_1": "features"}
# Run by the other environment's Python: it prints images per second, its own start-up left out.
THEIRS = """
import sys, time
from thingsvision import get_extractor
from thingsvision.utils.data import DataLoader, ImageDataset
root, out, model, tap, batch = sys.argv[1:]
extractor = get_extractor(model_name=model, source="torchvision", device="cpu", pretrained=False)
start = time.perf_counter()
backend, transforms = extractor.get_backend(), extractor.get_transformations()
data = ImageDataset(root=root, out_path=out, backend=backend, transforms=transforms)
batches = DataLoader(dataset=data, batch_size=int(batch), backend=backend)
features = extractor.extract_features(batches=batches, module_name=tap, flatten_acts=True)
print(len(features) / (time.perf_counter() - start))
"""


def install(folder: Path, timeout: float) -> Path:
    """The Python of an environment that has thingsvision.

    Raises:
        SystemExit: with status 3, if it can't be installed.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "thingsvision"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        reason = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["pip failed"])[-1]
    except subprocess.TimeoutExpired:
        reason = f"pip did not end within {timeout:g} s"
    if reason:
        print(f"thingsvision can't be installed here: {reason}", file=sys.stderr)
        raise SystemExit(CANNOT)
    return python


def theirs(python: Path, folder: Path, options: argparse.Namespace) -> float:
    """Images per second of thingsvision."""
    words = [str(folder / "images"), str(folder / "out"), options.model, TAPS[options.model], "32"]
    done = subprocess.run([str(python), "-c", THEIRS, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"thingsvision failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}", file=sys.stderr)
        raise SystemExit(CANNOT)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="resnet18", choices=tuple(TAPS))
    parser.add_argument("--engine", default="openvino", choices=("torch", "openvino"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--images", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--env", type=Path, help="folder of the environment; default: a temporary one")
    parser.add_argument("--install-timeout", type=float, default=1200, help="seconds")
    options = parser.parse_args()
    options.batch_size = options.workers = None
    with tempfile.TemporaryDirectory(prefix="peer-") as name:
        folder = Path(name)
        python = install(options.env or folder / "env", options.install_timeout)
        write_jpegs(folder, options.images)
        rounds = [
            (theirs(python, folder, options), 1 / run_extract(folder, options, options.images)[0].wall)
            for _ in range(options.rounds)
        ]
    print(
        json.dumps(
            {
                "model": options.model,
                "engine": options.engine,
                "precision": options.precision,
                "thingsvision": round(statistics.median(other for other, _ in rounds), 1),
                "extract": round(statistics.median(own for _, own in rounds), 1),
                "ratio": round(statistics.median(own / other for other, own in rounds), 2),
            }
        )
    )


if __name__ == "__main__":
    main()
