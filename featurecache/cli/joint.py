"""`featurecache finetune-joint`: bodies and head as one network, from the command line."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurecache.calls import follows
from featurecache.cli import jointoptions as net
from featurecache.cli import options as opt
from featurecache.cli import stagetwo as two
from featurecache.cli.heads import show_run
from featurecache.cli.output import Debug, Json, Quiet, command, pasteable, typed_command
from featurecache.cli.progress import reporter

if TYPE_CHECKING:
    from featurecache.run import Run

SCHEDULE, ENGINE = "Schedule", "Engine and checkpoints"
EPILOG = (
    "Example: featurecache fit-head cache --dataset manifest --target label --head fc --out runs/fc, then "
    "featurecache finetune-joint manifest.csv --init runs/fc --epochs 5 --out runs/joint"
)


class UnfreezeChoice(StrEnum):
    """When the layers of the bodies begin to learn."""

    all = "all"
    gradual = "gradual"


def augment_options(values: list[str] | None) -> dict[str, dict[str, tuple[str, ...]]]:
    """`A,B` and `VIEW=A,B` entries of --augment, as configuration; what is not given keeps its default."""
    found = {}
    for value in values or ():
        view, equals, names = value.rpartition("=")
        found[view if equals else opt.ANY_VIEW] = () if names == "none" else opt.listed(names)
    return {"augment": {opt.ANY_VIEW: ("crop", "flip"), **found}} if found else {}


def finetune_joint(
    ctx: typer.Context,
    manifest: opt.Manifest,
    target: opt.TargetOption = None,
    out: opt.OutRun = None,
    overwrite: opt.Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    init: Annotated[
        Path | None,
        typer.Option(
            help="A fitted fc or decoder run to start from: its views, bodies, target, split.",
            rich_help_panel=net.TRAIN,
        ),
    ] = None,
    head: net.HeadOption = net.HeadChoice.fc,
    share_bodies: net.ShareBodies = net.Share.none,
    stem: net.Stem = None,
    fusion: net.Fusion = "concat",
    tap: net.TapOption = None,
    detach: net.Detach = False,
    pairs: net.Pairs = False,
    train_from: net.TrainFrom = None,
    store: net.Store = None,
    store_dtype: net.StoreDtype = opt.DtypeChoice.float16,
    engine: net.Engine = opt.EngineChoice.auto,
    replicas: net.Replicas = 0,
    epochs: Annotated[int, typer.Option(help="Epochs with the bodies trained.", rich_help_panel=SCHEDULE)] = 5,
    freeze_epochs: Annotated[
        int | None, typer.Option(help="Epochs before, head only; 1, with --init 0.", rich_help_panel=SCHEDULE)
    ] = None,
    unfreeze: Annotated[
        UnfreezeChoice, typer.Option(help="gradual: layers from the top, in turn.", rich_help_panel=SCHEDULE)
    ] = UnfreezeChoice.all,
    lr: Annotated[
        str | None,
        typer.Option(
            metavar="RATE|find", help="Peak rate of the head: 1e-3, with --init 3e-4.", rich_help_panel=SCHEDULE
        ),
    ] = None,
    body_lr: Annotated[
        str | None,
        typer.Option(
            metavar="LOW[:HIGH]",
            help="Of the lowest layers, or lowest and highest; a tenth of --lr.",
            rich_help_panel=SCHEDULE,
        ),
    ] = None,
    warm_up: Annotated[
        float, typer.Option(help="Part of the steps with rising rates.", rich_help_panel=SCHEDULE)
    ] = 0.25,
    weight_decay: Annotated[float, typer.Option(help="Not on norms and biases.", rich_help_panel=SCHEDULE)] = 0.01,
    clip: Annotated[
        float, typer.Option(help="Largest norm of the gradient; 0 for none.", rich_help_panel=SCHEDULE)
    ] = 1.0,
    accumulate: Annotated[int, typer.Option(help="Batches per optimiser step.", rich_help_panel=SCHEDULE)] = 1,
    ema: Annotated[
        float, typer.Option(metavar="DECAY", help="Keep averaged weights (0.999); 0: off.", rich_help_panel=SCHEDULE)
    ] = 0.0,
    patience: Annotated[
        int | None, typer.Option(metavar="EPOCHS", help="Stop without a better loss.", rich_help_panel=SCHEDULE)
    ] = None,
    view_dropout: Annotated[
        float | None,
        typer.Option(help="Chance that a view is hidden in training; 0.1, with --init 0.", rich_help_panel=net.TRAIN),
    ] = None,
    augment: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A,B or VIEW=A,B",
            help="crop, flip, vflip, rotate, colour (crop:0.7: how strong), mixup, cutmix; none. Default crop,flip.",
            rich_help_panel=net.TRAIN,
        ),
    ] = None,
    augment_column: net.AugmentColumn = None,
    setting: opt.SetOption = None,
    task: opt.TaskOption = opt.TaskChoice.auto,
    uncertain: opt.Uncertain = None,
    masks: opt.MasksOption = opt.MasksChoice.grey,
    missing: opt.MissingOption = opt.MissingChoice.zero,
    split: opt.Split = "auto",
    group: opt.Group = None,
    seed: Annotated[int, typer.Option(help="Of split, head and draws.", rich_help_panel=opt.SPLIT)] = 0,
    valid: opt.Valid = 0.15,
    test: opt.Test = 0.15,
    bootstrap: two.Bootstrap = 1000,
    images: two.Images = "12",
    about: two.AboutFile = None,
    view: opt.View = None,
    layout: opt.LayoutOption = opt.Layout.wide,
    view_column: opt.ViewColumn = None,
    path_column: opt.PathColumn = None,
    multi: opt.MultiOption = opt.Multi.error,
    id: opt.Id = None,
    root: opt.Root = None,
    allow_outside: opt.AllowOutside = False,
    reader: opt.ReaderOption = None,
    reader_set: opt.ReaderSet = None,
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
    checkpoint_every: Annotated[
        str, typer.Option(metavar="STEPS|TIME", help="Within epochs: 200, 10m, none.", rich_help_panel=ENGINE)
    ] = "10m",
    checkpoint_activations: Annotated[
        bool, typer.Option("--checkpoint-activations", help="Less memory, more time.", rich_help_panel=ENGINE)
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Bodies through torch.compile.", rich_help_panel=ENGINE)
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Log to RUN/tensorboard, too.", rich_help_panel=ENGINE)
    ] = False,
    batch_size: opt.BatchSize = "auto",
    workers: opt.Workers = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fine-tune the bodies of all views and the head together, end to end; write a run with the tuned bodies."""
    second = follows()
    quiet, as_json = quiet or second, as_json and not second
    unfinished = out.with_name(out.name + ".tmp") if out is not None else None  # what --resume goes on from
    journals = () if second else (unfinished, store)
    with command("finetune-joint", as_json=as_json, quiet=quiet, debug=debug, journals=journals) as output:
        from featurecache.config import JointConfig
        from featurecache.heads.decodermodule import DecoderSettings
        from featurecache.heads.fc import FCSettings

        params = ctx.params
        own = ("out", "overwrite", "resume", "init", "epochs", "freeze_epochs", "lr")
        more = ("body_lr", "weight_decay", "clip", "view_dropout", "bootstrap", "warm_up", "accumulate", "ema")
        running = ("patience", "checkpoint_every", "checkpoint_activations", "compile", "tensorboard")
        shown = ("images", "about")
        values = {
            **opt.manifest_options(params),
            **opt.body_options(params, "torchvision/densenet121"),
            **net.network_options(params),
            **opt.device_options(params),
            **opt.target_options(params),
            **opt.split_options(params),
            **{name: params[name] for name in (*own, *more, *running, *shown)},
            **augment_options(augment),
            "unfreeze": str(unfreeze),
            "head": str(head),
            "missing": str(missing),
            "settings": opt.settings(setting, {**DecoderSettings.model_fields, **FCSettings.model_fields}),
        }
        config = JointConfig.create(values, source="finetune-joint")
        from featurecache.joint.finetune import finetune_joint as run_training

        with reporter(quiet=quiet) as progress:
            run = run_training(config, command=typed_command(), reporter=progress)
        if second:
            return
        show_run(output, run)
        if run.record.get("best_epoch") == 0:
            output.text("note      no epoch had a lower validation loss than the start, whose weights were kept")
        output.next = cache_tuned(run, params, output.outputs[0])


