"""What the tests of stage two share: features written straight into a store, and commands in this process."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pytest
import torch
from plugin_joint import write_samples
from threadpoolctl import threadpool_limits

import featurecache as fc
from featurecache.cli import main
from featurecache.config import BodyConfig, ManifestConfig
from featurecache.data.manifest import read_manifest
from featurecache.evaluation.threshold import At
from featurecache.rundir.densepredictions import read_predictions
from featurecache.rundir.files import read_record
from featurecache.rundir.results import find_threshold, fold_metrics, measure
from featurecache.store.binding import CELL_SCHEMA, Binding
from featurecache.store.recipe import Recipe, content_key
from featurecache.store.records import StatRecord
from featurecache.store.store import FeatureStore

FAST = {
    "fc": ["--set", "epochs=4", "--set", "hidden=16", "--set", "lr=0.02"],
    "logistic": ["--set", "max_iter=200"],
    "xgboost": ["--set", "n_estimators=8", "--set", "max_depth=3", "--set", "max_bin=16", "--set", "nthread=1"],
}
TARGETS = {"binary": "label", "multiclass": "kind", "multilabel": "l0,l1,l2", "regression": "size"}
VIEWS = ("a", "b")
WIDTH = 6
LABELS = 40


class Done(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


def command(*words: Any) -> Done:
    """`featurecache WORDS` in this process, through its entry point."""
    out, err = io.StringIO(), io.StringIO()
    before, handler = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = ["featurecache", *(str(word) for word in words)]
    status = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            main()
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.argv = before
        signal.signal(signal.SIGTERM, handler)
        # formatwarning is the process's; a test must not leave it changed.
        warnings.formatwarning = FORMAT
    return Done(status, out.getvalue(), err.getvalue())


FORMAT = warnings.formatwarning


def installed(*words: Any, cwd: Path | None = None, **environment: str) -> Done:
    """`featurecache WORDS` as it is installed, in a process of its own."""
    plugins = str(Path(__file__).parent)
    done = subprocess.run(
        [str(Path(sys.executable).with_name("featurecache")), *(str(word) for word in words)],
        capture_output=True, text=True, check=False, cwd=cwd,
        env={**os.environ, "PYTHONPATH": plugins, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def samples(n: int, *, missing: float = 0.15, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a manifest of every kind of target; label 39 is never positive. View `a` is always there."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        labels = {f"l{k}": int((i + k) % (2 + k % 3) == 0) if rng.random() < 0.9 else "" for k in range(LABELS - 1)}
        rows.append(
            {
                "sample_id": f"s{i:03d}", "a": f"a{i}.png", "b": f"b{i}.png" if rng.random() >= missing else "",
                "label": ("no", "yes")[i % 2], "kind": "pqr"[i % 3], "size": f"{i % 7 + rng.normal() / 9:.3f}",
                "fold": ("train", "train", "valid", "test")[i % 4], "patient": f"p{i // 2}", **labels,
                f"l{LABELS - 1}": 0,
            }
        )  # fmt: skip
    return rows


def features_of(i: int, view: str) -> np.ndarray:
    """Six values that tell what sample `i` is, in part."""
    rng = np.random.default_rng([i, VIEWS.index(view)])
    signal_ = [i % 2, i % 3 == 0, i % 3 == 1, (i % 7) / 3, i % 4 == 0, 1] if view == "a" else [i % 2, 0, 0, 0, i % 5, 1]
    return (np.array(signal_, dtype=float) + 0.3 * rng.normal(size=WIDTH)).astype(np.float32)


def key_of(name: str) -> bytes:
    return content_key("file", "{}", hashlib.sha256(name.encode()).digest())


def recipe(taps: tuple[str, ...] = ("penultimate@none",), **fields: Any) -> Recipe:
    base = {
        "schema": 1, "reader": {"name": "image", "version": 1, "parameters": {}}, "preprocessing": {"crop": 32},
        "body": {"architecture": "torchvision/resnet18", "weights": "w", "program": "p"}, "engine": "torch",
        "precision": "fp32", "storage_dtype": "float32",
    }  # fmt: skip
    made = tuple({"name": tap, "tap": tap.partition("@")[0], "pool": tap.partition("@")[2]} for tap in taps)
    return Recipe({**base, **fields}, made)


def write_store(
    folder: Path,
    n: int = 80,
    *,
    missing: float = 0.15,
    taps: tuple[str, ...] = ("penultimate@none",),
    state: dict[str, str] | None = None,
    rows: list[dict[str, Any]] | None = None,
    replace: dict[str, Any] | None = None,
    codec: str = "none",
    **fields: Any,
) -> Path:
    """A store with the dataset `m` of two views, whose image files don't exist; returns its path.

    Args:
        folder: `m.csv` goes there, and `store`.
        n: samples.
        missing: share of them that lack view b.
        taps: of the recipe; a later one holds the features of the first times 2, 3, ...
        state: image name -> `failed` or `pending`; such have no features.
        rows: of the manifest, default `samples(n)`.
        replace: options of the manifest.
        codec: of the chunks.
        fields: of the recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, state = rows or samples(n, missing=missing), state or {}
    options = {"views": {view: view for view in VIEWS}, **(replace or {})}
    config = ManifestConfig.create({"manifest": write_table(folder / "m.csv", rows), **options})
    manifest = read_manifest(config, images=False)
    made = recipe(taps, **fields)
    cells = manifest.cells
    states = ["absent" if value is None else state.get(value, "done") for value in cells["value"]]
    keys = [None if value is None or state.get(value) == "pending" else key_of(value) for value in cells["value"]]
    with FeatureStore(folder / "store", write=True) as store:
        shapes = {tap: ((WIDTH,), ("features",)) for tap in taps}
        store.add_recipe(made, shapes, rows_per_chunk=16, codec=codec)
        found = zip(keys, cells["value"], cells["view"], states, strict=True)
        done = list({key: (key, value, view) for key, value, view, now in found if now == "done"}.values())
        values = np.stack([features_of(int("".join(filter(str.isdigit, value))), view) for _, value, view in done])
        packed = np.frombuffer(b"".join(key for key, _, _ in done), np.uint8).reshape(-1, 32)
        with store.appender(made.id) as appender:
            appender.append(packed, {tap: values * (k + 1) for k, tap in enumerate(taps)})
        store.add_failures(
            made.id, [(key_of(value), "image/1", "broken") for value, what in state.items() if what == "failed"]
        )
        present = cells.filter(pl.col("value").is_not_null() & ~pl.col("value").is_in([k for k, s in state.items()
                                                                                     if s == "pending"]))  # fmt: skip
        store.remember_payloads(
            [
                StatRecord(place, 1, 1, 1, 1, 10**12, hashlib.sha256(value.encode()).digest())
                for place, value in present.select("location", "value").iter_rows()
            ]
        )
        bound = cells.select("sample", "view", "ordinal").with_columns(
            pl.Series("key", keys, dtype=CELL_SCHEMA["key"]), pl.Series("state", states, dtype=CELL_SCHEMA["state"])
        )
        body = BodyConfig.create({"body": dict.fromkeys(VIEWS, "torchvision/resnet18")}).model_dump(mode="json")
        about = {"manifest": config.model_dump(mode="json"), "body": body, "seed": None}
        store.bind(
            Binding(
                "m", str(manifest.path), manifest.digest, manifest.table, about, dict.fromkeys(manifest.views, made.id),
                config.multi, bound,
            )
        )  # fmt: skip
    return folder / "store"


