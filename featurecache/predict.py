"""Applies a run to new samples: head runs through the cache, joint runs by a live forward pass."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurecache.bodies.registry import FACTORY, trusted_factories
from featurecache.config import BodyConfig, ExtractConfig, ManifestConfig, for_view
from featurecache.data.targets import Target
from featurecache.dataset import FeatureDataset
from featurecache.errors import InputError
from featurecache.extract import extract
from featurecache.fit import HeadRun, check_recipes
from featurecache.joint.predict import predict_joint
from featurecache.progress import Reporter, Silent
from featurecache.results import make_predictions
from featurecache.run import Run, load_run
from featurecache.store.recipe import Recipe

TABLES = (".csv", ".parquet", ".pq")
FILES_ID = "sample_id"


@dataclass(frozen=True)
class Scored:
    """What a run says about new samples.

    Attributes:
        sample_ids: (n,) text.
        scores: (n, classes) or (n, labels) probabilities, or (n, targets) values.
        table: the manifest's rows of these samples.
        present: (n, n_views) bool.
        failures: cells that could not be read: sample_id, view, path, error.
        computed: images that went through a body.
        reused: images whose features were in the store.
        notes: what a user should know (features of another precision, say).
    """

    sample_ids: NDArray[np.str_]
    scores: NDArray[np.float64]
    table: pl.DataFrame
    present: NDArray[np.bool_]
    failures: list[dict[str, str]]
    computed: int
    reused: int
    notes: list[str]


@dataclass(frozen=True)
class NewSamples:
    """Where new samples come from, and what differs from how the run's own samples were read.

    Attributes:
        sources: one manifest (table or folder), or image files; for several views `VIEW=FILE`.
        store: where features are cached; None computes them into a temporary store.
        manifest: options of ManifestConfig that differ from the run's.
        body: options of BodyConfig that differ: the same bodies found at another place.
        device: where bodies run.
        batch_size: images at a time, or `auto`.
        workers: threads that read and decode, or `auto`.
    """

    sources: tuple[str, ...]
    store: Path | None = None
    manifest: Mapping[str, Any] | None = None
    body: Mapping[str, Any] | None = None
    device: str = "auto"
    batch_size: int | str = "auto"
    workers: int | str = "auto"


def score_samples(run: Run, new: NewSamples, reporter: Reporter | None = None) -> Scored:
    """Score new samples with a run.

    Raises:
        InputError: the manifest is not valid, or the bodies can't be had.
        RecipeMismatchError: the bodies are not those that the head was fitted on.
    """
    reporter = reporter or Silent()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="featurecache-")))
        manifest = manifest_options(run, new, scratch)
        if run.kind == "joint":
            return score_joint(run, manifest, new, reporter)
        return score_cached(HeadRun(run.path, run.record), manifest, new, scratch, reporter)


def score_cached(
    run: HeadRun, manifest: Mapping[str, Any], new: NewSamples, scratch: Path, reporter: Reporter
) -> Scored:
    """Features through the cache, then the head."""
    config = extract_config(run, manifest, new, scratch / "store")
    summary = extract(config, reporter)
    views = list(run.views)
    dataset = FeatureDataset(config.store, dataset=summary.dataset, views=views, tap=head_taps(run))
    try:
        notes = check_recipes(run, dataset)
        scores = run.head.score_rows(dataset.features)
    finally:
        dataset.store.close()
    failures = summary.failures + unscored(config, dataset, summary.failures)
    return Scored(
        dataset.sample_ids,
        scores,
        dataset.table,
        dataset.present,
        failures,
        summary.computed,
        summary.reused,
        notes,
    )


def score_joint(run: Run, manifest: Mapping[str, Any], new: NewSamples, reporter: Reporter) -> Scored:
    """Images through the tuned network."""
    trust = tuple((new.body or {}).get("trust_factory", ()))
    found = predict_joint(
        run,
        ManifestConfig.create(manifest),
        device=new.device,
        batch_size=new.batch_size,
        workers=new.workers,
        trust=trust,
        reporter=reporter,
    )
    return Scored(
        found.sample_ids,
        found.scores,
        found.table,
        found.present,
        found.failures,
        computed=int(found.present.sum()),
        reused=0,
        notes=[],
    )


def manifest_options(run: Run, new: NewSamples, scratch: Path) -> dict[str, Any]:
    """How the new samples are read: as the run's own were, unless said otherwise. Files get a manifest of their own."""
    recorded = {key: value for key, value in run.record["manifest_config"].items() if key != "root"}
    if recorded["views"]:
        recorded["views"] = {view: column for view, column in recorded["views"].items() if view in run.views}
    given = {key: value for key, value in (new.manifest or {}).items() if value}
    if len(new.sources) == 1 and is_table(new.sources[0]):
        return {**recorded, **given, "manifest": new.sources[0]}
    path = write_file_manifest(new.sources, run.views, scratch / "files.csv")
    own = {
        "layout": "wide",
        "views": {view: view for view in run.views},
        "view_column": None,
        "path_column": None,
        "id": FILES_ID,
        "box": {},
        "frame": {},
        "flip_if": {},
        "allow_outside": True,
    }
    return {**recorded, **own, "manifest": path}


def is_table(source: str) -> bool:
    """Whether a source is a manifest rather than an image file."""
    return Path(source).is_dir() or Path(source).suffix.lower() in TABLES


