"""The Python API, continued: a declared pipeline as one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featurecache.calls import also, journaled
from featurecache.pipeline.pipeline import open_pipeline
from featurecache.pipeline.plan import Step
from featurecache.pipeline.report import write_reports
from featurecache.progress import Reporter


@dataclass(frozen=True)
class PipelineDone:
    """What a pipeline did, or would do.

    Attributes:
        folder: that everything lies in.
        steps: in their order; each with `kind`, `name`, `state`, and `figures`, or `why` after a dry run.
        report: the page; None after a dry run.
        failures: samples that failed: sample_id, view, path, error.
    """

    folder: Path
    steps: list[Step]
    report: Path | None = None
    failures: list[dict[str, str]] = field(default_factory=list)


@journaled()
def run_pipeline(
    file: str | Path,
    out: str | Path = "runs",
    *,
    changes: Mapping[str, Any] | None = None,
    variant: str | None = None,
    dry_run: bool = False,
    command: str = "",
    reporter: Reporter | None = None,
) -> PipelineDone:
    """Run a declared pipeline: data, features, heads, joint tuning, comparison; what is done is not done again.

    Args:
        file: a TOML file, or the name of a recipe that comes along, such as `joint`.
        out: everything goes into `out/<stem of the file>`.
        changes: options in the place of the file's: `{"extract.image_size": 96}`.
        variant: a set of changes that the file names, such as `real`.
        dry_run: only say what would run and why.
        command: that runs record.
        reporter: told of progress.

    Raises:
        MissingFileError: there is no such file.
        InputError: it is not valid.
        FeatureCacheError: of the stage that failed; what was complete is kept.
    """
    opened = open_pipeline(
        Path(file), Path(out), changes=changes, variant=variant, command=command, reporter=reporter
    )  # fmt: skip
    if dry_run:
        return PipelineDone(opened.folder, opened.plan())
    also(opened.folder / "store")
    steps = opened.run()
    return PipelineDone(opened.folder, steps, write_reports(opened), opened.failed)
