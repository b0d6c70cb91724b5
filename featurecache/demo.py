"""The embedded example from end to end: emoji that were drawn twice, told apart by category from both drawings."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from featurecache.calls import also, journaled
from featurecache.config import ExtractConfig, JointConfig
from featurecache.data.shipped import shipped_path
from featurecache.dataset import FeatureDataset
from featurecache.errors import FeatureCacheError, InputError
from featurecache.evaluation.bootstrap import paired_differences
from featurecache.extract import Summary, extract
from featurecache.fit import fit_head
from featurecache.joint.finetune import finetune_joint
from featurecache.progress import Reporter, Silent
from featurecache.reporting.overview import Row, Sample, png_uri, write_overview
from featurecache.run import Run, load_run
from featurecache.rundir.results import to_target

VIEWS = ("google", "twitter")
TARGET = "category"
DATASET = "emoji"
BODY = {"body": "torchvision/squeezenet1_1", "weights": "shipped", "image_size": 96}  # emoji are 64 px wide
JOINT = {"epochs": 2, "freeze_epochs": 0, "lr": 2e-4, "body_lr": 1e-4, "batch_size": 32, "augment": ("flip",)}
METRIC = "accuracy"
RESAMPLES = 1000


@dataclass(frozen=True)
class Model:
    """One line of the table: how it is fitted, and on which views."""

    name: str
    title: str
    head: str
    views: tuple[str, ...]
    settings: Mapping[str, Any]


MODELS = (
    Model("logistic-google", "Google's drawing alone, logistic", "logistic", ("google",), {"C": 0.01}),
    Model("logistic-twitter", "Twitter's drawing alone, logistic", "logistic", ("twitter",), {"C": 0.01}),
    Model("logistic", "both, logistic", "logistic", VIEWS, {"C": 0.01}),
    Model("fc", "both, fc", "fc", VIEWS, {}),
    Model("xgboost", "both, xgboost", "xgboost", VIEWS, {"max_bin": 32}),
)
JOINT_NAME, JOINT_TITLE = "joint", "both, bodies and fc fine-tuned jointly"


@dataclass(frozen=True)
class DemoResult:
    """What the demo made: stage one's summary, the table, the report and how much was taken over from before."""

    extraction: Summary
    rows: list[Row]
    report: Path
    runs_reused: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Flat figures, and the table."""
        summary = self.extraction
        return {
            "samples": summary.samples,
            "images": summary.images,
            "computed": summary.computed,
            "reused": summary.reused,
            "runs_reused": self.runs_reused,
            "seconds_total": round(self.seconds, 1),
            "table": [row.to_json() for row in self.rows],
        }


@journaled()
def run_demo(out: str | Path, reporter: Reporter | None = None) -> DemoResult:
    """The embedded example: extract two views, fit three heads and each view alone, fine-tune jointly, compare.

    Offline, minutes on two cores. Whatever an earlier call left in `out` and still holds is taken over.

    Raises:
        InputError: `out` is something else than a demo.
    """
    start = time.perf_counter()
    reporter, out = reporter or Silent(), Path(out)
    also(out / "store")
    store, runs = out / "store", out / "runs"
    if out.exists() and not store.exists() and any(out.iterdir()):
        raise InputError(f"--out {out}: exists and holds something else than a demo")
    manifest = shipped_path("emoji/manifest.csv")
    views = {view: view for view in VIEWS}
    config = ExtractConfig.create({"manifest": manifest, "store": store, "name": DATASET, "views": views, **BODY})
    summary = extract(config, reporter)
    fitted: dict[str, Run] = {}
    reused = 0
    for model in MODELS:
        dataset = FeatureDataset(store, dataset=DATASET, target=TARGET, views=model.views)
        key = {"binding": dataset.binding.digest, "settings": dict(model.settings)}
        kept = reusable(runs / model.name, key)
        reused += kept is not None
        fitted[model.name] = kept or fit_head(
            dataset,
            head=model.head,
            out=runs / model.name,
            settings=model.settings,
            overwrite=True,
            bootstrap=RESAMPLES,
            config={"demo": key},
            command="featurecache demo",
            reporter=reporter,
        )
        dataset.store.close()
    joint, kept_joint = tune(manifest, fitted["fc"], runs / JOINT_NAME, reporter)
    fitted[JOINT_NAME] = joint
    rows = make_rows(fitted)
    report = write_overview(
        out / "report.html",
        title="Emoji, drawn twice",
        lead=(
            f"{summary.samples:,} emoji of seven categories, each as Google and as Twitter drew it, seen by "
            "SqueezeNet 1.1. Near-identical signs form a group, and groups are never torn apart by the split."
        ),
        rows=rows,
        samples=pick_samples(manifest),
        footer="Noto Emoji: Google, Apache-2.0. Twemoji: Twitter and contributors, CC-BY 4.0.",
    )
    return DemoResult(summary, rows, report, reused + kept_joint, time.perf_counter() - start)


def pick_samples(manifest: Path) -> list[Sample]:
    """Two samples of each category, for the page."""
    table = pl.read_csv(manifest).group_by(TARGET, maintain_order=True).head(2)
    return [
        Sample(row["sample_id"], row[TARGET], tuple((view, png_uri(manifest.parent / row[view])) for view in VIEWS))
        for row in table.iter_rows(named=True)
    ]


def tune(manifest: Path, fc: Run, path: Path, reporter: Reporter) -> tuple[Run, bool]:
    """The joint run that starts from the fc head; taken over where that head is the one it started from."""
    key = {"init": fc.files["head.safetensors"], **JOINT}
    mark = path.with_suffix(".key")
    kept = load_kept(path) if mark.exists() and mark.read_text(encoding="utf-8") == repr(key) else None
    if kept is not None:
        return kept, True
    config = JointConfig.create({"manifest": manifest, "init": fc.path, "out": path, "overwrite": True, **JOINT})
    run = finetune_joint(config, command="featurecache demo", reporter=reporter)
    mark.write_text(repr(key), encoding="utf-8")
    return run, False


def reusable(path: Path, key: Mapping[str, Any]) -> Run | None:
    """The run at `path` if it is whole and was made from the same features by the same settings."""
    run = load_kept(path)
    return run if run is not None and run.config.get("demo") == key else None


def load_kept(path: Path) -> Run | None:
    """A run that an earlier call left, or None where there is none or it is damaged."""
    try:
        return load_run(path)
    except FeatureCacheError:
        return None


def make_rows(fitted: Mapping[str, Run]) -> list[Row]:
    """Test accuracy with its interval, and the paired difference to the view that is better alone (by validation)."""
    singles = [model.name for model in MODELS if len(model.views) == 1]
    best = max(singles, key=lambda name: float(fitted[name].metrics["valid"][METRIC]))
    reference = fitted[best].arrays.of("test")
    titles = {model.name: model.title for model in MODELS} | {JOINT_NAME: JOINT_TITLE}
    rows = []
    for name, run in fitted.items():
        part = run.arrays.of("test")
        figures = run.metrics["test"]
        difference = None
        if name != best:
            found = paired_differences(
                to_target(part), part.scores, reference.scores, part.groups, n=RESAMPLES, metrics=[METRIC]
            )[METRIC]
            difference = (found["difference"], found["low"], found["high"])
        low, high = figures["intervals"][METRIC]
        rows.append(
            Row(
                title=titles[name],
                run=f"runs/{name}",
                n=int(figures["n"]),
                value=float(figures[METRIC]),
                low=float(low),
                high=float(high),
                difference=difference,
                reference=name == best,
            )
        )
    return rows
