"""Options that several commands share, and `VALUE or VIEW=VALUE`: once for all views or per view, the last one wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

from featurecache.cli.typed import toml_value
from featurecache.errors import InputError, did_you_mean

ANY_VIEW = "*"  # that of featurecache.config, which --help need not import
DATA, BODY, DEVICE, SPLIT, TARGET = "Samples and views", "Body and preprocessing", "Device", "Split", "Target"
PER_VIEW = "VALUE or VIEW=VALUE"


class Layout(StrEnum):
    """How a manifest lists images."""

    wide = "wide"
    long = "long"


class Multi(StrEnum):
    """What becomes of several images of one view."""

    error = "error"
    first = "first"
    mean = "mean"
    max = "max"


class PrecisionChoice(StrEnum):
    """Arithmetic of the forward pass."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class EngineChoice(StrEnum):
    """What runs bodies."""

    auto = "auto"
    torch = "torch"
    openvino = "openvino"


class DtypeChoice(StrEnum):
    """How features are stored."""

    float16 = "float16"
    float32 = "float32"


class TaskChoice(StrEnum):
    """What kind of prediction."""

    auto = "auto"
    binary = "binary"
    multiclass = "multiclass"
    multilabel = "multilabel"
    regression = "regression"
    dense = "dense"


class MasksChoice(StrEnum):
    """How a pixel of a mask says its class."""

    grey = "index"
    inside = "inside"
    alpha = "alpha"


class MissingChoice(StrEnum):
    """What becomes of a sample that lacks a view."""

    zero = "zero"
    drop = "drop"
    error = "error"


