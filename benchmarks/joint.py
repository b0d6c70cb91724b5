"""Does tuning the bodies pay? Cached head against joint training, on two sets of two views and several divisions.

On the shipped emoji (drawn by Google and by Twitter, in groups) and on the left and right halves of scikit-learn's
digits, with the shipped SqueezeNet and one division per seed: an fc head on cached features; and from it, jointly
tuned, both bodies (concat), one body for both views (shared), and what lies above a module (prefix). Spatial fusion is
fitted on cached maps, then tuned. Settings are the same for all seeds; the epoch is chosen by validation loss alone,
the start among them. Prints a Markdown table, and writes all figures as JSON.

    python benchmarks/joint.py --seeds 5 --out joint.json
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line sets it, before torch is loaded

import numpy as np

import featurecache as fc
from featurecache.data.shipped import shipped_path
from featurecache.run import Run

ABOVE = "features.8"  # of SqueezeNet's thirteen: four of its eight Fire modules learn above it
MAP = "features:rows"
DIGITS = 900
FIELDS = (
    "test_accuracy", "test_log_loss", "valid_accuracy", "valid_log_loss", "seconds", "seconds_epoch", "best_epoch",
)  # fmt: skip
# Rates are the defaults of a warm start. Crops are left out since they raised the validation loss on the first division
# of the emoji; no figure of a test split decided anything.
SETS: Mapping[str, Mapping[str, Any]] = {
    "emoji": {"views": ("google", "twitter"), "target": "category", "size": 64, "epochs": 3, "augment": ("flip",)},
    "digits": {"views": ("left", "right"), "target": "digit", "size": 32, "epochs": 3, "augment": ()},
}


def write_digits(folder: Path, n: int) -> Path:
    """The left and right half of `n` digits as PNG files, and their manifest."""
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    folder.mkdir(parents=True)
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["sample_id", "left", "right", "digit"])
        for number, (image, digit) in enumerate(zip(data.images[:n], data.target[:n], strict=True)):
            pixels = (image * 255 / 16).astype(np.uint8)
            names = {"left": pixels[:, :4], "right": pixels[:, 4:]}
            for view, half in names.items():
                Image.fromarray(np.ascontiguousarray(half)).save(folder / f"{number}-{view}.png")
            writer.writerow([number, *(f"{number}-{view}.png" for view in names), f"d{digit}"])
    return folder / "manifest.csv"


def figures(run: Run, seconds: float) -> dict[str, float]:
    """What a run is compared by."""
    history = run.history
    passes = history["seconds"].to_list() if "seconds" in history.columns else []
    names = ("accuracy", "log_loss")
    found = {f"{split}_{name}": run.metrics[split][name] for split in ("valid", "test") for name in names}
    best = float(run.record.get("best_epoch", -1))
    return {**found, "seconds": seconds, "seconds_epoch": float(np.median(passes[1:] or [0.0])), "best_epoch": best}


def one_seed(name: str, manifest: Path, folder: Path, seed: int, epochs: int | None) -> dict[str, dict[str, float]]:
    """All ways of training on one division."""
    options = SETS[name]
    views = {view: view for view in options["views"]}
    body = {
        "body": "torchvision/squeezenet1_1", "weights": "shipped", "image_size": options["size"],
        "resize_mode": "squash", "views": views,
    }  # fmt: skip
    store, runs = folder / "store", folder / f"seed{seed}"
    summary = fc.extract(manifest, store=store, name=name, tap=["penultimate", MAP], **body)
    found: dict[str, dict[str, float]] = {}
    heads: dict[str, Run] = {}
    penultimate, rows = "penultimate@avg", MAP.replace(":", "@")
    for key, tap, settings in (
        ("cached head", penultimate, {}),
        ("cached head, spatial", rows, {"fusion": "spatial"}),
    ):
        started = time.perf_counter()
        dataset = fc.FeatureDataset(store, dataset=name, target=options["target"], tap={"*": tap})
        heads[key] = fc.fit_head(dataset, head="fc", seed=seed, settings=settings, bootstrap=0, out=runs / key)
        dataset.store.close()
        found[key] = figures(heads[key], time.perf_counter() - started)
    joint = {
        "epochs": epochs or options["epochs"], "augment": options["augment"], "view_dropout": 0.0, "bootstrap": 0,
        "seed": seed, "batch_size": 32,
    }  # fmt: skip
    for key, start, more in (
        ("tuned, concat", "cached head", {}),
        ("tuned, shared body", "cached head", {"share_bodies": "all"}),
        ("tuned above a module", "cached head", {"train_from": ABOVE, "store": store, "augment": ()}),
        ("tuned, spatial", "cached head, spatial", {"fusion": "spatial"}),
    ):
        started = time.perf_counter()
        run = fc.finetune_joint(manifest, init=heads[start].path, out=runs / key, **{**joint, **more})
        found[key] = figures(run, time.perf_counter() - started)
        print(f"{name} {seed} {key}: {found[key]}", flush=True)
    found["cached head"]["seconds_extract"] = summary.seconds["seconds_total"]
    return found


def table(name: str, seeds: Sequence[Mapping[str, Mapping[str, float]]]) -> str:
    """Means over the seeds, and the paired difference to the cached head."""
    lines = [
        f"{name}, {len(seeds)} divisions | test accuracy | difference to the cached head | test log loss | "
        "an epoch beat its start (validation) | seconds an epoch | seconds",
        "--- | --- | --- | --- | --- | --- | ---",
    ]
    for key in seeds[0]:
        values = {field: np.array([seed[key][field] for seed in seeds]) for field in FIELDS}
        base = {field: np.array([seed["cached head"][field] for seed in seeds]) for field in FIELDS}
        gain = values["test_accuracy"] - base["test_accuracy"]
        spread = f" ± {gain.std(ddof=1):.3f}" if len(seeds) > 1 else ""
        own, tuned = key == "cached head", (values["best_epoch"] >= 0).all()
        better = f"{int((values['best_epoch'] > 0).sum())} of {len(seeds)}" if tuned else ""
        lines.append(
            f"{key} | {values['test_accuracy'].mean():.3f} | {'' if own else f'{gain.mean():+.3f}{spread}'} | "
            f"{values['test_log_loss'].mean():.3f} | {better} | "
            f"{values['seconds_epoch'].mean():.1f} | {values['seconds'].mean():.1f}"
        )
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="divisions")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--epochs", type=int, help="of joint training; default 3")
    parser.add_argument("--samples", type=int, help="the first so many; for a trial")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    started = time.perf_counter()
    found: dict[str, list[dict[str, dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory(prefix="joint-") as scratch:
        for name in arguments.sets:
            folder = Path(scratch) / name
            if name == "digits":
                manifest = write_digits(folder / "images", arguments.samples or DIGITS)
            else:
                manifest = first_rows(shipped_path("emoji/manifest.csv"), folder, arguments.samples)
            found[name] = [one_seed(name, manifest, folder, seed, arguments.epochs) for seed in range(arguments.seeds)]
    tables = {name: table(name, seeds) for name, seeds in found.items()}
    if arguments.out:
        seconds = time.perf_counter() - started
        whole = {"schema": 1, "seconds": seconds, "sets": found, "tables": tables}
        arguments.out.write_text(json.dumps(whole, indent=1))
    print("\n\n".join(tables.values()))


def first_rows(manifest: Path, folder: Path, n: int | None) -> Path:
    """The manifest, or its first rows beside absolute paths."""
    if n is None:
        return manifest
    with manifest.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))[:: max(1, 1250 // n)][:n]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "manifest.csv"
    (folder / "google").symlink_to(manifest.parent / "google")
    (folder / "twitter").symlink_to(manifest.parent / "twitter")
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


if __name__ == "__main__":
    main()
