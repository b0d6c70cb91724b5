"""`featurecache predict` and `evaluate`: a run on new samples, from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurecache.cli import options as opt
from featurecache.cli import stagetwo as two
from featurecache.cli.heads import flat_metrics, metric_line, split_label
from featurecache.cli.output import Debug, Json, Output, Quiet, command
from featurecache.cli.progress import reporter

if TYPE_CHECKING:
    from featurecache.evaluation.subgroups import Subgroup
    from featurecache.newsamples import NewSamples
    from featurecache.run import Run

RUN = Annotated[Path, typer.Argument(help="A run of fit-head or finetune-joint.")]
STORE = Annotated[Path | None, typer.Option(help="Keep features here: the next time only new images are computed.")]
TTA = Annotated[int, typer.Option("--tta", metavar="N", help="Joint runs: average N augmented versions.")]
PREDICT_EPILOG = (
    "Example: featurecache predict runs/xgb new.csv --out preds.csv --store cache. Single files of a two-view run: "
    "featurecache predict runs/xgb frontal=a.png lateral=b.png --out preds.csv"
)
MOST_SHOWN = 20  # subgroups on the screen
EVALUATE_EPILOG = "Example: featurecache evaluate runs/xgb external.csv --store cache --by site"


def new_samples(run: Run, params: dict[str, Any], sources: tuple[str, ...]) -> NewSamples:
    """What the parameters say about the new samples."""
    from featurecache.newsamples import NewSamples

    return NewSamples(
        sources=sources,
        store=params["store"],
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
        tta=params["tta"],
    )


def predict(
    ctx: typer.Context,
    run: RUN,
    sources: Annotated[
        list[str], typer.Argument(metavar="MANIFEST|FILE...", help="A table or folder, or image files.")
    ],
    out: Annotated[Path, typer.Option(help=".csv or .parquet.")],
    store: STORE = None,
    view: opt.View = None,
    id: opt.Id = None,
    root: opt.Root = None,
    allow_outside: opt.AllowOutside = False,
    body: opt.BodyOption = None,
    weights: opt.Weights = None,
    trust_factory: opt.TrustFactory = None,
    device: opt.DeviceOption = "auto",
    batch_size: opt.BatchSize = "auto",
    workers: opt.Workers = "auto",
    tta: TTA = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Predict new samples with a run; head runs go through the cache, so the second time only new images cost."""
    with command("predict", as_json=as_json, quiet=quiet, debug=debug, journals=(run, store)) as output:
        from featurecache.predict import predict as run_prediction
        from featurecache.run import load_run

        loaded = load_run(run)
        with reporter(quiet=quiet) as progress:
            scored, path = run_prediction(loaded, new_samples(loaded, ctx.params, tuple(sources)), out, progress)
        output.outputs = [str(path)]
        output.failed = scored.failures
        output.figures = {"samples": len(scored.sample_ids), "computed": scored.computed, "reused": scored.reused}
        tell_notes(output, scored.notes)
        output.text(f"predicted {len(scored.sample_ids):,} samples into {path}")
        if any(scored.files):
            output.text(f"masks     in {(path.parent / next(filter(None, scored.files))).parent}")
        output.text(f"images    computed {scored.computed:,}, reused {scored.reused:,}")
        output.next = f"featurecache evaluate {run} MANIFEST measures on labelled samples"


def evaluate(
    ctx: typer.Context,
    run: RUN,
    manifest: Annotated[str | None, typer.Argument(help="New labelled samples; default the run's own.")] = None,
    store: STORE = None,
    view: opt.View = None,
    id: opt.Id = None,
    root: opt.Root = None,
    allow_outside: opt.AllowOutside = False,
    body: opt.BodyOption = None,
    weights: opt.Weights = None,
    trust_factory: opt.TrustFactory = None,
    device: opt.DeviceOption = "auto",
    batch_size: opt.BatchSize = "auto",
    workers: opt.Workers = "auto",
    tta: TTA = 0,
    by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Measure each value of a column on its own, too.")
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="Without MANIFEST: where COLUMN is, by --id; the run's manifest, say.")
    ] = None,
    at: two.DecideAt = None,
    bootstrap: two.Bootstrap = 1000,
    images: two.Images = "12",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show the metrics of a run, or measure it on new labelled samples or by subgroups into RUN/evaluations/."""
    with command("evaluate", as_json=as_json, quiet=quiet, debug=debug) as output:
        from featurecache.run import load_run

        loaded = load_run(run)
        if manifest is None and by is None and at is None:
            output.outputs = [str(run)]
            output.figures = {"run": str(run), **flat_metrics(loaded.metrics)}
            for split in ("test", "valid", "train"):
                if split in loaded.metrics:
                    output.text(metric_line(split_label(loaded, split), loaded.metrics[split]))
            output.next = f"featurecache evaluate {run} MANIFEST measures on new labelled samples"
            return
        output.journals += [path for path in (run, store) if path is not None]
        from featurecache.evaluate import evaluate as run_evaluation
        from featurecache.evaluate import evaluate_own

        if manifest is None:
            found = evaluate_own(loaded, by=by, table=table, id=ctx.params["id"], at=at, bootstrap=bootstrap)
        else:
            with reporter(quiet=quiet) as progress:
                new = new_samples(loaded, ctx.params, (manifest,))
                found = run_evaluation(
                    loaded, new, by=by, at=at, bootstrap=bootstrap, images=two.image_count(images), reporter=progress
                )
        output.outputs = [str(found.path)]
        output.figures = {"run": str(run), **flat_metrics(found.metrics)}
        if found.scored is not None:
            output.failed = found.scored.failures
            samples = {"samples": len(found.scored.sample_ids)}
            output.figures |= {**samples, "computed": found.scored.computed, "reused": found.scored.reused}
        tell_notes(output, [*(found.scored.notes if found.scored is not None else ()), *found.notes])
        output.text(metric_line(split_label(loaded, "test") if manifest is None else "test", found.metrics["test"]))
        show_subgroups(output, by or "", found.subgroups)
        output.text(f"written   {found.path}")
        output.next = f"open {found.path}/report.html"


def show_subgroups(output: Output, by: str, subgroups: list[Subgroup]) -> None:
    """A line each, and whether it is too small to say much."""
    if not subgroups:
        return
    output.figures["by"] = {"column": by, "subgroups": {part.value: part.to_json() for part in subgroups}}
    for part in subgroups[:MOST_SHOWN]:
        line = metric_line(f"{by}={part.value or '(empty)'}", part.to_json())
        output.text(f"{line}{f'  (small: {part.small})' if part.small else ''}")
    if len(subgroups) > MOST_SHOWN:
        output.text(f"{by}: {len(subgroups) - MOST_SHOWN:,} more values, on the page and in evaluation.json")


def tell_notes(output: Output, notes: list[str]) -> None:
    """What differs from the features that the head was fitted on."""
    output.figures["notes"] = notes
    for note in notes:
        output.text(f"note      {note}")