Store = Annotated[Path, typer.Argument(help="A store.")]
Manifest = Annotated[Path, typer.Argument(help="CSV or Parquet table, or a folder with a sub-folder per class.")]
View = Annotated[
    list[str] | None,
    typer.Option(
        "--view", metavar="NAME=COLUMN", help="A view and its column (long: its values).", rich_help_panel=DATA
    ),
]
LayoutOption = Annotated[Layout, typer.Option(help="A row per sample, or a row per image.", rich_help_panel=DATA)]
ViewColumn = Annotated[str | None, typer.Option(help="Long layout: column that names the view.", rich_help_panel=DATA)]
PathColumn = Annotated[str | None, typer.Option(help="Long layout: column that holds the path.", rich_help_panel=DATA)]
MultiOption = Annotated[Multi, typer.Option(help="Several images of one view of a sample.", rich_help_panel=DATA)]
Id = Annotated[
    str | None, typer.Option("--id", help="Id column; default sample_id, else the row.", rich_help_panel=DATA)
]
Root = Annotated[
    Path | None,
    typer.Option(help="What relative paths start from; default the manifest's folder.", rich_help_panel=DATA),
]
AllowOutside = Annotated[
    bool, typer.Option("--allow-outside", help="Accept paths outside the root.", rich_help_panel=DATA)
]
ReaderOption = Annotated[
    list[str] | None,
    typer.Option(
        "--reader",
        metavar=PER_VIEW,
        help="auto (by the files), image, dicom, array, text, mask, or package.module:function.",
        rich_help_panel=DATA,
    ),
]
ReaderSet = Annotated[
    list[str] | None,
    typer.Option(
        "--reader-set",
        metavar="KEY=VALUE or VIEW.KEY=VALUE",
        help="A reader's own setting, such as window=40,400 or alphabet=abc; numbers as such.",
        rich_help_panel=DATA,
    ),
]
Box = Annotated[
    list[str] | None,
    typer.Option(
        "--box", metavar="VIEW=X0,Y0,X1,Y1", help="Columns that hold a crop, in pixels.", rich_help_panel=DATA
    ),
]
Frame = Annotated[
    list[str] | None,
    typer.Option("--frame", metavar="VIEW=COLUMN", help="Column that holds a frame number.", rich_help_panel=DATA),
]
FlipIf = Annotated[
    list[str] | None,
    typer.Option("--flip-if", metavar="VIEW=COLUMN=VALUE", help="Mirror where a column says so.", rich_help_panel=DATA),
]
BodyOption = Annotated[
    list[str] | None,
    typer.Option("--body", metavar="NAME or VIEW=NAME", help="See `featurecache bodies list`.", rich_help_panel=BODY),
]
Weights = Annotated[
    list[str] | None,
    typer.Option(
        "--weights", metavar="SPEC or VIEW=SPEC", help="DEFAULT, shipped, none, or a file.", rich_help_panel=BODY
    ),
]
TapOption = Annotated[
    list[str] | None,
    typer.Option("--tap", metavar="NAME[:POOL]", help="What to keep; default penultimate.", rich_help_panel=BODY),
]
ImageSize = Annotated[
    list[str] | None, typer.Option("--image-size", metavar=PER_VIEW, help="Resize and crop.", rich_help_panel=BODY)
]
Resize = Annotated[
    list[str] | None, typer.Option("--resize", metavar=PER_VIEW, help="Pixels, or none.", rich_help_panel=BODY)
]
Crop = Annotated[
    list[str] | None, typer.Option("--crop", metavar=PER_VIEW, help="Pixels, or none.", rich_help_panel=BODY)
]
ResizeMode = Annotated[
    list[str] | None, typer.Option("--resize-mode", metavar=PER_VIEW, help="crop, squash or pad.", rich_help_panel=BODY)
]
Interpolation = Annotated[
    list[str] | None,
    typer.Option("--interpolation", metavar=PER_VIEW, help="nearest, bilinear, bicubic.", rich_help_panel=BODY),
]
Mean = Annotated[
    list[str] | None, typer.Option("--mean", metavar=PER_VIEW, help="A,B,C in 0..1.", rich_help_panel=BODY)
]
Std = Annotated[list[str] | None, typer.Option("--std", metavar=PER_VIEW, help="A,B,C in 0..1.", rich_help_panel=BODY)]
Channels = Annotated[
    list[str] | None, typer.Option("--channels", metavar=PER_VIEW, help="Input channels.", rich_help_panel=BODY)
]
TrustFactory = Annotated[
    list[str] | None,
    typer.Option("--trust-factory", metavar="NAME", help="A plug-in body that a run may use.", rich_help_panel=BODY),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda[:N] or mps.", rich_help_panel=DEVICE)]
PrecisionOption = Annotated[PrecisionChoice, typer.Option(help="Arithmetic of the bodies.", rich_help_panel=DEVICE)]
BatchSize = Annotated[str, typer.Option(help="A number, or auto.", rich_help_panel=DEVICE)]
Workers = Annotated[str, typer.Option(help="Threads that read and decode, or auto.", rich_help_panel=DEVICE)]
TargetOption = Annotated[
    str | None, typer.Option("--target", metavar="COLUMN[,COLUMN...]", help="What to predict.", rich_help_panel=TARGET)
]
TaskOption = Annotated[
    TaskChoice, typer.Option("--task", help="Kind of prediction; dense: a class per pixel.", rich_help_panel=TARGET)
]
Uncertain = Annotated[
    list[str] | None,
    typer.Option(
        "--uncertain", metavar="VALUE=MEANING", help="A label's meaning: ignore, zero or one.", rich_help_panel=TARGET
    ),
]
MasksOption = Annotated[
    MasksChoice,
    typer.Option(
        "--masks", help="Dense targets: class by grey value; or inside by colour, by opacity.", rich_help_panel=TARGET
    ),
]
Split = Annotated[str, typer.Option(help="auto, or a column that holds train/valid/test.", rich_help_panel=SPLIT)]
Group = Annotated[
    str | None, typer.Option(help="Column of what must stay together; default `group`.", rich_help_panel=SPLIT)
]
Valid = Annotated[float, typer.Option(help="Share of the samples.", rich_help_panel=SPLIT)]
Test = Annotated[float, typer.Option(help="Share of the samples.", rich_help_panel=SPLIT)]
MissingOption = Annotated[MissingChoice, typer.Option(help="A sample without one of the views.", rich_help_panel=SPLIT)]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the head; repeatable.")
]
OutRun = Annotated[
    Path | None, typer.Option("--out", help="Run directory; default runs/<dataset>-<target>-<head>-<n>.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing run.")]


def pairs(option: str, values: Sequence[str] | None) -> dict[str, str]:
    """`NAME=VALUE` entries as a dict; the last of a name wins."""
    found: dict[str, str] = {}
    for value in values or ():
        name, equals, rest = value.partition("=")
        if not equals or not name or not rest:
            raise InputError(f"{option} {value!r}: write NAME=VALUE")
        found[name] = rest
    return found


def per_view(option: str, values: Sequence[str] | None, views: Sequence[str]) -> dict[str, str]:
    """`VALUE` and `VIEW=VALUE` entries as {view or '*': value}.

    A bare value replaces what was given before for every view, since the last matching one wins.
    """
    found: dict[str, str] = {}
    for value in values or ():
        view, rest = split_view(option, value, views)
        found = {ANY_VIEW: rest} if view == ANY_VIEW else {**found, view: rest}
    return found


def taps(values: Sequence[str] | None, views: Sequence[str]) -> dict[str, list[str]]:
    """`NAME[:POOL]` and `VIEW=NAME[:POOL]` entries; they add up, for all views or for one."""
    found: dict[str, list[str]] = {}
    for value in values or ():
        view, tap = split_view("--tap", value, views)
        found.setdefault(view, []).append(tap)
    return found


