"""A declared pipeline from end to end: data, features, heads, joint tuning, comparison; what is done is not done again.

Everything lies in a folder of its own: `data/` (what a maker made), `store/`, `runs/NAME/`, `state/`, `summary.json`,
`report.html`. The store knows what is extracted; all other stages are skipped while the digest of their options and
inputs is the one they were finished with. So a pipeline that was killed goes on with the same command.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from featurecache.errors import FeatureCacheError
from featurecache.heads.base import get_head
from featurecache.pipeline.config import NOWHERE, RUNS, PipelineConfig, read_pipeline
from featurecache.pipeline.makers import check_maker
from featurecache.pipeline.plan import CACHED, TO_RUN, Layout, Step
from featurecache.pipeline.stages import STAGES
from featurecache.pipeline.state import State, whole_run
from featurecache.progress import Reporter, Silent


class Pipeline(Layout):
    """A pipeline that can be planned and run."""

    @cached_property
    def state(self) -> State:
        """What was done by earlier commands."""
        return State(self.folder / "state")

    def run(self) -> list[Step]:
        """Do what is not done yet.

        Raises:
            FeatureCacheError: of the stage that failed; what was complete is kept.
        """
        self.prepare_data()
        for step in self.steps:
            digest = "" if step.kind == "extract" else self.digest(step)
            known = self.finished(step, digest)
            if known is not None:
                step.state, step.figures = CACHED, known
                continue
            self.reporter.note(f"{step.kind} {step.name}")
            start = time.perf_counter()
            resume = self.state.begun(step.name, digest)
            self.state.begin(step.name, digest)
            try:
                step.figures = STAGES[step.kind](self, step, resume)
            except FeatureCacheError as error:
                error.args = (f"{error}{self.kept()}",)
                raise
            step.state = "done"
            if step.kind != "extract":
                step.figures = {**step.figures, "seconds": round(time.perf_counter() - start, 1)}
            elif not step.figures["computed"]:
                step.state = CACHED
            self.state.finish(step.name, digest, step.figures)
        return self.steps

    def kept(self) -> str:
        """Where the runs lie that were done before a stage failed, as a line below its error; empty without any."""
        done = [str(self.folder / "runs" / step.name) for step in self.steps if step.kind in RUNS and step.figures]
        return f"\nDone before, and kept: {', '.join(done)}. The same command goes on behind them." if done else ""

    def plan(self) -> list[Step]:
        """What `run` would do, without doing it: `state` and `why` of every step."""
        made = self.data_is_there()
        if made:
            self.prepare_data()
        changed: set[str] = set()
        for step in self.steps:
            first = next((name for name in step.needs if name in changed), None)
            if not made:
                step.why = "the data are yet to be made"
            elif first is not None:
                step.why = f"{first} runs before"
            elif step.kind == "extract":
                self.plan_features(step)
            else:
                known = self.finished(step, self.digest(step))
                step.state = TO_RUN if known is None else CACHED
                step.figures = known or {}
                if known is None:
                    step.why = "its options or inputs have changed" if self.state.known(step.name) else "new"
            if step.state == TO_RUN:
                changed.add(step.name)
        return self.steps

    def plan_features(self, step: Step) -> None:
        """What stage one would compute."""
        from featurecache.stageone.dryrun import plan_extract

        found = plan_extract(self.extract_config(step)).to_json()
        step.figures = {name: found[name] for name in ("reused", "to_compute") if name in found}
        count = int(found["to_compute"])
        step.state = TO_RUN if count or self.manifest.digest != self.bound_manifest(step.name) else CACHED
        step.why = f"{count:,} images to compute, {found['reused']:,} reused"

    def finished(self, step: Step, digest: str) -> dict[str, Any] | None:
        """The figures of a stage that is done and whole."""
        known = self.state.finished(step.name, digest) if step.kind != "extract" else None
        if known is not None and step.kind in RUNS and whole_run(self.run_path(step.name)) is None:
            return None
        return known


def check_settings(path: Path, config: PipelineConfig) -> None:
    """Refuse settings that a stage's head does not know, before anything runs.

    Raises:
        InputError: names stage, head and setting.
    """
    fitted = {stage.called: stage.head for kind, stage in config.stages() if kind == "fit"}
    for kind, stage in config.stages():
        if kind in ("fit", "tune"):
            by_head = {stage.head: stage.settings}
        elif kind == "ablate":
            by_head = {head: stage.settings.get(head, {}) for head in stage.heads}
        else:
            by_head = {fitted.get(str(stage.init), stage.head): stage.settings} if kind == "joint" else {}
        for head, settings in by_head.items():
            get_head(head).Settings.create(settings, source=f"{path}: {kind} {stage.called!r}, settings of head {head}")


def open_pipeline(
    path: Path,
    out: Path,
    *,
    changes: Mapping[str, Any] | None = None,
    variant: str | None = None,
    command: str = "",
    reporter: Reporter | None = None,
) -> Pipeline:
    """Read and check a pipeline; its folder is `out/<stem of the file>`.

    Raises:
        MissingFileError: there is no such file.
        InputError: it is not valid.
    """
    config = read_pipeline(path, changes, variant)
    if config.data.manifest == NOWHERE:
        check_maker(str(config.data.maker), config.data.options)
    check_settings(path, config)
    return Pipeline(config, out / path.stem, command, reporter or Silent())
