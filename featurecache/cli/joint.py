"""`featurecache finetune-joint`: bodies and head as one network, from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featurecache.cli import options as opt
from featurecache.cli.heads import show_run
from featurecache.cli.output import Debug, Json, Quiet, command, typed_command
from featurecache.cli.progress import reporter

TRAIN = "Training"
EPILOG = (
    "Example: featurecache fit-head cache --dataset manifest --target label --head fc --out runs/fc, then "
    "featurecache finetune-joint manifest.csv --init runs/fc --epochs 5 --out runs/joint"
)


def finetune_joint(
    ctx: typer.Context,
    manifest: opt.Manifest,
    target: opt.TargetOption = None,
    out: opt.OutRun = None,
    overwrite: opt.Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete epoch.")] = False,
    init: Annotated[
        Path | None,
        typer.Option(
            help="A fitted fc run to start from; brings views, bodies, target and split.", rich_help_panel=TRAIN
        ),
    ] = None,
    share_bodies: Annotated[
        bool, typer.Option("--share-bodies", help="One body for all views.", rich_help_panel=TRAIN)
    ] = False,
    fusion: Annotated[str, typer.Option(help="How views are joined.", rich_help_panel=TRAIN)] = "concat",
    epochs: Annotated[int, typer.Option(help="Epochs with the bodies trained.", rich_help_panel=TRAIN)] = 5,
    freeze_epochs: Annotated[int, typer.Option(help="Epochs before, head only.", rich_help_panel=TRAIN)] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate of the head.", rich_help_panel=TRAIN)] = 1e-3,
    body_lr: Annotated[float, typer.Option(help="Of the lowest layers.", rich_help_panel=TRAIN)] = 1e-4,
    weight_decay: Annotated[float, typer.Option(help="Not on norms and biases.", rich_help_panel=TRAIN)] = 0.01,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient; 0 for none.", rich_help_panel=TRAIN)] = 1.0,
    view_dropout: Annotated[
        float, typer.Option(help="Chance that a view is hidden in training.", rich_help_panel=TRAIN)
    ] = 0.1,
    augment: Annotated[
        str, typer.Option(help="crop, flip, vflip, rotate, colour; none.", rich_help_panel=TRAIN)
    ] = "crop,flip",
    setting: opt.SetOption = None,
    task: opt.TaskOption = opt.TaskChoice.auto,
    uncertain: opt.Uncertain = None,
    missing: opt.MissingOption = opt.MissingChoice.zero,
    split: opt.Split = "auto",
    group: opt.Group = None,
    seed: Annotated[int, typer.Option(help="Of split, head and draws.", rich_help_panel=opt.SPLIT)] = 0,
    valid: opt.Valid = 0.15,
    test: opt.Test = 0.15,
    bootstrap: Annotated[
        int, typer.Option(help="Resamples of the groups per interval; 0 for none.", rich_help_panel=opt.SPLIT)
    ] = 1000,
    view: opt.View = None,
    layout: opt.LayoutOption = opt.Layout.wide,
    view_column: opt.ViewColumn = None,
    path_column: opt.PathColumn = None,
    multi: opt.MultiOption = opt.Multi.error,
    id: opt.Id = None,
    root: opt.Root = None,
    allow_outside: opt.AllowOutside = False,
    reader: opt.ReaderOption = None,
    box: opt.Box = None,
    frame: opt.Frame = None,
    flip_if: opt.FlipIf = None,
    body: opt.BodyOption = None,
    weights: opt.Weights = None,
    image_size: opt.ImageSize = None,
    resize: opt.Resize = None,
    crop: opt.Crop = None,
    resize_mode: opt.ResizeMode = None,
    interpolation: opt.Interpolation = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    channels: opt.Channels = None,
    trust_factory: opt.TrustFactory = None,
    device: opt.DeviceOption = "auto",
    precision: opt.PrecisionOption = opt.PrecisionChoice.auto,
    batch_size: opt.BatchSize = "auto",
    workers: opt.Workers = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fine-tune the bodies of all views and the head together, end to end; write a run with the tuned bodies."""
    with command("finetune-joint", as_json=as_json, quiet=quiet, debug=debug) as output:
        from featurecache.config import JointConfig
        from featurecache.heads.fc import FCSettings

        params = ctx.params
        own = ("out", "overwrite", "resume", "init", "share_bodies", "fusion", "epochs", "freeze_epochs", "lr")
        more = ("body_lr", "weight_decay", "clip", "view_dropout", "bootstrap")
        values = {
            **opt.manifest_options(params),
            **opt.body_options(params, "torchvision/densenet121"),
            **opt.device_options(params),
            **opt.target_options(params),
            **opt.split_options(params),
            **{name: params[name] for name in (*own, *more)},
            "missing": str(missing),
            "augment": () if augment == "none" else opt.listed(augment),
            "settings": opt.settings(setting, FCSettings.model_fields),
        }
        config = JointConfig.create(values, source="finetune-joint")
        from featurecache.joint.finetune import finetune_joint as run_training

        with reporter(quiet=quiet) as progress:
            run = run_training(config, command=typed_command(), reporter=progress)
        show_run(output, run)
        if run.record.get("best_epoch") == 0:
            output.text("note      no epoch had a lower validation loss than the start, whose weights were kept")
        tuned = f"run:{output.outputs[0]}"
        output.next = f"featurecache extract {manifest} --store STORE --body {tuned} ... caches the tuned features"
