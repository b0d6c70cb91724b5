"""`featurecache ablate`: whether joining views helps, from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurecache.amounts import counted
from featurecache.cli import options as opt
from featurecache.cli import stagetwo as two
from featurecache.cli.output import Debug, Json, Output, Quiet, command, pasteable
from featurecache.cli.progress import reporter
from featurecache.errors import InputError

if TYPE_CHECKING:
    from featurecache.reporting.ablate import Ablation

SAME = (
    "tap", "recipe", "manifest", "allow_partial", "missing", "task", "uncertain", "split", "group", "seed", "valid",
    "test",
)  # fmt: skip
"""Options that `fit-head` has with the same meaning."""
EPILOG = "Example: featurecache ablate cache --dataset manifest --target label --head logistic,xgboost --seeds 5"


def ablate(
    ctx: typer.Context,
    store: two.Store,
    dataset: two.Dataset,
    target: opt.TargetOption = None,
    head: Annotated[str, typer.Option(metavar="NAME[,NAME...]", help="Heads to fit on every arm.")] = "logistic",
    out: Annotated[Path | None, typer.Option(help="Folder for ablation.json and ablation.csv.")] = None,
    run: Annotated[
        Path | None, typer.Option(help="A run of the same samples: into RUN/ablation/ and its report.")
    ] = None,
    overwrite: opt.Overwrite = False,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE or HEAD.KEY=VALUE", help="A head's own setting.")
    ] = None,
    metric: two.Metric = None,
    seeds: Annotated[int, typer.Option(min=1, help="Divisions of the samples.", rich_help_panel=opt.SPLIT)] = 5,
    cv: Annotated[
        int | None, typer.Option(metavar="K", min=2, help="K folds in place of seeds.", rich_help_panel=opt.SPLIT)
    ] = None,
    views: two.Views = None,
    tap: two.Tap = None,
    recipe: two.RecipeDigest = None,
    manifest: two.Labels = None,
    allow_partial: two.AllowPartial = False,
    missing: opt.MissingOption = opt.MissingChoice.zero,
    task: opt.TaskOption = opt.TaskChoice.auto,
    uncertain: opt.Uncertain = None,
    split: opt.Split = "auto",
    group: opt.Group = None,
    seed: Annotated[int, typer.Option(help="Of the first division and its heads.", rich_help_panel=opt.SPLIT)] = 0,
    valid: opt.Valid = 0.15,
    test: opt.Test = 0.15,
    memory: two.Memory = "auto",
    device: opt.DeviceOption = "auto",
    bootstrap: Annotated[
        int, typer.Option(min=1, help="Resamples of the groups per interval.", rich_help_panel=opt.SPLIT)
    ] = 1000,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fit heads on each view alone, fused, late-fused and with shuffled partners; say whether joining views helps."""
    with command("ablate", as_json=as_json, quiet=quiet, debug=debug, journals=(store, run)) as output:
        heads = list(opt.listed(head))
        if not heads:
            raise InputError(f"--head {head!r}: name a head, or several, separated by commas")
        config = two.fit_config(ctx.params, "ablate", head=heads[0], settings={}, replicas="none")
        from featurecache.run import load_run

        loaded = load_run(run) if run is not None else None
        folder = out if loaded is None else loaded.path / "ablation"
        if folder is not None and out is not None and loaded is not None:
            raise InputError("--out and --run: give either, the folder of the run is RUN/ablation")
        if loaded is None and folder is not None:
            make_folder(folder, overwrite=overwrite)
        from featurecache.fit import open_dataset, torch_device
        from featurecache.reporting.ablate import ablate as run_ablation
        from featurecache.reporting.ablate import check_run

        data = open_dataset(config)
        if loaded is not None:
            check_run(loaded, data)
            make_folder(loaded.path / "ablation", overwrite=overwrite)
        with reporter(quiet=quiet) as progress:
            found = run_ablation(
                data,
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
        if folder is not None:
            found.write(folder)
        if loaded is not None:
            from featurecache.reporting.report import write_report

            write_report(loaded.path)
        show(output, found, folder)
        output.next = pasteable(*fit_best(ctx, heads, best_views(found, heads[0], data.views)))


def best_views(found: Ablation, head: str, views: Sequence[str]) -> list[str]:
    """All views where joining them helps the head, else the one that is better alone."""
    joined = [arm for arm in found.arms if arm.head == head and arm.arm in ("fused", "late")]
    return list(views) if any(arm.words == "better" for arm in joined) else [found.reference[head]]


def fit_best(ctx: typer.Context, heads: Sequence[str], views: Sequence[str]) -> list[str]:
    """The command that fits the first head on these views, with the division and labels of the ablation."""
    params, head = ctx.params, heads[0]
    words = ["fit-head", params["store"], "--dataset", params["dataset"], "--target", params["target"]]
    words += ["--views", ",".join(views), "--head", head]
    for name in SAME:
        value, flag = params[name], f"--{name.replace('_', '-')}"
        if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE":
            several = value if isinstance(value, list | tuple) else [value]
            if name in ("tap", "recipe"):  # not those of a view that is left out
                several = [each for each in several if "=" not in each or each.partition("=")[0] in views]
            words += [flag if each is True else f"{flag}={each}" for each in several]
    for text in params["setting"] or ():
        prefix, dot, rest = text.partition(".")
        if not (dot and prefix in heads):
            words += ["--set", text]
        elif prefix == head:
            words += ["--set", rest]
    return [str(word) for word in words]


def make_folder(out: Path, *, overwrite: bool) -> None:
    """Before hours are spent: refuse a folder that holds an ablation, and what is no folder."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: a file, but --out is a folder. Choose another --out.")
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
    size = f"{counted(found.samples, 'sample')} in {counted(found.groups, 'group')}"
    output.text(f"{found.metric} on test, mean of {way} of {size}")
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
