"""`featurecache fit-head`: stage two from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from featurecache.amounts import counted, metric_line
from featurecache.calls import flat_metrics
from featurecache.cli import options as opt
from featurecache.cli import stagetwo as two
from featurecache.cli.output import Debug, Json, Output, Quiet, command, typed_command
from featurecache.cli.progress import reporter

if TYPE_CHECKING:
    from featurecache.run import Run

EPILOG = (
    "Example: featurecache fit-head cache --dataset manifest --target label --head xgboost --set max_bin=32 "
    "--out runs/xgb. Masks: featurecache fit-head cache --dataset manifest --target mask --head decoder --tap layer1 "
    "--tap layer2 --tap layer4"
)


def fit_head(
    ctx: typer.Context,
    store: two.Store,
    dataset: two.Dataset,
    target: opt.TargetOption = None,
    head: two.HeadName = "fc",
    out: opt.OutRun = None,
    overwrite: opt.Overwrite = False,
    setting: opt.SetOption = None,
    views: two.Views = None,
    tap: two.Tap = None,
    recipe: two.RecipeDigest = None,
    manifest: two.Labels = None,
    allow_partial: two.AllowPartial = False,
    missing: opt.MissingOption = opt.MissingChoice.zero,
    replicas: two.ReplicasOption = "all",
    task: opt.TaskOption = opt.TaskChoice.auto,
    uncertain: opt.Uncertain = None,
    masks: opt.MasksOption = opt.MasksChoice.grey,
    split: opt.Split = "auto",
    group: opt.Group = None,
    seed: two.Seed = 0,
    valid: opt.Valid = 0.15,
    test: opt.Test = 0.15,
    cv: two.Folds = None,
    at: two.DecideAt = None,
    calibrate: two.Calibrate = None,
    bootstrap: two.Bootstrap = 1000,
    images: two.Images = "12",
    about: two.AboutFile = None,
    memory: two.Memory = "auto",
    device: opt.DeviceOption = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a head on cached features of all views, and write a run with metrics, predictions and report."""
    with command("fit-head", as_json=as_json, quiet=quiet, debug=debug, journals=(store,)) as output:
        config = two.fit_config(ctx.params, "fit-head")
        from featurecache.crossval import fit_from_config

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
    output.journals.append(run.path)
    output.failed = list(run.record.get("failed", ()))
    output.figures = {
        "run": path,
        "task": run.task,
        "views": list(run.views),
        "skipped": list(run.record.get("skipped", ())),
        **({"folds": cv["folds"]} if cv else {}),
        "replicas": (run.record.get("replicas") or {}).get("count", 0),
        **{name: run.record[name] for name in ("n_dropped", "n_failed") if name in run.record},
        "n_unlabelled": unlabelled_samples(run),
        **{f"unreadable_{view}": count for view, count in run.record.get("failed_views", {}).items()},
        **flat_metrics(run.metrics),
        "notes": list(run.record.get("notes", ())),
    }
    output.text(f"run       {path} ({run.task}, views {', '.join(run.views)})")
    if output.figures["replicas"]:
        output.text(f"trained   on {output.figures['replicas']} replicas of each training image too, evaluated without")
    for split in ("test", "valid", "train"):
        if split in run.metrics:
            output.text(metric_line(split_label(run, split), run.metrics[split]))
    if line := kept_line(run):
        output.text(line)
    skipped = run.record.get("skipped", ())
    if skipped:
        why = "without a training sample" if run.task == "multiclass" else "without a known positive or negative"
        output.text(f"skipped   {', '.join(skipped)}: {why} in training")
    if lacking := cv.get("skipped"):
        output.text(f"skipped   {', '.join(lacking)}: not in the training samples of every fold")
    if (run.record.get("calibration") or {}).get("bound_reached"):
        from featurecache.reporting.wording import BOUND_REACHED

        output.figures["notes"].append(f"{BOUND_REACHED[0].lower()}{BOUND_REACHED[1:]}")
    for note in output.figures["notes"]:
        output.text(f"note      {note}")
    for view, count in run.record.get("failed_views", {}).items():
        output.text(f"missing   view {view} of {counted(count, 'sample')}: the image could not be read")
    if run.record.get("n_dropped"):
        output.text(f"left out  {counted(run.record['n_dropped'], 'sample')} without the views")
    if unlabelled := unlabelled_samples(run):
        output.text(f"left out  {counted(unlabelled, 'sample')} without a known label")
    output.text(f"report    {path}/report.html")


def unlabelled_samples(run: Run) -> int:
    """How many samples took no part since nothing is known of their target."""
    from featurecache.rundir.flow import NO_LABEL

    left_out = (run.record.get("flow") or {}).get("left_out", ())
    return sum(part["samples"] for part in left_out if part["why"] == NO_LABEL)


def kept_line(run: Run) -> str:
    """Which epoch or round of the history was kept, with its loss; '' where validation chose none."""
    from featurecache.reporting.material import Material
    from featurecache.reporting.measured import kept_epoch

    epoch, history = kept_epoch(Material(run.path, run.record, run.metrics, run.arrays)), run.history
    unit = next((name for name in ("epoch", "round") if name in history.columns), "")
    if epoch is None or not unit or "valid_loss" not in history.columns:
        return ""
    found = history.filter(history[unit] == epoch)["valid_loss"].drop_nulls()
    loss = f", valid_loss {found[0]:.4f}" if len(found) else ""
    return f"kept      {unit} {epoch:,} of {int(history[unit].max()):,}{loss}"  # type: ignore[arg-type]


def split_label(run: Run, split: str) -> str:
    """What the samples of a split are called in a line."""
    return "folds" if run.record.get("cv") and split == "test" else split