def cache_tuned(run: Run, params: Mapping[str, Any], path: str) -> str:
    """The command that keeps the tuned bodies' features of the same samples."""
    read = run.record.get("manifest_config") or {}  # with what `--init` knew of it
    named = [word for view, column in (read.get("views") or {}).items() for word in ("--view", f"{view}={column}")]
    chosen = {name: read.get(name) for name in ("layout", "view_column", "path_column", "multi", "id")}
    usual = {"layout": opt.Layout.wide, "multi": opt.Multi.error}
    chosen = {name: value for name, value in chosen.items() if value != usual.get(name)}
    if params["root"] is not None:
        chosen["root"] = params["root"]
    how = [word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", value)]
    from featurecache.rundir.files import read_record

    init = read_record(params["init"]) if params.get("init") else {}
    # Under a name of its own: the dataset that the start was fitted on keeps its features.
    name = (init.get("binding") or run.record.get("binding") or {}).get("dataset", params["manifest"].stem)
    words = [*([] if params["manifest"].is_dir() else named), *how, "--body", f"run:{path}", "--name", f"{name}-tuned"]
    store = params["store"] or store_of(init.get("command"), params.get("init")) or "cache"
    return pasteable("extract", params["manifest"], "--store", store, *words)


def store_of(line: str | None, run: Path | None) -> Path | None:
    """The store that a run was fitted on: the word of its command line that is one, seen from here or from the run."""
    from featurecache.store.format import StorePaths

    if run is None or not (line or "").startswith("featurecache "):  # a call from Python names no store
        return None
    places = [place / word for word in shlex.split(line or "") for place in (Path(), run.parent)]
    return next((place for place in places if StorePaths(place).index.is_file()), None)