def hashes(folder: Path) -> dict[str, str]:
    """Every file below a folder, by its SHA-256."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


TWO = {"a": "a", "b": "b"}
TINY = {"body": "plugin_joint:tiny", "precision": "fp32"}
TRUST = {"body": {"trust_factory": ("plugin_joint:tiny",)}}
HEADS = {"head": "label", "kind": "kind", "labels": ["first", "second"], "size": "size"}


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """One thread, which is faster for what is tiny, and no reports: they are tested elsewhere."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, threadpool_limits(1):
        patch.setattr("featurecache.rundir.results.write_report", lambda directory, record: None)
        patch.setattr(import_module("featurecache.evaluate"), "write_evaluation_report", lambda *words, **options: None)
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


def write_home(folder: Path, runs: Iterable[str]) -> Path:
    """48 samples with images in `data`, 12 in `new`, features in `cache`, and `runs/NAME`: of HEADS, or `joint`."""
    data = write_samples(folder / "data", 48, missing=0.1)
    write_samples(folder / "new", 12, seed=9, missing=0.3)
    fc.extract(data, store=folder / "cache", views=TWO, **TINY)
    for name in runs:
        if name == "joint":
            fc.finetune_joint(
                data, views=TWO, **TINY, target="label", out=folder / "runs/joint", epochs=1, freeze_epochs=0,
                workers=1, settings={"hidden": [8]}, bootstrap=0,
            )  # fmt: skip
        else:
            dataset = fc.FeatureDataset(folder / "cache", dataset="samples", target=HEADS[name])
            fc.fit_head(dataset, head="logistic", out=folder / "runs" / name, bootstrap=10)
    return folder


def metrics_from_predictions(path: str | Path) -> dict[str, Any]:
    """metrics.json, computed again from predictions.csv (and the bootstrap's size and seed) of a run."""
    path = Path(path)
    settings = json.loads((path / "metrics.json").read_text(encoding="utf-8"))["bootstrap"]
    record = read_record(path)
    predictions = read_predictions(path, record)
    threshold = record.get("threshold") or {}
    if not record.get("cv"):  # there the scores of the folds' validation rows, on which they were chosen, are not kept
        rule = str(threshold.get("rule", ""))
        threshold = find_threshold(predictions, At.parse(rule) if "=" in rule else None)
    found = measure(predictions, threshold, bootstrap=settings["n"], seed=settings["seed"])
    return {**found, "cv": fold_metrics(predictions, threshold)} if record.get("cv") else found
