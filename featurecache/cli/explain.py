"""`featurecache explain` and `show-features`: where a model looks, and what a layer sees, as pictures."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from featurecache.cli import options as opt
from featurecache.cli.newsamples import RunArgument, Sources, new_samples
from featurecache.cli.output import Debug, Json, Quiet, command, pasteable
from featurecache.cli.progress import reporter

EXPLAIN_EPILOG = "Example: featurecache explain runs/xgb manifest.csv --method occlusion --samples s17,s204"
SHOW_EPILOG = "Example: featurecache show-features chest.png --body torchvision/resnet18 --tap layer1 --out maps.png"


class AttributionChoice(StrEnum):
    """How pixels get their share."""

    gradcam = "gradcam"
    occlusion = "occlusion"
    gradient_shap = "gradient-shap"
    guided_backprop = "guided-backprop"


def explain(
    ctx: typer.Context,
    run: RunArgument,
    sources: Sources,
    method: Annotated[
        AttributionChoice,
        typer.Option(help="gradcam: by gradient, coarse; occlusion: any head, slow; the others: fine, by gradient."),
    ] = AttributionChoice.gradcam,
    samples: Annotated[str, typer.Option(metavar="ID,...|N", help="Which samples, or how many, evenly.")] = "6",
    output: Annotated[
        str | None,
        typer.Option("--class", metavar="NAME", help="Class, label or target; default what the model says."),
    ] = None,
    layer: Annotated[str, typer.Option(help="Module that Grad-CAM looks at; default the last with a map.")] = "",
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures; default RUN/explain, replaced.")] = None,
    seed: Annotated[int, typer.Option(help="Of gradient-shap.")] = 0,
    view: opt.View = None,
    id: opt.Id = None,
    root: opt.Root = None,
    allow_outside: opt.AllowOutside = False,
    body: opt.BodyOption = None,
    weights: opt.Weights = None,
    trust_factory: opt.TrustFactory = None,
    device: opt.DeviceOption = "auto",
    batch_size: Annotated[
        str, typer.Option(help="Changed images in one pass of occlusion, or auto: 16.", rich_help_panel=opt.DEVICE)
    ] = "auto",
    workers: opt.Workers = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Draw per sample all views side by side with the heat map for a class; `report` takes them over."""
    with command("explain", as_json=as_json, quiet=quiet, debug=debug, journals=(run,)) as result:
        from featurecache.reporting.explain import explain as draw
        from featurecache.run import load_run

        loaded = load_run(run)
        with reporter(quiet=quiet) as progress:
            made = draw(
                loaded,
                new_samples(loaded, ctx.params, *sources),
                method=method.value,
                samples=samples,
                output=output,
                layer=layer,
                out=out,
                seed=seed,
                reporter=progress,
            )
        result.outputs = [str(made.folder / entry["file"]) for entry in made.samples]
        result.failed = made.failures
        result.figures = {
            "folder": str(made.folder), "method": method.value, "samples": made.samples, "notes": made.notes
        }  # fmt: skip
        for entry in made.samples:
            place = entry["hottest"]
            where = f"hottest in {place['view']} at {place['x']}, {place['y']}" if place else "no part speaks for it"
            result.text(f"{made.folder / entry['file']}: {entry['class']} {entry['score']:.3g}, {where}")
        for note in made.notes:
            result.text(f"note      {note}")
        result.text("A heat map shows what the score hangs on, not why, and not whether that is right.")
        result.next = f"look at {made.folder}" if out else pasteable("report", run)


def show_features(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    body: Annotated[str, typer.Option(help="See `featurecache bodies list`; run:DIR for a run's.")],
    tap: Annotated[str, typer.Option(help="A module that gives maps; see `featurecache bodies show BODY`.")],
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("features.png"),
    weights: Annotated[str, typer.Option(help="DEFAULT, shipped, none, or a file.")] = "DEFAULT",
    view: Annotated[str | None, typer.Option(help="Which body of a run.")] = None,
    reader: Annotated[str, typer.Option(help="Of the file; auto: as it is.")] = "auto",
    image_size: Annotated[int | None, typer.Option(help="Default: what the body expects.")] = None,
    most: Annotated[int, typer.Option(help="How many channels, the strongest first.")] = 64,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")] = False,
    trust_factory: opt.TrustFactory = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Draw the feature maps that a layer gives for one image."""
    with command("show-features", as_json=as_json, quiet=quiet, debug=debug) as output:
        from featurecache.looking import show_features as draw

        found = draw(
            image,
            out,
            body=body,
            tap=tap,
            weights=weights,
            view=view,
            reader=reader,
            image_size=image_size,
            most=most,
            overwrite=overwrite,
            trust_factory=trust_factory or (),
        )
        output.outputs = [str(out)]
        output.figures = found
        output.text(f"{out}: {len(found['shown'])} of {found['shape'][0]} maps of {tap}")
