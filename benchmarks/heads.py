"""Heads against the bare libraries on arrays in RAM: epochs of fc, time and memory of xgboost, logistic's optimum.

Makes a store of made-up features in a folder (kept for the next time) and prints JSON. Each fit of xgboost runs in a
process of its own, whose peak is taken without what was resident before; it has 20 rounds, since no training that
waits for 20 without a gain is shorter. `--full` takes 100,000 samples, and a quarter of an hour on two cores.
`--bodies` also runs a body over images, by this package's engine and by the hand-written loop (see ceiling.py), and
compares an epoch through two views of it with one of fc.

    python benchmarks/heads.py --folder /tmp/features --bodies densenet121
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line sets it, before torch is loaded

import numpy as np
import torch
from feature_stores import make_store, open_dataset
from torch import nn

from featurecache.features.features import ArrayFeatures
from featurecache.heads.base import Fold, get_head
from featurecache.heads.fc import FCHead

EPOCHS, BATCH = 3, 512
IMAGES = 96  # that are run through a body


def fc(path: Path) -> dict[str, float]:
    """Seconds of an epoch, the fastest of some, beside the same layers trained by a bare loop over tensors in RAM."""
    dataset = open_dataset(path)
    x, y = (np.asarray(part) for part in dataset.numpy())
    head = FCHead({"epochs": EPOCHS, "batch_size": BATCH, "class_weight": None})
    tensor, labels = torch.from_numpy(x), torch.from_numpy(y)
    d = x.shape[1]
    module = nn.Sequential(
        nn.BatchNorm1d(d), nn.Dropout(0.25), nn.Linear(d, 512), nn.ReLU(), nn.BatchNorm1d(512), nn.Dropout(0.5),
        nn.Linear(512, 2),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3, weight_decay=0.01, fused=True)
    loss = nn.CrossEntropyLoss()
    bare: list[np.ndarray] = []
    ours: list[np.ndarray] = []
    stamps: list[np.ndarray] = []

    def now() -> np.ndarray:
        """On the wall and of the processor."""
        return np.array([time.perf_counter(), time.process_time()])

    def epoch_of_bare() -> None:
        order = torch.randperm(len(tensor))
        for start in range(0, len(tensor), BATCH):
            index = order[start : start + BATCH]
            value = loss(module(tensor[index]), labels[index])
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()

    def told(row: dict[str, object]) -> None:
        stamps.append(now())
        # One epoch of each in turn, so that both meet the machine in the same state.
        epoch_of_bare()
        stamps.append(now())
        bare.append(stamps[-1] - stamps[-2])

    features = ArrayFeatures(x, dataset.blocks)
    for some in (features, dataset.features):
        fold = Fold(some, np.arange(len(y)), dataset.target)
        stamps[:] = [now()]
        head.fit(fold, progress=told)
        each = [stop - start for start, stop in zip(stamps[0::2], stamps[1::2], strict=False)]
        ours.append(np.min(each, axis=0))
    least = np.min(bare, axis=0)
    return {
        "seconds_epoch_bare": least[0],
        "seconds_epoch_fc": ours[0][0],
        "ratio_fc_epoch": ours[0][0] / least[0],
        "ratio_fc_epoch_from_store": ours[1][0] / least[0],
        "ratio_fc_epoch_of_processor_time": ours[0][1] / least[1],
        "ratio_fc_epoch_from_store_of_processor_time": ours[1][1] / least[1],
        "seconds_fc_sample": ours[1][0] / len(y),
    }


def bodies(model: str, seconds_fc_sample: float) -> dict[str, float]:
    """How many times as long a sample of two images takes through a body as through an epoch of fc."""
    import ceiling
    from pictures import write_jpegs
    from torchvision.transforms._presets import ImageClassification

    from featurecache.stageone.viewsetup import set_up_view

    options = argparse.Namespace(model=model, engine="openvino", precision="fp32", batch_size=None, workers=None)
    try:
        import openvino  # noqa: F401
    except ImportError:
        options.engine = "torch"
    with tempfile.TemporaryDirectory(prefix="bodies-") as name:
        folder = Path(name)
        write_jpegs(folder, IMAGES)
        setup = set_up_view(ceiling.configuration(folder, options), "image")
        own, _, _ = ceiling.run_extract(folder, options, IMAGES)
        transform = ImageClassification(crop_size=setup.size[0], resize_size=setup.preprocessing.resize or 256)
        module = ceiling.body_without_classifier(setup)
        loop = ceiling.Cost.of(IMAGES, lambda: ceiling.hand_written(module, folder / "images", 32, transform))
    return {
        "images_per_second_engine": 1 / own.wall,
        "images_per_second_loop": 1 / loop.wall,
        "ratio_epoch_through_engine_to_fc": 2 * own.wall / seconds_fc_sample,
        "ratio_epoch_through_loop_to_fc": 2 * loop.wall / seconds_fc_sample,
    }


XGBOOST = """
import hashlib, json, sys, time
sys.path.insert(0, {folder!r})
from pathlib import Path
import numpy as np
import xgboost as xgb
from feature_stores import open_dataset
from featurecache.heads.base import Fold, get_head
from featurecache.heads.xgboost import XGBoostHead, column_names

def resident(field):
    lines = open("/proc/self/status", encoding="ascii").read().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024

settings = {{"n_estimators": {rounds}, "max_bin": {max_bin}, "early_stopping_rounds": None, "nthread": 2}}
dataset = open_dataset(Path({path!r}), memory={memory!r})
y, names = dataset.target.values, column_names(dataset.blocks)
everything = np.arange(len(y))
for start in range(0, len(y), 4096):
    dataset.features.gather(everything[start : start + 4096])  # the page cache is warm for both
