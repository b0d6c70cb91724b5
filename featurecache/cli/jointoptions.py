"""Options of `finetune-joint` that say how the network is made up: sharing, fusion, pairs, what is cached below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from featurecache.cli import options as opt
from featurecache.cli.flags import Command

NETWORK, PREFIX, TRAIN = "Network", "Cached lower part", "Training"
OWN = ("stem", "fusion", "detach", "pairs", "store", "replicas")


class HeadChoice(StrEnum):
    """What the network ends in."""

    fc = "fc"
    decoder = "decoder"


class Share(StrEnum):
    """Which layers views have in common."""

    all = "all"
    stem = "stem"
    none = "none"


ShareBodies = Annotated[
    Share, typer.Option("--share-bodies", help="Weights that views share; alone: all.", rich_help_panel=NETWORK)
]
Stem = Annotated[
    str | None, typer.Option(metavar="MODULE", help="Last module that views share.", rich_help_panel=NETWORK)
]
Fusion = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="concat, mean, max, gated, spatial, difference-product.", rich_help_panel=NETWORK
    ),
]
TapOption = Annotated[
    list[str] | None,
    typer.Option(
        "--tap", metavar="NAME[:POOL]", help="What the head takes; default penultimate.", rich_help_panel=NETWORK
    ),
]
Detach = Annotated[
    bool, typer.Option("--detach", help="Train the head alone, through the bodies.", rich_help_panel=NETWORK)
]
HeadOption = Annotated[
    HeadChoice, typer.Option("--head", help="decoder: masks, from several --tap NAME:none.", rich_help_panel=NETWORK)
]
Pairs = Annotated[bool, typer.Option("--pairs", help="Pairs of one view: same class or not?", rich_help_panel=NETWORK)]
TrainFrom = Annotated[
    list[str] | None,
    typer.Option(
        "--train-from",
        metavar="MODULE or VIEW=MODULE",
        help="Train above it; what it gives is cached.",
        rich_help_panel=PREFIX,
    ),
]
AugmentColumn = Annotated[
    list[str] | None,
    typer.Option(
        "--augment-column",
        metavar="COLUMN or VIEW=COLUMN",
        help="Says it by sample: flip+rotate; none; empty: as --augment.",
        rich_help_panel=TRAIN,
    ),
]
Store = Annotated[Path | None, typer.Option("--store", help="Where that is cached.", rich_help_panel=PREFIX)]
StoreDtype = Annotated[opt.DtypeChoice, typer.Option("--store-dtype", help="How it is stored.", rich_help_panel=PREFIX)]
Engine = Annotated[opt.EngineChoice, typer.Option("--engine", help="What computes it.", rich_help_panel=PREFIX)]
Replicas = Annotated[
    int, typer.Option("--replicas", help="Augmented versions to cache of each image.", rich_help_panel=PREFIX)
]


class JointCommand(Command):
    """Takes `--share-bodies` without a value for `--share-bodies all`: it was a flag."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put in the value that is not there."""
        return super().parse_args(ctx, with_value(args))


def with_value(args: Sequence[str]) -> list[str]:
    """The words of a command with `all` after a bare `--share-bodies`."""
    found: list[str] = []
    for word, following in zip(args, [*args[1:], ""], strict=True):
        found += [word, Share.all] if word == "--share-bodies" and following not in set(Share) else [word]
    return found


def network_options(params: Mapping[str, Any]) -> dict[str, Any]:
    """These options as configuration."""
    views = list(opt.pairs("--view", params["view"])) or ["image"]
    return {
        **{name: params[name] for name in OWN},
        "share_bodies": str(params["share_bodies"]),
        "tap": opt.taps(params["tap"], views),
        "train_from": opt.per_view("--train-from", params["train_from"], views),
        "augment_column": opt.per_view("--augment-column", params["augment_column"], views),
        "store_dtype": str(params["store_dtype"]),
        "engine": str(params["engine"]),
    }
