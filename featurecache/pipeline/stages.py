"""What is done for each kind of stage; figures come back, as summary.json and the command show them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from featurecache.errors import FeatureCacheError, InputError
from featurecache.pipeline.config import RUNS
from featurecache.pipeline.plan import Layout, Step


def _extract(layout: Layout, step: Step, resume: bool) -> dict[str, Any]:
    from featurecache.extract import extract

    summary = extract(layout.extract_config(step), layout.reporter)
    layout.failed += summary.failures
    if summary.images == summary.failed:
        raise FeatureCacheError(f"[extract] {step.name}: none of the {summary.images:,} images can be read")
    return {"computed": summary.computed, "reused": summary.reused, "n_failed": summary.failed}


def _fit(layout: Layout, step: Step, resume: bool) -> dict[str, Any]:
    from featurecache.crossval import fit_from_config

    return _figures(fit_from_config(layout.fit_config(step), command=layout.command, reporter=layout.reporter))


def _tune(layout: Layout, step: Step, resume: bool) -> dict[str, Any]:
    from featurecache.tune import tune

    trials = layout.run_path(step.name).with_name(f"{step.name}.trials.jsonl")
    if not resume:
        trials.unlink(missing_ok=True)
    run, _ = tune(
        layout.fit_config(step), trials=step.stage.trials, metric=step.stage.metric, storage=trials,
        command=layout.command, reporter=layout.reporter,
    )  # fmt: skip
    return _figures(run)


def _joint(layout: Layout, step: Step, resume: bool) -> dict[str, Any]:
    from featurecache.joint.finetune import finetune_joint

    config = layout.joint_config(step).model_copy(update={"resume": resume})
    run = finetune_joint(config, command=layout.command, reporter=layout.reporter)
    layout.failed += list(run.record.get("failed", ()))
    return _figures(run)


def _figures(run: Any) -> dict[str, Any]:
    """The metrics that a table shows, test first."""
    from featurecache.evaluation.verdict import ranking_metric

    metric = ranking_metric(run.task, None)
    found: dict[str, Any] = {"task": run.task, "metric": metric}
    for split in ("test", "valid"):
        metrics = run.metrics.get(split) or {}
        if metric in metrics:
            found |= {split: metrics[metric], f"n_{split}": metrics["n"]}
        if split == "test" and (ends := (metrics.get("intervals") or {}).get(metric)):
            found |= {"test_low": ends[0], "test_high": ends[1]}
    return {**found, "notes": notes} if (notes := run.record.get("notes")) else found


def _ablate(layout: Layout, step: Step, resume: bool) -> dict[str, Any]:
    from featurecache.fit import open_dataset, torch_device
    from featurecache.reporting.ablate import ablate

    config, stage = layout.fit_config(step).model_copy(update={"replicas": "none"}), step.stage
    found = ablate(
        open_dataset(config), stage.heads, split=config, seeds=stage.seeds, folds=stage.cv, settings=stage.settings,
        metric=stage.metric, bootstrap=config.bootstrap, device=torch_device(config.device), reporter=layout.reporter,
    )  # fmt: skip
    found.write(layout.folder / step.name)
    return {"metric": found.metric, "conclusions": list(found.conclusions)}


def _compare(layout: Layout, step: Step, resume: bool) -> dict[str, Any]:
    from featurecache.reporting.compare import compare_runs
    from featurecache.run import load_run

    names = list(step.stage.runs) or [other.name for other in layout.steps if other.kind in RUNS]
    runs = [load_run(layout.run_path(name)) for name in names]
    if len(runs) < 2:
        raise InputError(f"[compare] {step.name}: needs two runs or more")
    found = compare_runs(runs, names=names, metric=step.stage.metric, n=step.stage.bootstrap, seed=step.stage.seed)
    found.write(layout.folder / f"{step.name}.json")
    return found.to_json()


def _classify(layout: Layout, step: Step, resume: bool) -> dict[str, Any]:
    from featurecache.pipeline.classify import classify

    stage, manifest = step.stage, layout.manifest
    view = stage.view or manifest.views[0]
    if view not in manifest.views:
        raise InputError(f"[classify] {step.name}: no view {view!r}; there are {', '.join(manifest.views)}")
    cells = manifest.cells
    files = cells.filter((cells["view"] == view) & cells["location"].is_not_null())["location"].to_list()
    chosen = [Path(file) for file in files[: stage.images]]
    found = classify(chosen, body=stage.body, weights=stage.weights, top=stage.top, device=stage.device)
    return {"images": found}


STAGES: dict[str, Callable[[Layout, Step, bool], dict[str, Any]]] = {
    "extract": _extract, "fit": _fit, "tune": _tune, "joint": _joint, "ablate": _ablate, "compare": _compare,
    "classify": _classify,
}  # fmt: skip
