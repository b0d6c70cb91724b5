"""The Python API, continued: what is looked at once there are features and runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from featurecache.api import new_samples, opened_run
from featurecache.calls import journaled
from featurecache.config import AUTO, SplitConfig
from featurecache.dataset import FeatureDataset
from featurecache.export import Format
from featurecache.export import export as run_export
from featurecache.fit import torch_device
from featurecache.progress import Reporter
from featurecache.reporting.ablate import Ablation
from featurecache.reporting.ablate import ablate as run_ablate
from featurecache.reporting.compare import Comparison, compare_runs
from featurecache.reporting.explain import MOST_MAPS, Explained
from featurecache.reporting.explain import explain as run_explain
from featurecache.reporting.explain import show_features as draw_features
from featurecache.reporting.explore import Explored, check_free
from featurecache.reporting.explore import explore as run_explore
from featurecache.reporting.exploremap import Method
from featurecache.reporting.report import write_report
from featurecache.run import Run
from featurecache.rundir.files import ABOUT
from featurecache.rundir.fitrecord import read_about

__all__ = ["ablate", "compare", "explain", "explore", "export", "report", "show_features"]


def compare(
    runs: Sequence[Run | str | Path], *, metric: str | None = None, bootstrap: int = 1000, seed: int = 0
) -> Comparison:
    """Rank runs on their validation samples; tell by paired resamples of the test groups what differs for sure.

    Args:
        runs: two or more of the same samples, or their directories.
        metric: default AUROC, for several classes accuracy, for numbers R2.
        bootstrap: resamples of the groups per interval.
        seed: of the resampling.

    Raises:
        InputError: the runs are not of the same samples, target and split.
    """
    opened = [opened_run(run) for run in runs]
    return compare_runs(opened, names=[str(run.path) for run in opened], metric=metric, n=bootstrap, seed=seed)


@journaled("dataset")
def ablate(
    dataset: FeatureDataset,
    heads: str | Sequence[str] = "logistic",
    *,
    seeds: int = 5,
    cv: int | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    metric: str | None = None,
    bootstrap: int = 1000,
    device: str = "auto",
    reporter: Reporter | None = None,
    **options: Any,
) -> Ablation:
    """Fit heads on each view alone, fused, late-fused and with shuffled partners; say whether joining views helps.

    Args:
        dataset: of two views or more, with a target.
        heads: to fit on every arm.
        seeds: divisions of the samples.
        cv: K folds in place of seeds.
        settings: by head.
        metric: default AUROC, for several classes accuracy, for numbers R2.
        bootstrap: resamples of the groups per interval.
        device: where heads compute.
        reporter: told of each fit.
        options: fields of `featurecache.config.SplitConfig`: `split`, `group`, `seed`, `valid`, `test`.

    Returns:
        What `featurecache ablate` tells; `write(folder)` keeps it.

    Raises:
        InputError: an option is not valid, the dataset has one view or no target, a division is too small.
    """
    return run_ablate(
        dataset,
        [heads] if isinstance(heads, str) else list(heads),
        split=SplitConfig.create(options, source="ablate"),
        seeds=seeds,
        folds=cv,
        settings=settings,
        metric=metric,
        bootstrap=bootstrap,
        device=torch_device(device),
        reporter=reporter,
    )


@journaled("run")
def report(run: Run | str | Path, *, about: str | Path | None = None, images: bool = True) -> Path:
    """Write a run's report.html again, with what came since: evaluations, an ablation, heat maps.

    Args:
        run: a run, or its directory.
        about: TOML that says what only a person can state; kept in the run.
        images: whether the page shows pictures.

    Returns:
        The page.

    Raises:
        InputError: `about` says what the page does not know.
    """
    opened = opened_run(run)
    if about is not None:
        (opened.path / ABOUT).write_text(read_about(Path(about)), encoding="utf-8")
    return write_report(opened.path, opened.record, images=images)


@journaled("run")
def explain(
    run: Run | str | Path,
    sources: str | Path | Sequence[str | Path],
    *,
    method: str = "gradcam",
    samples: int | Sequence[str] = 6,
    output: str | None = None,
    layer: str = "",
    out: str | Path | None = None,
    seed: int = 0,
    reporter: Reporter | None = None,
    **options: Any,
) -> Explained:
    """Draw per sample all views side by side with the heat map for a class.

    Args:
        run: a run, or its directory.
        sources: a manifest, or image files (`VIEW=FILE` where the run has several views).
        method: `gradcam`, `occlusion`, `gradient-shap` or `guided-backprop`.
        samples: ids, or how many, evenly from the manifest.
        output: class, label or target that is explained; default what the model says of each sample.
        layer: the module that Grad-CAM looks at; default the last that gives a map.
        out: folder of the pictures; default RUN/explain, whose content is replaced.
        seed: of what gradient-shap draws.
        reporter: told of progress.
        options: as for `predict`; `batch_size` is how many changed images one pass of occlusion takes.

    Raises:
        InputError: unknown method, class, layer or sample; a method that does not suit the head.
        DependencyError: Captum is missing.
    """
    return run_explain(
        opened_run(run),
        new_samples(sources, options),
        method=method,
        samples=str(samples) if isinstance(samples, int) else ",".join(samples),
        output=output,
        layer=layer,
        out=None if out is None else Path(out),
        seed=seed,
        reporter=reporter,
    )


@journaled("dataset", "run")
def explore(
    dataset: FeatureDataset,
    out: str | Path = "explore.html",
    *,
    run: Run | str | Path | None = None,
    by: Sequence[str] = (),
    method: Method = "pca",
    points: int = 20_000,
    images: int | Literal["auto", "none"] = "auto",
    parquet: str | Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Explored:
    """Draw a map of cached features as one page: samples, their neighbours, near-duplicates and likely label errors.

    Args:
        dataset: its target, if it has one and there is no run, is what samples are.
        out: the page.
        run: a run on the same samples: gives classes, predictions, errors and splits.
        by: columns of the manifest to colour by, too.
        method: `pca`, or `tsne` (minutes for 20,000 samples).
        points: the most samples on the page.
        images: how many samples have pictures; `auto`: what fits into 24 MB; `none` for privacy.
        parquet: also write x, y and pictures of all samples to this file, for other viewers.
        seed: of the map and of the choice of samples.
        overwrite: replace files that are there.

    Raises:
        InputError: a file is there, a column or method is unknown, or no sample of the dataset is in the run.
    """
    opened = None if run is None else opened_run(run)
    return run_explore(
        dataset, out, run=opened, by=by, method=method, points=points, images=images, parquet=parquet, seed=seed,
        overwrite=overwrite,
    )  # fmt: skip


@journaled("dataset")
def export(dataset: FeatureDataset, out: str | Path, *, format: Format = "parquet", overwrite: bool = False) -> Path:
    """Write the features of a dataset with sample ids and the manifest's columns, a row per sample.

    Args:
        dataset: any.
        out: the file; it appears when it is complete.
        format: `parquet`, `npz` or `csv`.
        overwrite: replace the file if it is there.

    Raises:
        InputError: the format is unknown, the file is there or its folder is not, a column has the name of another.
    """
    return run_export(dataset.features, dataset.table, out, format=format, overwrite=overwrite)


def show_features(
    image: str | Path,
    out: str | Path = "features.png",
    *,
    body: str,
    tap: str,
    weights: str = "DEFAULT",
    view: str | None = None,
    reader: str = AUTO,
    image_size: int | None = None,
    most: int = MOST_MAPS,
    overwrite: bool = False,
    trust_factory: Sequence[str] = (),
) -> dict[str, Any]:
    """Draw the feature maps that a layer gives for one image, the strongest first.

    Args:
        image: the file.
        out: the PNG to write.
        body: as `list_bodies` names it, or `run:DIR`.
        tap: dotted name of a module that gives maps; `show_body` lists them.
        weights: of the body.
        view: which body of a run.
        reader: of the file; `auto`: decided by its suffix, or how it begins.
        image_size: side in pixels; default what the body expects.
        most: how many channels.
        overwrite: replace the file if it is there.
        trust_factory: plug-in bodies that a run may name.

    Returns:
        `shape` of the tap's output, `shown` channels in their order, `strength` of each.

    Raises:
        InputError: the tap gives no maps, a name is unknown, or the file is there.
        MissingFileError: no such image.
    """
    check_free(Path(out), overwrite)
    return draw_features(
        Path(image), Path(out), body=body, tap=tap, weights=weights, view=view, reader=reader, image_size=image_size,
        most=most, trust=trust_factory,
    )  # fmt: skip