def write_file_manifest(sources: Sequence[str], views: Sequence[str], path: Path) -> Path:
    """A manifest for single files: one a sample, or `VIEW=FILE` where the run has several views.

    The k-th file of each view belongs to the k-th sample.

    Raises:
        InputError: files without a view where there are several, or an unknown view.
    """
    files: dict[str, list[str]] = {view: [] for view in views}
    for source in sources:
        view, equals, file = source.partition("=")
        if equals and view in files:
            files[view].append(file)
        elif len(views) == 1:
            files[views[0]].append(source)
        else:
            raise InputError(
                f"{source!r}: this run has the views {', '.join(views)}, so files are given as "
                f"{' '.join(f'{view}=FILE' for view in views)}, once per sample"
            )
    count = max(len(given) for given in files.values())
    with open(path, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow([FILES_ID, *views])
        for row in range(count):
            cells = [files[view][row] if row < len(files[view]) else "" for view in views]
            name = next(cell for cell in cells if cell)
            writer.writerow([name, *(str(Path(cell).resolve()) if cell else "" for cell in cells)])
    return path


def extract_config(run: HeadRun, manifest: Mapping[str, Any], new: NewSamples, scratch: Path) -> ExtractConfig:
    """Stage one as it was for the run's own samples, over new ones."""
    body = {key: value for key, value in run.record["body_config"].items() if key in BodyConfig.model_fields}
    given = {key: value for key, value in (new.body or {}).items() if value}
    body = {**body, **given, "trust_factory": given.get("trust_factory", ())}
    check_trusted(run, body, given)
    recipes = list(run.view_recipes.values())
    taps = {
        view: [{"module": tap["tap"], "pool": tap["pool"]} for tap in recipe.taps]
        for view, recipe in run.view_recipes.items()
    }
    stem = Path(new.sources[0]).stem if len(new.sources) == 1 else "files"
    return ExtractConfig.create(
        {
            **manifest,
            **body,
            "seed": run.record["body_config"].get("seed"),
            "tap": taps,
            "store": new.store or scratch,
            "name": f"predict-{stem}",
            "replace": True,
            "engine": common(recipes, "engine", "auto"),
            "precision": common(recipes, "precision", "auto"),
            "store_dtype": common(recipes, "storage_dtype", "float32"),
            "device": new.device,
            "batch_size": new.batch_size,
            "workers": new.workers,
        },
        source=str(run.path),
    )


def common(recipes: Sequence[Recipe], field: str, otherwise: str) -> str:
    """The value that all recipes hold for a field."""
    values = {str(recipe.fields[field]) for recipe in recipes}
    return values.pop() if len(values) == 1 else otherwise


def check_trusted(run: Run, body: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse a factory that only run.json names: nothing that data names is imported.

    Raises:
        InputError: says how to allow it.
    """
    typed = set(given.get("body", {}).values()) if isinstance(given.get("body"), Mapping) else set()
    allowed = trusted_factories(tuple(body["trust_factory"])) | typed
    for view in run.views:
        name = for_view(body["body"], view, "")
        if FACTORY.fullmatch(name) and name not in allowed:
            raise InputError(
                f"{run.path}: names the factory {name!r} as its body. Nothing was imported. If you know and trust that "
                f"code, repeat its name: --trust-factory {name}"
            )


def head_taps(run: HeadRun) -> tuple[str, ...]:
    """Names of the taps that the head was fitted on."""
    return tuple(dict.fromkeys(block.tap for block in run.head.blocks_))


def unscored(config: ExtractConfig, dataset: FeatureDataset, failures: list[dict[str, str]]) -> list[dict[str, str]]:
    """Samples without any view: they get no prediction, so they are listed."""
    listed = {entry["sample_id"] for entry in failures}
    scored = set(dataset.sample_ids.tolist())
    names = [str(name) for name in dataset.binding.table["sample_id"].to_list()]
    return [
        {"sample_id": name, "view": "", "path": "", "error": "has none of the views"}
        for name in names
        if name not in scored and name not in listed
    ]


def prediction_table(run: Run, scored: Scored) -> pl.DataFrame:
    """sample_id, views, prediction and a column per class or label, as predictions.csv has them."""
    n = len(scored.sample_ids)
    if run.classes:
        values: NDArray[Any] = np.full(n, -1, dtype=np.int64)
    else:
        values = np.full((n, len(run.targets)), np.nan)
    target = Target(run.task, run.targets, run.classes, values)  # type: ignore[arg-type]
    made = make_predictions(
        target, scored.scores, sample_ids=scored.sample_ids, views=run.views, present=scored.present
    )
    table = made.table(run.threshold["value"] if run.threshold else None)
    dropped = [name for name in table.columns if name in ("group", "split") or name.partition(":")[0] == "target"]
    return table.drop(dropped)


def predict(
    path: str | Path, new: NewSamples, out: str | Path, reporter: Reporter | None = None
) -> tuple[Scored, Path]:
    """Score new samples and write the predictions to a .csv or .parquet file.

    Raises:
        InputError: the file is of another kind; see `score_samples`.
    """
    out = Path(out)
    if out.suffix.lower() not in TABLES:
        raise InputError(f"--out {out}: write .csv or .parquet")
    run = load_run(path)
    scored = score_samples(run, new, reporter)
    table = prediction_table(run, scored)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    if out.suffix.lower() == ".csv":
        table.write_csv(temporary)
    else:
        table.write_parquet(temporary)
    temporary.replace(out)
    return scored, out
