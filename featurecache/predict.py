"""Applies a run to new samples: head runs through the cache, joint runs by a live forward pass."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurecache.amounts import counted
from featurecache.bodies.engines import resolve_engine
from featurecache.config import ANY_VIEW, BodyConfig, ExtractConfig, ManifestConfig, for_view
from featurecache.data.manifest import read_manifest
from featurecache.data.targets import Target
from featurecache.dataset import FeatureDataset
from featurecache.errors import DependencyError, FeatureCacheError, InputError, RunError
from featurecache.extract import extract
from featurecache.fit import HeadRun, check_recipes, compare_recipes
from featurecache.heads.decoder import DecoderHead
from featurecache.joint.predict import predict_joint
from featurecache.newsamples import NewSamples, manifest_config
from featurecache.progress import Reporter, Silent
from featurecache.run import Run, load_run
from featurecache.rundir.densefit import write_masks
from featurecache.rundir.recorded import check_bodies, recipe_differences
from featurecache.rundir.results import make_predictions
from featurecache.stageone.jobs import set_up_views
from featurecache.store.format import StorePaths
from featurecache.store.recipe import Recipe
from featurecache.store.store import FeatureStore

FORMATS = (".csv", ".parquet", ".pq")


@dataclass(frozen=True)
class Scored:
    """What a run says about new samples.

    Attributes:
        sample_ids: (n,) text.
        scores: (n, classes) or (n, labels) probabilities, or (n, targets) values; dense: shares of the picture.
        table: the manifest's rows of these samples.
        present: (n, n_views) bool.
        failures: images that could not be read, and samples that got no prediction: sample_id, view, path, error.
        computed: images that went through a body.
        reused: images whose features were in the store.
        notes: what a user should know (features of another precision, say).
        files: (n,) of predicted masks, relative to what their folder lies in; empty but for dense runs.
    """

    sample_ids: NDArray[np.str_]
    scores: NDArray[np.float64]
    table: pl.DataFrame
    present: NDArray[np.bool_]
    failures: list[dict[str, str]]
    computed: int
    reused: int
    notes: list[str]
    files: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """As a person reads it."""
        lines = [f"note      {note}" for note in self.notes]
        lines.append(f"predicted {counted(len(self.sample_ids), 'sample')}")
        lines.append(f"images    computed {self.computed:,}, reused {self.reused:,}")
        return [*lines, f"failed    {len(self.failures):,}"] if self.failures else lines

    def __str__(self) -> str:
        return "\n".join(self.lines())


def score_samples(run: Run, new: NewSamples, reporter: Reporter | None = None, *, masks: Path | None = None) -> Scored:
    """Score new samples with a run; of a dense one the predicted masks are written into the folder `masks`.

    Raises:
        InputError: the manifest is not valid, or the bodies can't be had.
        RecipeMismatchError: the bodies are not those that the head was fitted on; nothing was computed.
        FeatureCacheError: no sample can be scored.
    """
    reporter = reporter or Silent()
    with tempfile.TemporaryDirectory(prefix="featurecache-") as scratch:
        manifest = manifest_config(run, new, Path(scratch))
        if run.kind == "joint":
            return score_joint(run, manifest, new, reporter, masks)
        if new.tta:
            raise InputError(
                f"--tta {new.tta}: {run.path} is a head on cached features, and only plain images of new samples are "
                "cached. Leave it out; runs of finetune-joint take it."
            )
        return score_cached(HeadRun(run.path, run.record), manifest, new, Path(scratch), reporter, masks)


def score_cached(
    run: HeadRun,
    manifest: ManifestConfig,
    new: NewSamples,
    scratch: Path,
    reporter: Reporter,
    masks: Path | None = None,
) -> Scored:
    """Features through the cache, then the head."""
    config = extract_config(run, manifest, new, scratch / "store")
    setups = set_up_views(config, run.views)
    engine = {"engine": "torch", "precision": "fp32", "storage_dtype": "float32"}  # compared by what features mean
    compare_recipes(run, {view: setup.recipe(**engine) for view, setup in setups.items()})
    summary = extract(config, reporter)
    taps = {view: [block.tap for block in run.head.blocks_ if block.view == view] for view in run.views}
    with FeatureStore(config.store) as store:
        binding = store.binding(summary.dataset)
    if not any(binding.cells["state"] == "done"):
        raise FeatureCacheError(nothing_to_score(run, summary.failures))
    dataset = FeatureDataset(config.store, dataset=summary.dataset, views=run.views, tap=taps)
    try:
        notes = check_recipes(run, dataset)
        files: list[str] = []
        if isinstance(run.head, DecoderHead):
            said = run.head.mask_rows(dataset.features)
            scores, files = write_masks(said, dataset.sample_ids, run.classes, masks)
        else:
            scores = run.score_rows(dataset.features)
    finally:
        dataset.store.close()
    ids = binding.table["sample_id"].to_list()
    return Scored(
        dataset.sample_ids,
        scores,
        dataset.table,
        dataset.present,
        summary.failures + without_views(ids, dataset.sample_ids, summary.failures),
        summary.computed,
        summary.reused,
        notes,
        files,
    )


def score_joint(
    run: Run, config: ManifestConfig, new: NewSamples, reporter: Reporter, masks: Path | None = None
) -> Scored:
    """Images through the tuned network."""
    manifest = read_manifest(config)
    found = predict_joint(
        run,
        manifest,
        device=new.device,
        batch_size=whole(new.batch_size),
        workers=whole(new.workers),
        trust=tuple((new.body or {}).get("trust_factory") or ()),
        tta=new.tta,
        masks=masks,
        reporter=reporter,
    )
    if not len(found.sample_ids):
        raise FeatureCacheError(nothing_to_score(run, found.failed))
    ids = manifest.table["sample_id"].to_list()
    row_of = {name: row for row, name in enumerate(ids)}
    kept = [row_of[name] for name in found.sample_ids.tolist()]
    return Scored(
        found.sample_ids,
        found.scores,
        manifest.table[kept],
        found.present,
        found.failed + without_views(ids, found.sample_ids, found.failed),
        computed=int(manifest.cells["value"].is_not_null().sum()) - len(found.failed),
        reused=0,
        notes=[],
        files=list(found.files),
    )


def whole(text: int | str) -> int | Literal["auto"]:
    """A number of samples or threads, or `auto`."""
    if text == "auto":
        return "auto"
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise InputError(f"{text!r}: a number above 0, or auto")
    return number


def nothing_to_score(run: Run, failures: Sequence[Mapping[str, str]]) -> str:
    """Why no sample got a score."""
    if not failures:
        return f"no sample has an image of the views {', '.join(run.views)}"
    first = failures[0]
    return f"no image can be read; the first of {len(failures)}: {first['path']}: {first['error']}"


def without_views(
    ids: Sequence[str], scored: NDArray[np.str_], failures: Sequence[Mapping[str, str]]
) -> list[dict[str, str]]:
    """Samples without any view get no prediction, so they are listed."""
    listed = {entry["sample_id"] for entry in failures} | set(scored.tolist())
    return [
        {"sample_id": name, "view": "", "path": "", "error": "has none of the views"}
        for name in map(str, ids)
        if name not in listed
    ]


def extract_config(run: HeadRun, manifest: ManifestConfig, new: NewSamples, scratch: Path) -> ExtractConfig:
    """Stage one as it was for the run's own samples, over new ones.

    Raises:
        InputError: the run names a factory that is not trusted, or files that are not there.
        RunError: its record is incomplete.
    """
    recorded = run.body_config
    if not recorded.get("body"):
        raise RunError(f"{run.path}: run.json holds no body_config, so new samples can't go through its bodies")
    given = {name: value for name, value in (new.body or {}).items() if value}
    body = {name: value for name, value in recorded.items() if name in BodyConfig.model_fields}
    for name in ("body", "weights"):
        if name in given:
            body[name] = over_views(body.get(name) or {}, given[name], run.views)
    body["trust_factory"] = tuple(given.get("trust_factory") or ())
    typed = over_views({}, given.get("body") or {}, run.views)
    check_bodies(run.path, run.views, {**body, "reader": manifest.reader}, typed.values())
    taps = {
        view: [{"module": tap["tap"], "pool": tap["pool"]} for tap in recipe.taps]
        for view, recipe in run.view_recipes.items()
    }
    stem = Path(new.sources[0]).stem if len(new.sources) == 1 else "files"
    return ExtractConfig.create(
        {
            **manifest.model_dump(),
            **body,
            **numerics(run, new),
            "seed": recorded.get("seed"),
            "tap": taps,
            "store": new.store or scratch,
            "name": f"predict-{stem}",
            "replace": True,
            "device": new.device,
            "batch_size": new.batch_size,
            "workers": new.workers,
        },
        source=str(run.path),
    )


def over_views(known: Mapping[str, str], given: str | Mapping[str, str], views: Sequence[str]) -> dict[str, str]:
    """Values per view, with those that are given (once for all views, or per view) in the place of the known ones."""
    given = given if isinstance(given, Mapping) else {ANY_VIEW: given}
    values = {view: for_view(given, view, for_view(known, view, "")) for view in views}
    return {view: value for view, value in values.items() if value}


def numerics(run: HeadRun, new: NewSamples) -> dict[str, str]:
    """Engine, precision and storage dtype: those that the head knows, or those of features that the store has already.

    Views that differ in them are left to the rule for `auto`.
    """
    names = {"engine": "engine", "precision": "precision", "store_dtype": "storage_dtype"}
    recipes = list(run.view_recipes.values())
    if new.store is not None and StorePaths(new.store).index.exists():
        with FeatureStore(new.store) as store:
            held = [info for info in store.recipes() if info.rows]
        if not any(info.recipe.holds(recipe) for info in held for recipe in recipes):
            close = [
                (info.rows, info.recipe.digest, info.recipe)
                for info in held
                if any(differs_in_numbers_only(recipe, info.recipe) for recipe in recipes)
            ]
            recipes = [max(close)[2]] if close else recipes
    found = {}
    for option, wanted in names.items():
        values = {str(recipe.fields[wanted]) for recipe in recipes}
        found[option] = values.pop() if len(values) == 1 else "float32" if option == "store_dtype" else "auto"
    if found["engine"] != "auto":
        try:
            resolve_engine(found["engine"], found["precision"], new.device)
        except (InputError, DependencyError):  # what this machine can't compute so
            found["precision"] = "auto"
            if found["engine"] == "openvino":
                found["engine"] = "auto"
    return found


def differs_in_numbers_only(recipe: Recipe, held: Recipe) -> bool:
    """Whether a recipe of a store has all taps of another, differing in engine or precision at most."""
    return set(recipe.tap_names) <= set(held.tap_names) and not recipe_differences(recipe, held)[0]


def prediction_table(run: Run, scored: Scored) -> pl.DataFrame:
    """sample_id, views, prediction and a column per class or label, as predictions.csv has them."""
    n = len(scored.sample_ids)
    if run.task == "dense":
        return mask_table(run, scored)
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


def mask_table(run: Run, scored: Scored) -> pl.DataFrame:
    """sample_id, views, the file of the mask, and the share of the picture that each class takes."""
    views = ["+".join(np.array(run.views)[row]) for row in scored.present]
    shares = {f"share:{label}": scored.scores[:, number] for number, label in enumerate(run.classes)}
    return pl.DataFrame({"sample_id": scored.sample_ids.tolist(), "views": views, "mask": scored.files, **shares})


def mask_folder(out: Path) -> Path:
    """Where the masks of `preds.csv` go: `preds.masks/`.

    Raises:
        InputError: it holds something else.
    """
    folder = out.with_name(f"{out.stem}.masks")
    if folder.exists() and not (folder.is_dir() and all(path.suffix == ".png" for path in folder.iterdir())):
        raise InputError(f"{folder}: masks would go there, but it holds something else. Give another --out.")
    return folder


def predict(
    run: Run | str | Path, new: NewSamples, out: str | Path, reporter: Reporter | None = None
) -> tuple[Scored, Path]:
    """Score new samples and write the predictions to a .csv or .parquet file; masks into a folder beside it.

    Raises:
        InputError: the file is of another kind; see `score_samples`.
    """
    out = Path(out)
    if out.suffix.lower() not in FORMATS:
        raise InputError(f"--out {out}: write .csv or .parquet")
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder")
    run = run if isinstance(run, Run) else load_run(run)
    masks = mask_folder(out) if run.task == "dense" else None
    if masks is not None and masks.exists():
        shutil.rmtree(masks)
    scored = score_samples(run, new, reporter, masks=masks)
    table = prediction_table(run, scored)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    if out.suffix.lower() == ".csv":
        table.write_csv(temporary)
    else:
        table.write_parquet(temporary)
    temporary.replace(out)
    return scored, out
