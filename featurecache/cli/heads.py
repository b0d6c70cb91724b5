"""`featurecache fit-head`: stage two from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurecache.cli import options as opt
from featurecache.cli.output import Debug, Json, Output, Quiet, command, typed_command
from featurecache.cli.progress import reporter

if TYPE_CHECKING:
    from featurecache.run import Run

EPILOG = (
    "Example: featurecache fit-head cache --dataset manifest --target label --head xgboost --set max_bin=32 "
    "--out runs/xgb"
)
SHOWN = ("accuracy", "balanced_accuracy", "roc_auc", "average_precision", "f1_macro", "log_loss", "r2", "rmse")


def fit_head(
    ctx: typer.Context,
    store: Annotated[Path, typer.Argument(help="The store that `featurecache extract` made.")],
    dataset: Annotated[str, typer.Option(help="Name of the dataset in the store.")],
    target: opt.TargetOption = None,
    head: Annotated[str, typer.Option(help="fc, logistic, xgboost or a registered one.")] = "fc",
    out: opt.OutRun = None,
    overwrite: opt.Overwrite = False,
    setting: opt.SetOption = None,
    views: Annotated[str | None, typer.Option(metavar="A,B", help="Default: all.", rich_help_panel=opt.DATA)] = None,
    tap: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:POOL]", help="Or VIEW=NAME[:POOL]; default the only one.", rich_help_panel=opt.DATA
        ),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(metavar="DIGEST or VIEW=DIGEST", help="Default: the dataset's.", rich_help_panel=opt.DATA),
    ] = None,
    manifest: Annotated[
        Path | None, typer.Option(help="Take corrected labels from it; computes nothing.", rich_help_panel=opt.DATA)
    ] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Use what is extracted so far.", rich_help_panel=opt.DATA)
    ] = False,
    missing: opt.MissingOption = opt.MissingChoice.zero,
    replicas: Annotated[
        str,
        typer.Option(
            metavar="all|none", help="Train on augmented versions too, where there are.", rich_help_panel=opt.DATA
        ),
    ] = "all",
    task: opt.TaskOption = opt.TaskChoice.auto,
    uncertain: opt.Uncertain = None,
    split: opt.Split = "auto",
    group: opt.Group = None,
    seed: Annotated[int, typer.Option(help="Of the split and the head.", rich_help_panel=opt.SPLIT)] = 0,
    valid: opt.Valid = 0.15,
    test: opt.Test = 0.15,
    memory: Annotated[
        str, typer.Option(help="Bytes of features to hold in RAM, or auto.", rich_help_panel=opt.DEVICE)
    ] = "auto",
    device: opt.DeviceOption = "auto",
    bootstrap: Annotated[
        int, typer.Option(help="Resamples of the groups per interval; 0 for none.", rich_help_panel=opt.SPLIT)
    ] = 1000,
    cv: Annotated[
        int | None,
        typer.Option(
            "--cv", metavar="K", min=2, help="Cross-validate: out-of-fold predictions.", rich_help_panel=opt.SPLIT
        ),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            metavar="sensitivity=X",
            help="Or specificity=X: decide there; chosen on validation.",
            rich_help_panel=opt.SPLIT,
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="temperature|isotonic", help="Put probabilities right on validation.", rich_help_panel=opt.SPLIT
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a head on cached features of all views, and write a run with metrics, predictions and report."""
    with command("fit-head", as_json=as_json, quiet=quiet, debug=debug) as output:
        from featurecache.config import FitConfig

        params = ctx.params
        own = ("store", "dataset", "head", "out", "overwrite", "manifest", "allow_partial", "memory", "device")
        config = FitConfig.create(
            {
                **opt.target_options(params),
                **opt.split_options(params),
                **{name: params[name] for name in (*own, "bootstrap", "cv", "at", "calibrate", "replicas")},
                "missing": str(missing),
                "views": opt.listed(views),
                "tap": opt.taps(tap, opt.named_views(tap)),
                "recipe": opt.per_view("--recipe", recipe, opt.named_views(recipe)),
                "settings": opt.pairs("--set", setting),
            },
            source="fit-head",
        )
        from featurecache.crossval import fit_from_config
        from featurecache.heads.base import get_head

        known = get_head(head).Settings.model_fields
        config = config.model_copy(update={"settings": opt.settings(setting, known)})
        with reporter(quiet=quiet) as progress:
            run = fit_from_config(config, command=typed_command(), reporter=progress)
        show_run(output, run)
        path = output.outputs[0]
        output.next = f"open {path}/report.html, or: featurecache predict {path} MANIFEST --out preds.csv"