def split_view(option: str, value: str, views: Sequence[str]) -> tuple[str, str]:
    """(view, or '*' for all; the value itself).

    Raises:
        InputError: what stands before `=` is no view, but nearly one.
    """
    view, equals, rest = value.partition("=")
    if equals and view in views:
        return view, rest
    if equals and (near := did_you_mean(view, views)):
        raise InputError(f"{option} {value!r}: no view {view!r}.{near} Views: {', '.join(views)}.")
    return ANY_VIEW, value


def named_views(values: Sequence[str] | None) -> list[str]:
    """The views that `VIEW=VALUE` entries name, for values that hold no `=` themselves: the store knows its views."""
    return [value.partition("=")[0] for value in values or () if "=" in value]


def reader_settings(values: Sequence[str] | None, views: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`KEY=VALUE` and `VIEW.KEY=VALUE` entries by view (`*` for all), each value as TOML would write it, else text.

    `A,B` of two numbers or more is a list.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, text in pairs("--reader-set", values).items():
        view, dot, key = name.rpartition(".")
        if dot and view not in views:
            raise InputError(
                f"--reader-set {name}: no view {view!r}.{did_you_mean(view, views)} Views: {', '.join(views)}."
            )
        found.setdefault(view or ANY_VIEW, {})[key] = toml_value(text)
    return found


def listed(text: str | None) -> tuple[str, ...]:
    """`A,B` as ('A', 'B')."""
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else ()


def settings(values: Sequence[str] | None, fields: Mapping[str, Any]) -> dict[str, Any]:
    """`--set KEY=VALUE` entries as values that a head's settings take: `A,B` for several, `none` for None."""
    found: dict[str, Any] = {}
    for name, text in pairs("--set", values).items():
        kind = fields[name].annotation if name in fields else str
        if get_origin(kind) is tuple:
            found[name] = listed(text.strip("[]()"))
        else:
            found[name] = None if text.lower() == "none" and type(None) in get_args(kind) else text
    return found


def numbers(option: str, given: Mapping[str, str]) -> dict[str, list[str]]:
    """Comma-separated values per view."""
    return {view: text.split(",") for view, text in given.items()}


def manifest_options(params: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a command's parameters that says how the manifest is read, as configuration."""
    views = pairs("--view", params["view"])
    names = list(views) or ["image"]
    return {
        "manifest": params["manifest"],
        "views": views,
        "layout": str(params["layout"]),
        "view_column": params["view_column"],
        "path_column": params["path_column"],
        "multi": str(params["multi"]),
        "id": params["id"],
        "root": params["root"],
        "allow_outside": params["allow_outside"],
        "reader": per_view("--reader", params["reader"], names) or "auto",
        "reader_settings": reader_settings(params["reader_set"], names),
        "box": {view: columns.split(",") for view, columns in pairs("--box", params["box"]).items()},
        "frame": pairs("--frame", params["frame"]),
        "flip_if": pairs("--flip-if", params["flip_if"]),
    }


def body_options(params: Mapping[str, Any], default: str) -> dict[str, Any]:
    """The part of a command's parameters that names bodies and preprocessing, as configuration."""
    names = list(pairs("--view", params["view"])) or ["image"]
    options: dict[str, Any] = {"body": per_view("--body", params["body"], names) or default}
    for name in ("weights", "image_size", "resize", "crop", "resize_mode", "interpolation", "channels"):
        options[name] = per_view("--" + name.replace("_", "-"), params[name], names)
    for name in ("mean", "std"):
        options[name] = numbers(f"--{name}", per_view(f"--{name}", params[name], names))
    options["trust_factory"] = params["trust_factory"] or ()
    return options


def device_options(params: Mapping[str, Any]) -> dict[str, Any]:
    """Device, precision, batch size and workers, as configuration."""
    return {
        "device": params["device"],
        "precision": str(params["precision"]),
        "batch_size": params["batch_size"],
        "workers": params["workers"],
    }


def target_options(params: Mapping[str, Any]) -> dict[str, Any]:
    """Target, task and the meaning of uncertain labels, as configuration."""
    return {
        "target": listed(params["target"]),
        "task": str(params["task"]),
        "uncertain": pairs("--uncertain", params["uncertain"]),
        **({"masks": str(params["masks"])} if "masks" in params else {}),
    }


def split_options(params: Mapping[str, Any]) -> dict[str, Any]:
    """How samples are divided, as configuration."""
    return {name: params[name] for name in ("split", "group", "seed", "valid", "test")}
