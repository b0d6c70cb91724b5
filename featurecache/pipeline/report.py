"""What a pipeline came to: summary.json for scripts, report.html for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from featurecache.pipeline.config import RUNS
from featurecache.pipeline.pipeline import Pipeline
from featurecache.pipeline.plan import Step
from featurecache.reporting.overview import Row, Sample, png_uri, write_overview
from featurecache.rundir.record import dump_json

MOST_SAMPLES = 12
MOST_BYTES = 200_000  # of a picture that is put into the page


def write_reports(pipeline: Pipeline) -> Path:
    """summary.json and report.html in the pipeline's folder; returns the page."""
    folder, config = pipeline.folder, pipeline.config
    stages = [{"kind": s.kind, "name": s.name, "state": s.state, **s.figures} for s in pipeline.steps]
    (folder / "summary.json").write_text(
        dump_json({"schema": 1, "title": config.title, "stages": stages}), encoding="utf-8"
    )
    metrics = sorted({str(step.figures["metric"]) for step in pipeline.steps if "test" in step.figures})
    return write_overview(
        folder / "report.html",
        title=config.title or folder.name,
        lead=f"{pipeline.manifest.table.height:,} samples, views {', '.join(pipeline.manifest.views)}.",
        rows=list(rows(pipeline)),
        samples=list(samples(pipeline)),
        metric=" and ".join(metrics).replace("_", " "),
        reference="the run that comes first on the validation samples",
        lists=list(lists(pipeline)),
    )


def lists(pipeline: Pipeline) -> Iterator[tuple[str, list[str]]]:
    """What ablations say, what to know of compared runs, and what a body with its own classifier saw."""
    for step in pipeline.steps:
        if conclusions := step.figures.get("conclusions"):
            yield step.name, list(conclusions)
        if step.kind == "compare":
            noted = [f"{row['run']}: {row['note']}" for row in step.figures["runs"] if row.get("note")]
            if noted := [*step.figures.get("notes", ()), *noted]:
                yield step.name, noted
        if step.kind == "classify":
            yield f"{step.stage.body}: {step.name}", [seen(row) for row in step.figures["images"]]


def seen(row: Mapping[str, Any]) -> str:
    """`apple.png: Granny Smith 0.81, pomegranate 0.05`."""
    best = ", ".join(f"{name} {value:.2f}" for name, value in row.get("classes", ()))
    return f"{row['file']}: {best or row.get('error')}"


def rows(pipeline: Pipeline) -> Iterator[Row]:
    """A line per run; differences where a comparison knows them."""
    compared = {row["run"]: row for step in pipeline.steps if step.kind == "compare" for row in step.figures["runs"]}
    for step in pipeline.steps:
        if step.kind not in RUNS or step.figures.get("test") is None:
            continue
        found = compared.get(step.name, {})
        difference = (found["difference"], found["low"], found["high"]) if found.get("low") is not None else None
        value = float(step.figures["test"])
        low, high = step.figures.get("test_low"), step.figures.get("test_high")
        yield Row(
            title=title_of(step),
            run=f"runs/{step.name}",
            n=int(step.figures["n_test"]),
            value=value,
            low=value if low is None else float(low),
            high=value if high is None else float(high),
            difference=difference,
            reference=found.get("words") == "the first",
        )


def title_of(step: Step) -> str:
    """`fc (fit)`."""
    return f"{step.name} ({step.kind}, {step.stage.head})" if step.kind != "joint" else f"{step.name} (joint)"


def samples(pipeline: Pipeline) -> Iterator[Sample]:
    """The first samples whose views are all small PNG files, with their target."""
    manifest, target = pipeline.manifest, pipeline.config.data.target
    count = 0
    for row, cells in manifest.cells.group_by("sample", maintain_order=True):
        there = cells.filter((pl.col("ordinal") == 0) & pl.col("location").is_not_null())
        files = [(view, Path(file)) for view, file in there.select("view", "location").iter_rows()]
        small = [each for each in files if each[1].suffix.lower() == ".png" and each[1].stat().st_size <= MOST_BYTES]
        if not small or len(small) < len(files):
            continue
        table = manifest.table.row(int(str(row[0])), named=True)
        label = str(table.get(target[0], "")) if len(target) == 1 else ""
        yield Sample(str(table["sample_id"]), label, tuple((view, png_uri(file)) for view, file in small))
        count += 1
        if count == MOST_SAMPLES:
            return
