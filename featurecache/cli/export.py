"""`featurecache export`: cached features into a file for other programs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from featurecache.amounts import counted, human_bytes
from featurecache.cli import options as opt
from featurecache.cli import stagetwo as two
from featurecache.cli.output import Debug, Json, Quiet, command

EPILOG = "Example: featurecache export cache --dataset manifest --format parquet --out features.parquet"


class FormatChoice(StrEnum):
    """Kinds of files."""

    parquet = "parquet"
    npz = "npz"
    csv = "csv"


def export(
    store: two.Store,
    dataset: two.Dataset,
    out: Annotated[Path, typer.Option(help="The file to write.")],
    format: Annotated[FormatChoice, typer.Option(help="Kind of file.")] = FormatChoice.parquet,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")] = False,
    views: two.Views = None,
    tap: two.Tap = None,
    recipe: two.RecipeDigest = None,
    missing: opt.MissingOption = opt.MissingChoice.zero,
    allow_partial: two.AllowPartial = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the features of a dataset with sample ids and the manifest's columns, a row per sample."""
    with command("export", as_json=as_json, quiet=quiet, debug=debug, journals=(store,)) as output:
        from featurecache.dataset import FeatureDataset
        from featurecache.export import export as write

        data = FeatureDataset(
            store,
            dataset=dataset,
            views=opt.listed(views) or None,
            tap=opt.taps(tap, opt.named_views(tap)) or None,
            recipe=opt.per_view("--recipe", recipe, opt.named_views(recipe)) or None,
            missing=str(missing),
            allow_partial=allow_partial,
        )
        path = write(data.features, data.table, out, format=format.value, overwrite=overwrite)
        size = path.stat().st_size
        output.outputs = [str(path)]
        output.figures = {
            "samples": len(data),
            "features": data.features.shape[1],
            "views": list(data.views),
            "bytes": size,
            "n_dropped": data.n_dropped,
        }
        held = f"{counted(len(data), 'sample')}, {data.features.shape[1]:,} features"
        output.text(f"exported  {path}: {held} ({human_bytes(size)})")
        if data.n_dropped:
            output.text(f"left out  {counted(data.n_dropped, 'sample')} without the views")
