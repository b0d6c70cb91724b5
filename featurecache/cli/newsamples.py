"""Options of `predict`, `evaluate` and `explain`: a run, and the new samples that it is given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurecache.cli import options as opt

if TYPE_CHECKING:
    from featurecache.newsamples import NewSamples
    from featurecache.run import Run

RunArgument = Annotated[Path, typer.Argument(help="A run of fit-head or finetune-joint.")]
Sources = Annotated[list[str], typer.Argument(metavar="MANIFEST|FILE...", help="A table or folder, or image files.")]
Store = Annotated[Path | None, typer.Option(help="Keep features here: the next time only new images are computed.")]
Tta = Annotated[int, typer.Option("--tta", metavar="N", help="Joint runs: average N augmented versions.")]


def new_samples(run: Run, params: Mapping[str, Any], *sources: str) -> NewSamples:
    """What a command's parameters say about the new samples; `store` and `tta` where it has them."""
    from featurecache.newsamples import NewSamples

    return NewSamples(
        sources=sources,
        store=params.get("store"),
        manifest={
            "views": opt.pairs("--view", params["view"]),
            **{name: params[name] for name in ("id", "root", "allow_outside")},
        },
        body={
            "body": opt.per_view("--body", params["body"], run.views),
            "weights": opt.per_view("--weights", params["weights"], run.views),
            "trust_factory": tuple(params["trust_factory"] or ()),
        },
        device=params["device"],
        batch_size=params["batch_size"],
        workers=params["workers"],
        tta=params.get("tta", 0),
    )
