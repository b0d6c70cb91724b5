"""`featurecache explore`: a map of cached features as one page that needs nothing but a browser."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featurecache.cli import options as opt
from featurecache.cli import stagetwo as two
from featurecache.cli.output import Debug, Json, Quiet, command

if TYPE_CHECKING:
    from featurecache.run import Run

EPILOG = "Example: featurecache explore cache --dataset manifest --run runs/manifest-label-fc-1 --out explore.html"
PAGE = "Page"


class MethodChoice(StrEnum):
    """How features become two dimensions."""

    pca = "pca"
    tsne = "tsne"


def explore(
    store: two.Store,
    dataset: two.Dataset,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("explore.html"),
    run: Annotated[
        Path | None, typer.Option(help="A run on these samples: labels, predictions, errors and splits.")
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", metavar="COLUMN[,COLUMN...]", help="Labels, where there is no run.")
    ] = None,
    by: Annotated[
        str | None, typer.Option(metavar="COLUMN[,COLUMN...]", help="Columns of the manifest to colour by, too.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    method: Annotated[
        MethodChoice, typer.Option(help="pca, or tsne (minutes for 20,000 samples).", rich_help_panel=PAGE)
    ] = MethodChoice.pca,
    images: Annotated[
        str,
        typer.Option(
            metavar="auto|N|none", help="How many samples have pictures; none for privacy.", rich_help_panel=PAGE
        ),
    ] = "auto",
    points: Annotated[int, typer.Option(help="The most samples on the page.", rich_help_panel=PAGE)] = 20_000,
    near: Annotated[int, typer.Option(help="Neighbours listed for each sample.", rich_help_panel=PAGE)] = 8,
    alike: Annotated[
        float, typer.Option(help="Cosine from which two samples are near-duplicates.", rich_help_panel=PAGE)
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the map and of the choice of samples.", rich_help_panel=PAGE)] = 0,
    parquet: Annotated[
        Path | None,
        typer.Option(help="Also write x, y and pictures of all samples, for other viewers.", rich_help_panel=PAGE),
    ] = None,
    views: two.Views = None,
    tap: two.Tap = None,
    recipe: two.RecipeDigest = None,
    missing: opt.MissingOption = opt.MissingChoice.zero,
    allow_partial: two.AllowPartial = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Draw a map of the cached features: look at samples, their neighbours, near-duplicates and likely label errors."""
    with command("explore", as_json=as_json, quiet=quiet, debug=debug, journals=(store, run)) as output:
        from dataclasses import asdict

        from featurecache.dataset import FeatureDataset
        from featurecache.reporting.explore import explore as write
        from featurecache.run import load_run

        opened = None if run is None else load_run(run)
        data = FeatureDataset(
            store,
            dataset=dataset,
            target=opt.listed(target) or None,
            views=opt.listed(views) or (opened.views if opened is not None and opened.kind == "head" else None),
            tap=opt.taps(tap, opt.named_views(tap)) or run_taps(opened),
            recipe=opt.per_view("--recipe", recipe, opt.named_views(recipe)) or None,
            missing=str(missing),
            allow_partial=allow_partial,
        )
        try:
            made = write(
                data,
                out,
                run=opened,
                by=opt.listed(by),
                method=method.value,
                points=points,
                images="auto" if images == "auto" else two.image_count(images, "auto, none"),
                near=near,
                alike=alike,
                seed=seed,
                parquet=parquet,
                overwrite=overwrite,
            )
        finally:
            data.store.close()
        size = made.path.stat().st_size
        output.outputs = [str(path) for path in (made.path, made.parquet) if path is not None]
        output.figures = {
            **{name: value for name, value in asdict(made).items() if name not in ("path", "parquet")},
            "method": method.value,
            "bytes": size,
        }
        for line in made.lines():
            output.text(line)
        output.next = f"open {made.path} in a browser"


def run_taps(run: Run | None) -> dict[str, list[str]] | None:
    """The taps that a head was fitted on, so that the map shows what it saw."""
    if run is None or run.kind != "head":
        return None
    return {view: [str(tap) for tap in taps] for view, taps in run.record.get("tap", {}).items()}