def short_path(path: Path) -> str:
    """A path as one would type it here: relative where it lies below the current directory."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def show_run(output: Output, run: Run) -> None:
    """The metrics of a run, test first, with intervals; what was left out, and why."""
    path = short_path(run.path)
    cv = run.record.get("cv") or {}
    output.outputs = [path]
    output.failed = list(run.record.get("failed", ()))
    output.figures = {
        "run": path,
        "task": run.task,
        "views": list(run.views),
        "skipped": list(run.record.get("skipped", ())),
        **({"folds": cv["folds"]} if cv else {}),
        "replicas": (run.record.get("replicas") or {}).get("count", 0),
        **{name: run.record[name] for name in ("n_dropped", "n_failed") if name in run.record},
        **{f"unreadable_{view}": count for view, count in run.record.get("failed_views", {}).items()},
        **flat_metrics(run.metrics),
    }
    output.text(f"run       {path} ({run.task}, views {', '.join(run.views)})")
    if output.figures["replicas"]:
        output.text(f"trained   on {output.figures['replicas']} replicas of each training image too, evaluated without")
    for split in ("test", "valid", "train"):
        if split in run.metrics:
            output.text(metric_line(split_label(run, split), run.metrics[split]))
    skipped = run.record.get("skipped", ())
    if skipped:
        why = "without a training sample" if run.task == "multiclass" else "without a known positive or negative"
        output.text(f"skipped   {', '.join(skipped)}: {why} in training")
    if lacking := cv.get("skipped"):
        output.text(f"skipped   {', '.join(lacking)}: not in the training samples of every fold")
    for view, count in run.record.get("failed_views", {}).items():
        output.text(f"missing   view {view} of {count:,} samples: the image could not be read")
    if run.record.get("n_dropped"):
        output.text(f"left out  {run.record['n_dropped']:,} samples without the views")
    output.text(f"report    {path}/report.html")


def split_label(run: Run, split: str) -> str:
    """What the samples of a split are called in a line."""
    return "folds" if run.record.get("cv") and split == "test" else split


def metric_line(split: str, metrics: dict[str, Any]) -> str:
    """`test  n 188 (124 groups): accuracy 0.81 [0.75, 0.86], ...`."""
    intervals = metrics.get("intervals", {})
    parts = []
    for name in SHOWN:
        value = metrics.get(name)
        if isinstance(value, int | float):
            low, high = intervals.get(name) or (None, None)
            parts.append(f"{name} {value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else ""))
    return f"{split:<9} n {metrics['n']} in {metrics['n_groups']} groups: {', '.join(parts[:4])}"


def flat_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """`test_accuracy`, `test_accuracy_low`, `test_accuracy_high` (ends of its interval) and so on."""
    flat: dict[str, Any] = {}
    for split in ("train", "valid", "test"):
        figures = metrics.get(split, {})
        for name, value in figures.items():
            if isinstance(value, int | float):
                flat[f"{split}_{name}"] = value
        for name, ends in figures.get("intervals", {}).items():
            if isinstance(ends, list):
                flat[f"{split}_{name}_low"], flat[f"{split}_{name}_high"] = ends
    return flat
