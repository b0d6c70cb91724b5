"""`featurecache predict` and `evaluate`: a run on new samples, from the command line."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurecache.amounts import metric_line
from featurecache.calls import flat_metrics
from featurecache.cli import options as opt
from featurecache.cli import stagetwo as two
from featurecache.cli.heads import split_label
from featurecache.cli.newsamples import RunArgument, Sources, Store, Tta, new_samples
from featurecache.cli.output import Debug, Json, Output, Quiet, command, pasteable, typed_command
from featurecache.cli.progress import reporter

if TYPE_CHECKING:
    from featurecache.evaluate import Evaluation
    from featurecache.run import Run

PREDICT_EPILOG = (
    "Example: featurecache predict runs/xgb new.csv --out preds.csv --store cache. Single files of a two-view run: "
    "featurecache predict runs/xgb frontal=a.png lateral=b.png --out preds.csv"
)
EVALUATE_EPILOG = "Example: featurecache evaluate runs/xgb external.csv --store cache --by site"


def predict(
    ctx: typer.Context,
    run: RunArgument,
    sources: Sources,
    out: Annotated[Path, typer.Option(help=".csv or .parquet.")],
    store: Store = None,
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
    tta: Tta = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Predict new samples with a run; with --store the features of a head's run are kept, so only new images cost."""
    with command("predict", as_json=as_json, quiet=quiet, debug=debug, journals=(run, store)) as output:
        from featurecache.predict import predict as run_prediction
        from featurecache.run import load_run

        loaded = load_run(run)
        output.goes_on = store is not None and loaded.kind == "head"
        with reporter(quiet=quiet) as progress:
            scored, path = run_prediction(loaded, new_samples(loaded, ctx.params, *sources), out, progress)
        output.outputs = [str(path)]
        output.failed = scored.failures
        output.figures = {"samples": len(scored.sample_ids), "computed": scored.computed, "reused": scored.reused}
        tell_notes(output, scored.notes)
        output.text(f"predicted {len(scored.sample_ids):,} samples into {path}")
        if any(scored.files):
            output.text(f"masks     in {(path.parent / next(filter(None, scored.files))).parent}")
        output.text(f"images    computed {scored.computed:,}, reused {scored.reused:,}")
        tell_unkept(output, loaded, store)
        labelled = len(sources) == 1 and set(loaded.targets) <= set(scored.table.columns)
        output.next = after_predicting(run, typed_command(), measurable=labelled)


def evaluate(
    ctx: typer.Context,
    run: RunArgument,
    manifest: Annotated[str | None, typer.Argument(help="New labelled samples; default the run's own.")] = None,
    store: Store = None,
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
    tta: Tta = 0,
    by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Measure each value of a column on its own, too.")
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="Without MANIFEST: where COLUMN is, by --id; default the run's own manifest.")
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
            show_metrics(output, loaded)
            return
        output.journals += [path for path in (run, store) if path is not None]
        output.goes_on = store is not None and loaded.kind == "head"
        if manifest is None:
            found = measure_own(loaded, ctx.params)
        else:
            found = measure_new(loaded, manifest, ctx.params)
        show_evaluation(output, loaded, found, by or "")
        if manifest is not None:
            tell_unkept(output, loaded, store)


def after_predicting(run: Path, typed: str, *, measurable: bool) -> str:
    """Measure the same samples, read in the same way; else see how far the run can be trusted."""
    if not measurable:
        return pasteable("evaluate", run)
    words = iter(shlex.split(typed.replace(" predict ", " evaluate ", 1))[1:])
    kept = []
    for word in words:
        if word == "--out":
            next(words, None)
        elif not word.startswith("--out="):
            kept.append(word)
    return pasteable(*kept)


def show_metrics(output: Output, run: Run) -> None:
    """What the run says of itself; nothing is measured."""
    output.outputs = [str(run.path)]
    output.figures = {"run": str(run.path), **flat_metrics(run.metrics)}
    for split in ("test", "valid", "train"):
        if split in run.metrics:
            output.text(metric_line(split_label(run, split), run.metrics[split]))
    output.next = f"open {run.path}/report.html"


def measure_own(run: Run, params: Mapping[str, Any]) -> Evaluation:
    """The run's own samples by subgroups, or decided elsewhere."""
    from featurecache.evaluate import evaluate_own

    wanted = {name: params[name] for name in ("by", "table", "id", "at", "bootstrap")}
    return evaluate_own(run, **wanted, command=typed_command())


def measure_new(run: Run, manifest: str, params: Mapping[str, Any]) -> Evaluation:
    """New labelled samples."""
    from featurecache.evaluate import evaluate as run_evaluation

    with reporter(quiet=params["quiet"]) as progress:
        return run_evaluation(
            run,
            new_samples(run, params, manifest),
            **{name: params[name] for name in ("by", "at", "bootstrap")},
            images=two.image_count(params["images"]),
            command=typed_command(),
            reporter=progress,
        )


def show_evaluation(output: Output, run: Run, found: Evaluation, by: str) -> None:
    """What was measured, of new samples or of the run's own, and of the values of the column `by`."""
    output.outputs = [str(found.path)]
    output.figures = {"run": str(run.path), **flat_metrics(found.metrics)}
    if found.scored is not None:
        output.failed = found.scored.failures
        samples = {"samples": len(found.scored.sample_ids)}
        output.figures |= {**samples, "computed": found.scored.computed, "reused": found.scored.reused}
    output.figures["notes"] = [*(found.scored.notes if found.scored is not None else ()), *found.notes]
    if found.subgroups:
        parts = {part.value: part.to_json() for part in found.subgroups}
        output.figures["by"] = {"column": by, "subgroups": parts}
    for line in found.lines(split_label(run, "test") if found.scored is None else "test"):
        output.text(line)
    output.next = f"open {found.path}/report.html"


def tell_notes(output: Output, notes: list[str]) -> None:
    """What differs from the features that the head was fitted on."""
    output.figures["notes"] = notes
    for note in notes:
        output.text(f"note      {note}")


def tell_unkept(output: Output, run: Run, store: Path | None) -> None:
    """That the same images would be computed once more; a joint run's are each time."""
    if store is None and run.kind == "head":
        output.text("note      features are not kept; with --store STORE only new images are computed the next time")
    elif store is not None and run.kind == "joint":
        output.text("note      --store is not used: a joint run's images go through its network each time")