peak = [0]
import threading
def watch():
    while not done.wait(0.02):
        peak[0] = max(peak[0], resident("RssAnon:"))
done = threading.Event()
before = resident("RssAnon:")
threading.Thread(target=watch, daemon=True).start()
if {bare}:
    x, _ = dataset.numpy()
    start, cpu = time.perf_counter(), time.process_time()
    matrix = xgb.QuantileDMatrix(x, y, max_bin={max_bin}, feature_names=names)
    parameters = XGBoostHead(settings).settings.parameters(0, "cpu") | {{"objective": "binary:logistic"}}
    booster = xgb.train(parameters, matrix, {rounds}, evals=[(matrix, "train")], verbose_eval=False)
else:
    start, cpu = time.perf_counter(), time.process_time()
    fold = Fold(dataset.features, everything, dataset.target)
    booster = XGBoostHead(settings, memory=dataset.memory).fit(fold).booster
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
done.set()
trees = hashlib.sha256("".join(booster.get_dump(with_stats=True)).encode()).hexdigest()
print(json.dumps([seconds, peak[0] - before, trees, cpu]))
"""


def xgboost(path: Path, rounds: int, max_bin: int, turns: int) -> dict[str, Any]:
    """Time and peak memory of the head beside those of bare xgboost on a float32 array, and external memory.

    Bare and head take turns. Of times it is the median over the ratios of one turn each, and of peaks the largest.
    """
    found: dict[str, list[Any]] = {"bare": [], "head": [], "external": []}
    each = [("bare", True, "auto"), ("head", False, "auto")] * turns
    for name, bare, memory in (*each, ("external", False, 100_000_000)):
        code = XGBOOST.format(
            folder=str(Path(__file__).parent), path=str(path), rounds=rounds, max_bin=max_bin, bare=bare, memory=memory
        )
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        found[name].append(json.loads(done.stdout))
    seconds, peaks, trees, processor = (
        {name: [run[i] for run in runs] for name, runs in found.items()} for i in range(4)
    )
    ratios = np.divide(seconds["head"], seconds["bare"]).tolist()
    return {
        "seconds_xgboost_bare": seconds["bare"],
        "seconds_xgboost_head": seconds["head"],
        "ratio_xgboost_time": float(np.median(ratios)),
        "ratio_xgboost_processor_time": float(np.median(np.divide(processor["head"], processor["bare"]))),
        "bytes_peak_xgboost_bare": max(peaks["bare"]),
        "ratio_xgboost_memory": max(peaks["head"]) / max(peaks["bare"]),
        "ratio_xgboost_time_external": seconds["external"][0] / float(np.median(seconds["bare"])),
        "ratio_xgboost_processor_time_external": processor["external"][0] / float(np.median(processor["bare"])),
        "bytes_peak_xgboost_external": peaks["external"][0],
        "xgboost_same_trees": len({*trees["bare"], *trees["head"]}) == 1,
        "xgboost_same_trees_external": len({*trees["bare"], *trees["external"]}) == 1,
    }


def logistic(path: Path, rows: int) -> dict[str, float]:
    """How far the streamed fit ends from scikit-learn's, and how long both take."""
    dataset = open_dataset(path)
    fold = Fold(dataset.features, np.arange(rows), dataset.target.subset(np.arange(rows)))
    heads, seconds = [], []
    for memory in (None, 0):
        start = time.perf_counter()
        heads.append(get_head("logistic")({"tol": 1e-8}, memory=memory).fit(fold))
        seconds.append(time.perf_counter() - start)
    scores = [head.score_rows(dataset.features, fold.rows) for head in heads]
    return {
        "logistic_largest_difference_of_probabilities": float(np.abs(scores[0] - scores[1]).max()),
        "ratio_logistic_streamed_time": seconds[1] / seconds[0],
        "logistic_passes": heads[1].fitted_["passes"],
    }


def rounded(value: Any) -> Any:
    """To four digits, of a list each."""
    return [rounded(one) for one in value] if isinstance(value, list) else float(f"{value:.4g}")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--full", action="store_true", help="100,000 samples; 20 rounds and 256 bins of xgboost")
    parser.add_argument("--samples", type=int, default=40_000)
    parser.add_argument("--width", type=int, default=1024, help="of each of the two views")
    parser.add_argument("--rounds", type=int, default=20, help="of xgboost; default 20")
    parser.add_argument("--turns", type=int, default=5, help="of bare xgboost and the head, one after the other")
    parser.add_argument(
        "--max-bin", type=int, help="of xgboost; default 64: with few samples its histograms outweigh the rows"
    )
    parser.add_argument("--only", choices=["fc", "xgboost", "logistic"])
    parser.add_argument("--bodies", metavar="MODEL", help="of torchvision, to compare with fc")
    options = parser.parse_args()
    samples = 100_000 if options.full else options.samples
    bins = options.max_bin or (256 if options.full else 64)
    path = make_store(options.folder, samples, options.width)
    found: dict[str, Any] = {}
    if options.only in (None, "fc"):
        found |= fc(path)
        if options.bodies:
            found |= bodies(options.bodies, found["seconds_fc_sample"])
    if options.only in (None, "xgboost"):
        found |= xgboost(path, options.rounds, bins, options.turns)
    if options.only in (None, "logistic"):
        found |= logistic(path, min(samples, 10_000 if options.full else 4_000))
    found["load_average"] = os.getloadavg()[0]
    print(json.dumps({name: rounded(value) for name, value in found.items()}, indent=2))


if __name__ == "__main__":
    main()
