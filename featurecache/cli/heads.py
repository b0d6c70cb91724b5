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
        list[str] | None, typer.Option(help="Which taps; default the only one.", rich_help_panel=opt.DATA)
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
                **{name: params[name] for name in (*own, "bootstrap")},
                "missing": str(missing),
                "views": views.split(",") if views else (),
                "tap": tap or (),
                "recipe": opt.per_view("--recipe", recipe, recipe_views(recipe)),
                "settings": opt.pairs("--set", setting),
            },
            source="fit-head",
        )
        from featurecache.fit import fit_from_config

        with reporter(quiet=quiet) as progress:
            run = fit_from_config(config, command=typed_command(), reporter=progress)
        show_run(output, run)
        output.next = f"open {run.path}/report.html, or: featurecache predict {run.path} MANIFEST --out preds.csv"


def recipe_views(values: list[str] | None) -> list[str]:
    """The views named by `VIEW=DIGEST`; digests hold no equals sign."""
    return [value.partition("=")[0] for value in values or () if "=" in value]


def show_run(output: Output, run: Run) -> None:
    """The metrics of a run, test first, with intervals."""
    output.outputs = [str(run.path)]
    output.figures = {"run": str(run.path), "task": run.task, "views": list(run.views), **flat_metrics(run.metrics)}
    output.failed = list(run.record.get("failed", ()))
    output.text(f"run       {run.path} ({run.task}, views {', '.join(run.views)})")
    for split in ("test", "valid", "train"):
        if split in run.metrics:
            output.text(metric_line(split, run.metrics[split]))
    skipped = run.record.get("skipped", ())
    if skipped:
        output.text(f"skipped   {', '.join(skipped)}: without a known positive or negative in training")
    output.text(f"report    {run.path / 'report.html'}")


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
    """`test_accuracy` and so on."""
    return {
        f"{split}_{name}": value
        for split, figures in metrics.items()
        if split in ("train", "valid", "test")
        for name, value in figures.items()
        if isinstance(value, int | float)
    }
