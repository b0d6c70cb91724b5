"""Does tuning the bodies pay? Cached head against joint training, on two sets of two views and several divisions.

On the shipped emoji (drawn by Google and by Twitter) and on the left and right halves of scikit-learn's digits, with
the shipped SqueezeNet and one grouped division per seed: an fc head on cached features; and from it, jointly tuned,
both bodies (concat), one body for both views (shared), and what lies above a module (prefix). Spatial fusion is fitted
on cached maps, then tuned.

    python benchmarks/joint.py --seeds 5 --out joint.jsonl

Two parts of each set, which share no group, are used. On the one both bodies are trained with every one of CANDIDATES.
The one with the lowest validation log loss is taken for all ways of training on the other, which makes the table: no
figure of a test sample decides anything. A line of JSON is added to the file as soon as a training has ended, so that
the same command goes on where it was stopped. FILE.work holds stores and runs, and can be deleted.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line sets it, before torch is loaded

import numpy as np

import featurecache as fc
from featurecache.data.shipped import shipped_path
from featurecache.run import Run

ABOVE = "features.8"  # of SqueezeNet's thirteen: four of its eight Fire modules learn above it
MAPS = "features:rows"
BLOCK = 30  # digits that stay together: they come in the order in which people wrote them, whom nothing names
FIELDS = (
    "test_accuracy", "test_log_loss", "best_epoch", "seconds_epoch", "seconds", "seconds_processor",
)  # fmt: skip
RATES = (1e-4, 3e-4, 1e-3)  # of the head: the second is the default of a warm start; of the bodies a tenth of it to all
EPOCHS = 6
SETS: Mapping[str, Mapping[str, Any]] = {
    "emoji": {"views": ("google", "twitter"), "target": "category", "augment": (("flip",), ("crop", "flip"))},
    "digits": {"views": ("left", "right"), "target": "digit", "augment": ((),)},  # mirrored it is another one, or none
}
SIZE = 64
CANDIDATES: Mapping[str, Sequence[dict[str, Any]]] = {
    name: [
        {"epochs": EPOCHS, "lr": lr, "body_lr": [float(f"{lr / 10:g}"), lr], "augment": list(augment)}
        for augment in options["augment"]
        for lr in RATES
    ]
    for name, options in SETS.items()
}
TRIED = "tuned, concat"  # with every candidate
# By name the cached head that it starts from (None: it is one), and what is told to it besides.
WAYS: Mapping[str, tuple[str | None, Mapping[str, Any]]] = {
    "cached head": (None, {"tap": "penultimate@avg"}),
    "cached head, spatial": (None, {"tap": MAPS.replace(":", "@"), "settings": {"fusion": "spatial"}}),
    "tuned, concat": ("cached head", {}),
    "tuned, shared body": ("cached head", {"share_bodies": "all"}),
    "tuned above a module": ("cached head", {"train_from": ABOVE, "augment": ()}),
    "tuned, spatial": ("cached head, spatial", {"fusion": "spatial"}),
}


def write_digits(folder: Path, part: str, n: int | None) -> Path:
    """The left and right half of digits as PNG files, and their manifest."""
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    rows = []
    for number in np.arange(*{"report": (0, 600), "choice": (900, 1500)}[part])[:n].tolist():
        pixels = (data.images[number] * 255 / 16).astype(np.uint8)
        row = {"sample_id": number, "digit": f"d{data.target[number]}", "group": f"b{number // BLOCK}"}
        for view, half in {"left": pixels[:, :4], "right": pixels[:, 4:]}.items():
            row[view] = f"{number}-{view}.png"
            Image.fromarray(np.ascontiguousarray(half)).save(folder / row[view])
        rows.append(row)
    return write_table(folder / "digits.csv", rows)


def write_emoji(folder: Path, part: str, n: int | None) -> Path:
    """A manifest of the shipped emoji of 55 of a hundred groups, or of 30 others."""
    with shipped_path("emoji/manifest.csv").open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    groups = sorted({row["group"] for row in rows})
    place = dict(zip(groups, np.random.default_rng(0).permutation(len(groups)) / len(groups), strict=True))
    low, high = {"report": (0.0, 0.55), "choice": (0.7, 1.0)}[part]
    rows = [row for row in rows if low <= place[row["group"]] < high]
    few = np.linspace(0, len(rows) - 1, min(n or len(rows), len(rows))).astype(int)
    return write_table(folder / "emoji.csv", [rows[i] for i in few])


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


class Set:
    """One part of a set, its features in a store, and the ways of training on one division of it.

    Args:
        name: of the set.
        part: `report` or `choice`.
        folder: for store and runs.
        n: about so many samples, for a trial.
    """

    def __init__(self, name: str, part: str, folder: Path, n: int | None) -> None:
        self.name, self.options, self.folder = name, SETS[name], folder
        folder.mkdir(parents=True, exist_ok=True)
        self.root = folder if name == "digits" else shipped_path("emoji/manifest.csv").parent
        self.manifest = (write_digits if name == "digits" else write_emoji)(folder, part, n)
        self.seconds = 0.0

    def extract(self) -> None:
        """Features of both views, unless the store has them."""
        summary = fc.extract(
            self.manifest, store=self.folder / "store", name=self.name, tap=["penultimate", MAPS], root=self.root,
            body="torchvision/squeezenet1_1", weights="shipped", image_size=SIZE, resize_mode="squash",
            views={view: view for view in self.options["views"]},
        )  # fmt: skip
        self.seconds = summary.seconds["seconds_total"]

    def head(self, seed: int, out: Path, *, tap: str, **options: Any) -> Run:
        """An fc head on cached features."""
        dataset = fc.FeatureDataset(
            self.folder / "store", dataset=self.name, target=self.options["target"], tap={"*": tap}
        )
        try:
            return fc.fit_head(
                dataset, head="fc", seed=seed, bootstrap=0, images="none", out=out, overwrite=True, **options
            )
        finally:
            dataset.store.close()

    def train(self, key: str, seed: int, settings: Mapping[str, Any]) -> Run:
        """One way of training on one division; `settings` are those of joint training."""
        start, more = WAYS[key][0], dict(WAYS[key][1])
        if start is None:
            return self.head(seed, self.run(key, seed), **more)
        if "train_from" in more:
            more["store"] = self.folder / "store"
        fixed = {"view_dropout": 0.0, "batch_size": 32, "bootstrap": 0, "images": "none", "root": self.root}
        return fc.finetune_joint(
            self.manifest, init=self.run(start, seed), out=self.run(key, seed), overwrite=True, seed=seed,
            **{**fixed, **settings, **more},
        )  # fmt: skip

    def run(self, key: str, seed: int) -> Path:
        """Where the run of one way of training lies."""
        return self.folder / f"seed{seed}" / key.replace(",", "").replace(" ", "-")

    def begin(self, key: str, seed: int) -> None:
        """Fit the head that a way of training starts from, where an earlier call has not."""
        start = WAYS[key][0]
        if start is not None and not (self.run(start, seed) / "run.json").is_file():
            self.train(start, seed, {})


def figures(run: Run, started: float, processor: float) -> dict[str, float]:
    """What a run is compared by."""
    history = run.history
    passes = history["seconds"].to_list() if "seconds" in history.columns else []
    names = ("accuracy", "log_loss")
    found = {f"{split}_{name}": run.metrics[split][name] for split in ("valid", "test") for name in names}
    best = float(run.record.get("best_epoch", -1))
    return {
        **found, "best_epoch": best, "seconds_epoch": float(np.median(passes[1:] or [0.0])),
        "seconds": time.perf_counter() - started, "seconds_processor": time.process_time() - processor,
    }  # fmt: skip


def known_lines(path: Path) -> list[dict[str, Any]]:
    """What the file holds; a line that a kill cut off is dropped."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("}\n")]
    if len(whole) < len(lines):
        path.write_text("".join(whole), encoding="utf-8")
    return [json.loads(line) for line in whole]


