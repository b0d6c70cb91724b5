"""Options of the commands that read features of a store: which features, what head, how it is measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from featurecache.cli import options as opt
from featurecache.errors import InputError

if TYPE_CHECKING:
    from featurecache.config import FitConfig

RUN = "Run and report"

Store = Annotated[Path, typer.Argument(help="The store that `featurecache extract` made.")]
Dataset = Annotated[str, typer.Option(help="Name of the dataset in the store.")]
HeadName = Annotated[str, typer.Option(help="fc, logistic, xgboost, decoder (masks) or a registered one.")]
Views = Annotated[str | None, typer.Option(metavar="A,B", help="Default: all.", rich_help_panel=opt.DATA)]
Tap = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME[:POOL]", help="Or VIEW=NAME[:POOL]; default the only one.", rich_help_panel=opt.DATA),
]
RecipeDigest = Annotated[
    list[str] | None,
    typer.Option(metavar="DIGEST or VIEW=DIGEST", help="Default: the dataset's.", rich_help_panel=opt.DATA),
]
Labels = Annotated[
    Path | None, typer.Option(help="Take corrected labels from it; computes nothing.", rich_help_panel=opt.DATA)
]
AllowPartial = Annotated[
    bool, typer.Option("--allow-partial", help="Use what is extracted so far.", rich_help_panel=opt.DATA)
]
ReplicasOption = Annotated[
    str,
    typer.Option(
        metavar="all|none", help="Train on augmented versions too, where there are.", rich_help_panel=opt.DATA
    ),
]
Seed = Annotated[int, typer.Option(help="Of the split and the head.", rich_help_panel=opt.SPLIT)]
Memory = Annotated[str, typer.Option(help="Bytes of features to hold in RAM, or auto.", rich_help_panel=opt.DEVICE)]
Metric = Annotated[str | None, typer.Option(help="Default roc_auc; accuracy for several classes, r2 for numbers.")]
Bootstrap = Annotated[
    int, typer.Option(help="Resamples of the groups per interval; 0 for none.", rich_help_panel=opt.SPLIT)
]
Folds = Annotated[
    int | None,
    typer.Option(
        "--cv", metavar="K", min=2, help="Cross-validate: out-of-fold predictions.", rich_help_panel=opt.SPLIT
    ),
]
DecideAt = Annotated[
    str | None,
    typer.Option(
        "--at", metavar="sensitivity=X", help="Or specificity=X: decide there; chosen on validation.",
        rich_help_panel=opt.SPLIT,
    ),
]  # fmt: skip
Calibrate = Annotated[
    str | None,
    typer.Option(
        metavar="temperature|isotonic", help="Put probabilities right on validation.", rich_help_panel=opt.SPLIT
    ),
]
Images = Annotated[
    str,
    typer.Option(metavar="N|none", help="Mistakes that the report shows with their pictures.", rich_help_panel=RUN),
]
AboutFile = Annotated[
    Path | None,
    typer.Option(help="TOML that says what only a person can state: intended_use, ...", rich_help_panel=RUN),
]

# Parameters that FitConfig takes as they are, where a command has them.
_PLAIN = (
    "store", "dataset", "head", "out", "overwrite", "manifest", "allow_partial", "memory", "device", "bootstrap", "cv",
    "at", "calibrate", "replicas", "images", "about",
)  # fmt: skip


def fit_config(params: Mapping[str, Any], source: str, **fixed: Any) -> FitConfig:
    """The configuration of stage two that a command's parameters say.

    Args:
        params: of the command, by name.
        source: the command's name, for messages.
        fixed: values in the place of parameters.

    Raises:
        InputError: an option is not valid, or the head has no such setting.
    """
    from featurecache.config import FitConfig
    from featurecache.heads.base import get_head

    values = {
        **opt.target_options(params),
        **opt.split_options(params),
        **{name: params[name] for name in _PLAIN if name in params},
        "missing": str(params["missing"]),
        "views": opt.listed(params["views"]),
        "tap": opt.taps(params["tap"], opt.named_views(params["tap"])),
        "recipe": opt.per_view("--recipe", params["recipe"], opt.named_views(params["recipe"])),
        **fixed,
    }
    if "setting" in params and "settings" not in fixed:
        FitConfig.create(values, source=source)  # before a head is imported
        known = get_head(values["head"]).Settings.model_fields
        values["settings"] = opt.settings(params["setting"], known)
    return FitConfig.create(values, source=source)


def image_count(text: str, words: str = "none") -> int | Literal["none"]:
    """`--images N|none`.

    Args:
        text: what was typed.
        words: that may be typed in the place of a number, for the message.

    Raises:
        InputError: neither.
    """
    if text == "none":
        return "none"
    if not text.isdecimal():
        raise InputError(f"--images {text!r}: write {words} or a number of samples")
    return int(text)
