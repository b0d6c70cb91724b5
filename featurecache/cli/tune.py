"""`featurecache tune`: search a head's settings, from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featurecache.cli import options as opt
from featurecache.cli import stagetwo as two
from featurecache.cli.heads import short_path, show_run
from featurecache.cli.output import Debug, Json, Quiet, command, typed_command
from featurecache.cli.progress import reporter

EPILOG = (
    "Example: featurecache tune cache --dataset manifest --target label --head xgboost --set max_bin=32 --trials 50 "
    "--out runs/tuned. Killed or interrupted, the same command goes on."
)


def tune(
    ctx: typer.Context,
    store: two.Store,
    dataset: two.Dataset,
    target: opt.TargetOption = None,
    head: two.HeadName = "logistic",
    trials: Annotated[int, typer.Option(min=1, help="In all; those of an earlier attempt count.")] = 50,
    out: opt.OutRun = None,
    overwrite: opt.Overwrite = False,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting that is not to be searched.")
    ] = None,
    metric: two.Metric = None,
    storage: Annotated[Path | None, typer.Option(help="File that keeps the trials; default OUT.trials.jsonl.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Trials at a time.", rich_help_panel=opt.DEVICE)] = 1,
    views: two.Views = None,
    tap: two.Tap = None,
    recipe: two.RecipeDigest = None,
    manifest: two.Labels = None,
    allow_partial: two.AllowPartial = False,
    missing: opt.MissingOption = opt.MissingChoice.zero,
    replicas: two.ReplicasOption = "all",
    task: opt.TaskOption = opt.TaskChoice.auto,
    uncertain: opt.Uncertain = None,
    split: opt.Split = "auto",
    group: opt.Group = None,
    cv: Annotated[
        int | None,
        typer.Option("--cv", metavar="K", min=2, help="Search within each of K folds.", rich_help_panel=opt.SPLIT),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of split, proposals and heads.", rich_help_panel=opt.SPLIT)] = 0,
    valid: opt.Valid = 0.15,
    test: opt.Test = 0.15,
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
    """Search a head's settings on validation samples; fit it with the best and write a run. Resumable."""
    with command("tune", as_json=as_json, quiet=quiet, debug=debug, journals=(store,)) as output:
        config = two.fit_config(ctx.params, "tune")
        from featurecache.heads.base import get_head
        from featurecache.tune import tune as run_search

        with reporter(quiet=quiet) as progress:
            run, search = run_search(
                config, trials=trials, metric=metric, storage=storage, jobs=jobs, command=typed_command(),
                reporter=progress,
            )  # fmt: skip
        show_run(output, run)
        settings = run.record["head"]["settings"]
        chosen = {name: settings[name] for name in get_head(head).search_space}
        pairs = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in chosen.items())
        output.text(f"settings  {', '.join(pairs)}")
        path = short_path(run.path)
        output.text(f"trials    {sum(map(len, search.found.values())):,} in {path}/trials.csv")
        output.figures |= {"settings": chosen, "metric": search.metric, "trials": sum(map(len, search.found.values()))}
        output.next = f"open {path}/report.html, or: featurecache predict {path} MANIFEST --out preds.csv"
