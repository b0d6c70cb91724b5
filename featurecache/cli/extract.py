"""`featurecache extract`: stage one from the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featurecache.cli import options as opt
from featurecache.cli.output import Debug, Json, Output, Quiet, command, pasteable, planned_command
from featurecache.cli.progress import reporter

if TYPE_CHECKING:
    from featurecache.extract import Summary

STORE = "Store"
REPLICAS = "Augmented replicas"


class Codec(StrEnum):
    """How chunks are compressed."""

    none = "none"
    zstd = "zstd"
    blosc = "blosc"
    gzip = "gzip"


class Check(StrEnum):
    """How an unchanged image is recognised."""

    stat = "stat"
    content = "content"


class OnError(StrEnum):
    """What an unreadable image does."""

    skip = "skip"
    stop = "stop"


EPILOG = (
    "Example: featurecache extract manifest.csv --store cache --view frontal=frontal_path --view lateral=lateral_path "
    "--body torchvision/densenet121"
)


def extract(
    ctx: typer.Context,
    manifest: opt.Manifest,
    store: Annotated[Path, typer.Option(help="The store; made if it is not there.", rich_help_panel=STORE)],
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
    seed: Annotated[
        int | None, typer.Option(help="Of random weights, and of replicas.", rich_help_panel=opt.BODY)
    ] = None,
    tap: opt.TapOption = None,
    image_size: opt.ImageSize = None,
    resize: opt.Resize = None,
    crop: opt.Crop = None,
    resize_mode: opt.ResizeMode = None,
    interpolation: opt.Interpolation = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    channels: opt.Channels = None,
    trust_factory: opt.TrustFactory = None,
    name: Annotated[
        str | None, typer.Option(help="Of the dataset; default the manifest's stem.", rich_help_panel=STORE)
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Give the name to another manifest.", rich_help_panel=STORE)
    ] = False,
    store_dtype: Annotated[
        opt.DtypeChoice,
        typer.Option(help="Numbers in the store; float32 takes twice the space.", rich_help_panel=STORE),
    ] = opt.DtypeChoice.float16,
    codec: Annotated[Codec, typer.Option(help="Features hardly compress.", rich_help_panel=STORE)] = Codec.none,
    rows_per_chunk: Annotated[
        int | None, typer.Option(help="Default: about 8 MiB a chunk.", rich_help_panel=STORE)
    ] = None,
    check: Annotated[Check, typer.Option(help="content reads every file.", rich_help_panel=STORE)] = Check.stat,
    on_error: Annotated[OnError, typer.Option(help="At an unreadable image.", rich_help_panel=STORE)] = OnError.skip,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try again what failed before.", rich_help_panel=STORE)
    ] = False,
    replicas: Annotated[
        int, typer.Option(metavar="K", help="Cache K random versions of each image too.", rich_help_panel=REPLICAS)
    ] = 0,
    augment: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME",
            help="crop, flip, vflip, rotate, colour; how strong: crop:0.7,rotate:5. Default crop,flip.",
            rich_help_panel=REPLICAS,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be computed and why; write nothing.", rich_help_panel=STORE),
    ] = False,
    engine: Annotated[
        opt.EngineChoice,
        typer.Option(
            help="auto: as the rows of the store were made; else openvino on a CPU, torch elsewhere.",
            rich_help_panel=opt.DEVICE,
        ),
    ] = opt.EngineChoice.auto,
    device: opt.DeviceOption = "auto",
    precision: opt.PrecisionOption = opt.PrecisionChoice.auto,
    batch_size: opt.BatchSize = "auto",
    workers: opt.Workers = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run the bodies over the images of every view and keep what they see in a store; only what is new is computed."""
    with command("extract", as_json=as_json, quiet=quiet, debug=debug, journals=() if dry_run else (store,)) as output:
        from featurecache.config import ExtractConfig

        params = ctx.params
        names = list(opt.pairs("--view", view)) or ["image"]
        own = ("store", "name", "replace", "seed", "rows_per_chunk", "retry_failed", "replicas")
        chosen = ("store_dtype", "codec", "check", "on_error", "engine")
        config = ExtractConfig.create(
            {
                **opt.manifest_options(params),
                **opt.body_options(params, "torchvision/densenet121"),
                **opt.device_options(params),
                **{key: params[key] for key in own},
                **{key: str(params[key]) for key in chosen},
                **({"tap": opt.taps(tap, names)} if tap else {}),
                "augment": opt.listed(augment),
            },
            source="extract",
        )
        if dry_run:
            from featurecache.stageone.dryrun import plan_extract

            with reporter(quiet=quiet) as progress:
                plan = plan_extract(config, progress)
            output.figures = plan.to_json()
            for line in plan.lines():
                output.text(line)
            output.next = planned_command()
            return
        from featurecache.stageone.survey import Survey

        survey = Survey(config)  # reads the manifest and looks at its files while this imports torch:
        from featurecache.extract import extract as run

        with reporter(quiet=quiet) as progress:
            summary = run(config, progress, survey)
        show(output, summary, one_tap(opt.taps(tap, names)))


def one_tap(taps: Mapping[str, list[str]]) -> list[str]:
    """`--tap NAME` for the first of several, which a head that takes one has to be told."""
    several = {view: names[0] for view, names in taps.items() if len(names) > 1}
    return [word for view, name in several.items() for word in ("--tap", name if view == "*" else f"{view}={name}")]


def show(output: Output, summary: Summary, tap: Sequence[str] = ()) -> None:
    """What a person and a script want to know of a run of stage one."""
    output.outputs = [summary.store]
    output.figures = summary.to_json()
    output.failed = summary.failures
    for line in summary.lines():
        output.text(line)
    target = summary.target or "COLUMN"
    output.next = pasteable(
        "fit-head", summary.store, "--dataset", summary.dataset, "--target", target, "--head", "logistic", *tap
    )
