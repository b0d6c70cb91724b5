"""`featurecache ablate`: whether joining views helps, from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurecache.cli import options as opt
from featurecache.cli.output import Debug, Json, Output, Quiet, command
from featurecache.cli.progress import reporter
from featurecache.errors import InputError

if TYPE_CHECKING:
    from featurecache.reporting.ablate import Ablation

EPILOG = "Example: featurecache ablate cache --dataset manifest --target label --head logistic,xgboost --seeds 5"


def ablate(
    ctx: typer.Context,
    store: Annotated[Path, typer.Argument(help="The store that `featurecache extract` made.")],
    dataset: Annotated[str, typer.Option(help="Name of the dataset in the store.")],
    target: opt.TargetOption = None,
    head: Annotated[str, typer.Option(metavar="NAME[,NAME...]", help="Heads to fit on every arm.")] = "logistic",
    out: Annotated[Path | None, typer.Option(help="Folder for ablation.json and ablation.csv.")] = None,
    overwrite: opt.Overwrite = False,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE or HEAD.KEY=VALUE", help="A head's own setting.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Default roc_auc; accuracy for several classes, r2 for numbers.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Divisions of the samples.", rich_help_panel=opt.SPLIT)] = 5,
    cv: Annotated[
        int | None, typer.Option(metavar="K", min=2, help="K folds in place of seeds.", rich_help_panel=opt.SPLIT)
    ] = None,
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
    seed: Annotated[int, typer.Option(help="Of the first division and its heads.", rich_help_panel=opt.SPLIT)] = 0,
    valid: opt.Valid = 0.15,
    test: opt.Test = 0.15,
    memory: Annotated[
        str, typer.Option(help="Bytes of features to hold in RAM, or auto.", rich_help_panel=opt.DEVICE)
    ] = "auto",
    device: opt.DeviceOption = "auto",
    bootstrap: Annotated[
        int, typer.Option(min=1, help="Resamples of the groups per interval.", rich_help_panel=opt.SPLIT)
    ] = 1000,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fit heads on each view alone, fused, late-fused and with shuffled partners; say whether joining views helps."""
    with command("ablate", as_json=as_json, quiet=quiet, debug=debug) as output:
        from featurecache.config import FitConfig

        params = ctx.params
        heads = [name for name in opt.listed(head) if name]
        config = FitConfig.create(
            {
                **opt.target_options(params),
                **opt.split_options(params),
                **{name: params[name] for name in ("store", "dataset", "memory", "device", "bootstrap")},
                "missing": str(missing),
                "replicas": "none",
                "views": opt.listed(views),
                "tap": opt.taps(tap, opt.named_views(tap)),
                "recipe": opt.per_view("--recipe", recipe, opt.named_views(recipe)),
            },
            source="ablate",
        )
        if out is not None:
            make_folder(out, overwrite=overwrite)
        from featurecache.fit import open_dataset, torch_device
        from featurecache.reporting.ablate import ablate as run_ablation

        with reporter(quiet=quiet) as progress:
            found = run_ablation(
                open_dataset(config),
                heads,
                split=config,
                seeds=seeds,
                folds=cv,
                settings=head_settings(heads, setting),
                metric=metric,
                bootstrap=config.bootstrap,
                device=torch_device(config.device),
                reporter=progress,
            )
        if out is not None:
            found.write(out)
        show(output, found, out)


def make_folder(out: Path, *, overwrite: bool) -> None:
    """Before hours are spent: refuse a folder that holds an ablation, and what is no folder."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: a file; --out is a folder")
    if (out / "ablation.json").exists() and not overwrite:
        raise InputError(f"{out}: already holds an ablation. Give another --out, or --overwrite to replace it.")
    out.mkdir(parents=True, exist_ok=True)


def head_settings(heads: list[str], setting: list[str] | None) -> dict[str, dict[str, Any]]:
    """`KEY=VALUE` for every head that is asked for, `HEAD.KEY=VALUE` for one of them; checked against its settings."""
    from featurecache.heads.base import get_head

    given: dict[str, list[str]] = {name: [] for name in heads}
    for text in setting or ():
        prefix, dot, rest = text.partition(".")
        if dot and prefix in given:
            given[prefix].append(rest)
        else:
            for chosen in given.values():
                chosen.append(text)
    return {name: opt.settings(texts, get_head(name).Settings.model_fields) for name, texts in given.items()}


def show(output: Output, found: Ablation, out: Path | None) -> None:
    """A table of arms, and the conclusions in words."""
    output.outputs = [str(out)] if out is not None else []
    output.figures = found.to_json()
    way = f"{found.divisions} division{'s' * (found.divisions != 1)}"
    output.text(f"{found.metric} on test, mean of {way} of {found.samples:,} samples in {found.groups:,} groups")
    width = max(len(arm.arm) for arm in found.arms)
    for name, reference in found.reference.items():
        output.text(f"{name} (reference: {reference} alone, better on validation)")
        for arm in found.arms:
            if arm.head != name:
                continue
            line = f"  {arm.arm:<{width}}  {arm.test:.3f}"
            if arm.test_low is not None:
                line += f" [{arm.test_low:.3f}, {arm.test_high:.3f}]"
            if arm.low is not None:
                line += f"  {arm.difference:+.3f} [{arm.low:+.3f}, {arm.high:+.3f}]"
            output.text(f"{line}  {arm.words}")
    for sentence in found.conclusions:
        output.text(sentence)
    output.next = "featurecache fit-head --views A,B with what serves best"
