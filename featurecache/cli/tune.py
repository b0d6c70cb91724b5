"""`featurecache tune`: search a head's settings, from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featurecache.cli import options as opt
from featurecache.cli.heads import short_path, show_run
from featurecache.cli.output import Debug, Json, Quiet, command, typed_command
from featurecache.cli.progress import reporter

EPILOG = (
    "Example: featurecache tune cache --dataset manifest --target label --head xgboost --set max_bin=32 --trials 50 "
    "--out runs/tuned. Killed or interrupted, the same command goes on."
)


def tune(
    ctx: typer.Context,
    store: Annotated[Path, typer.Argument(help="The store that `featurecache extract` made.")],
    dataset: Annotated[str, typer.Option(help="Name of the dataset in the store.")],
    target: opt.TargetOption = None,
    head: Annotated[str, typer.Option(help="fc, logistic, xgboost or a registered one.")] = "logistic",
    trials: Annotated[int, typer.Option(min=1, help="In all; those of an earlier attempt count.")] = 50,
    out: opt.OutRun = None,
    overwrite: opt.Overwrite = False,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting that is not to be searched.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Default roc_auc; accuracy for several classes, r2 for numbers.")
    ] = None,
    storage: Annotated[Path | None, typer.Option(help="File that keeps the trials; default OUT.trials.jsonl.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Trials at a time.", rich_help_panel=opt.DEVICE)] = 1,
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
    missing: opt.MissingOption = opt.MissingChoice.zero,
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
    """Search a head's settings on validation samples; fit it with the best and write a run. Resumable."""
    with command("tune", as_json=as_json, quiet=quiet, debug=debug) as output:
        from featurecache.config import FitConfig

        params = ctx.params
        own = ("store", "dataset", "head", "out", "overwrite", "memory", "device", "bootstrap", "cv")
        config = FitConfig.create(
            {
                **opt.target_options(params),
                **opt.split_options(params),
                **{name: params[name] for name in own},
                "missing": str(missing),
                "views": opt.listed(views),
                "tap": opt.taps(tap, opt.named_views(tap)),
                "recipe": opt.per_view("--recipe", recipe, opt.named_views(recipe)),
                "settings": opt.pairs("--set", setting),
            },
            source="tune",
        )
        from featurecache.heads.base import get_head
        from featurecache.tune import tune as run_search

        known = get_head(head).Settings.model_fields
        config = config.model_copy(update={"settings": opt.settings(setting, known)})
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