def best(name: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The candidate with the lowest log loss on validation samples of the part that is for choosing."""
    tried = [line for line in lines if line["part"] == "choice" and line["set"] == name and line["settings"]]
    found: dict[str, Any] = min(tried, key=lambda line: float(line["valid_log_loss"]))["settings"]
    return found


def jobs(
    sets: Sequence[str], seeds: int, lines: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, str, int, str, dict[str, Any]]]:
    """(part, set, seed, way, settings of joint training): first what is chosen by, then all sets seed by seed."""
    for name in sets:
        yield "choice", name, 0, "cached head", {}
        yield from (("choice", name, 0, TRIED, settings) for settings in CANDIDATES[name])
    for seed in range(seeds):
        for name in sets:
            chosen = best(name, lines)
            yield from (("report", name, seed, way, chosen if start else {}) for way, (start, _) in WAYS.items())


def choice_table(name: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """What every candidate gave on validation samples."""
    rows = [f"{name}, to choose by | validation accuracy | validation log loss | best epoch", "--- | --- | --- | ---"]
    for line in lines:
        if line["part"] == "choice" and line["set"] == name:
            told = ", ".join(f"{key} {value}" for key, value in line["settings"].items())
            figures = f"{line['valid_accuracy']:.3f} | {line['valid_log_loss']:.3f} | {line['best_epoch']:.0f}"
            rows.append(f"{told or line['way']} | {figures}")
    return "\n".join(f"| {row} |" for row in rows)


def table(name: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """Means and standard deviations over the seeds, and the paired difference to the cached head."""
    ways: dict[str, dict[int, Mapping[str, Any]]] = {}
    for line in lines:
        if line["part"] == "report" and line["set"] == name:
            ways.setdefault(str(line["way"]), {})[line["seed"]] = line
    if "cached head" not in ways:
        return ""
    base = ways["cached head"]
    rows = [
        f"{name}, {len(base)} divisions | test accuracy | difference to the cached head | test log loss | "
        "an epoch beat its start (validation) | seconds an epoch | seconds | processor seconds",
        "--- | --- | --- | --- | --- | --- | --- | ---",
    ]
    for key, found in ways.items():
        seeds = sorted(found.keys() & base.keys())
        values = {field: np.array([found[seed][field] for seed in seeds]) for field in FIELDS}
        gain = values["test_accuracy"] - np.array([base[seed]["test_accuracy"] for seed in seeds])
        own, tuned = key == "cached head", bool((values["best_epoch"] >= 0).all())
        better = f"{int((values['best_epoch'] > 0).sum())} of {len(seeds)}" if tuned else ""
        rows.append(
            f"{key} | {spread(values['test_accuracy'])} | {'' if own else spread(gain, '+')} | "
            f"{spread(values['test_log_loss'])} | {better} | "
            f"{values['seconds_epoch'].mean():.1f} | {values['seconds'].mean():.1f} | "
            f"{values['seconds_processor'].mean():.1f}"
        )
    return "\n".join(f"| {row} |" for row in rows)


def spread(values: np.ndarray[Any, Any], sign: str = "") -> str:
    """Mean ± standard deviation."""
    return f"{values.mean():{sign}.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="divisions")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--samples", type=int, help="about so many, for a trial")
    parser.add_argument("--out", type=Path, default=Path("joint.jsonl"), help="where figures are added")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further training after so long")
    arguments = parser.parse_args()
    lines, begun = known_lines(arguments.out), time.perf_counter()
    done = {identity(line) for line in lines}
    work = arguments.out.with_name(f"{arguments.out.name}.work")
    sets: dict[tuple[str, str], Set] = {}
    for part, name, seed, way, settings in jobs(arguments.sets, arguments.seeds, lines):
        line: dict[str, Any] = {"part": part, "set": name, "seed": seed, "way": way, "settings": settings}
        if identity(line) in done:
            continue
        if time.perf_counter() - begun > 60 * arguments.minutes:
            break
        if (part, name) not in sets:
            sets[part, name] = Set(name, part, work / part / name, arguments.samples)
            sets[part, name].extract()
        one = sets[part, name]
        one.begin(way, seed)
        started, processor = time.perf_counter(), time.process_time()
        found = figures(one.train(way, seed, settings), started, processor)
        line |= {key: value for key, value in found.items() if part == "report" or not key.startswith("test_")}
        if way == "cached head":
            line["seconds_extract"] = one.seconds
        with arguments.out.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
        lines.append(line)
        print(json.dumps(line), flush=True)
    made = [text for name in arguments.sets for text in (choice_table(name, lines), table(name, lines))]
    print("\n\n".join(filter(None, made)))


def identity(line: Mapping[str, Any]) -> str:
    """What tells one training from another."""
    return json.dumps([line[key] for key in ("part", "set", "seed", "way", "settings")])


if __name__ == "__main__":
    main()
