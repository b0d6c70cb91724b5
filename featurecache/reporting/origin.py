"""Sections of a report on where its figures come from: samples, split, views, a person's word, how to do it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from featurecache.reporting.material import SPLITS, Material
from featurecache.reporting.wording import STATED, head_name, input_text, number, percent, split_name, tap_text
from featurecache.rundir.predictions import Predictions

MISSING = {
    "zero": "Samples that lack a view are kept",
    "drop": "Samples that lack a view are left out",
    "error": "No sample may lack a view",
}
STANDS_FOR = {
    "xgboost": "; their features count as missing",
    "fc": "; zeros stand for it, beside an indicator",
    "logistic": "; zeros stand for it, beside an indicator",
}


def facts(material: Material) -> list[tuple[str, str]]:
    """What the model is, in a few lines."""
    record = material.record
    bodies = dict.fromkeys(str(recipe["recipe"]["body"]["architecture"]) for recipe in record["recipes"].values())
    what = ", ".join(record["targets"][:4]) + (f" and {len(record['targets']) - 4} more" * (len(record["targets"]) > 4))
    if record["task"] in ("multiclass", "dense"):
        what += f", {len(record['classes'])} classes"
    kind = "network tuned as one" if record["kind"] == "joint" else f"{head_name(record) or 'fitted'} head"
    found = [("task", f"{record['task']}: {what}")]
    if record["task"] == "binary":
        found.append(("positive class", f"{record['targets'][0]} = {record['classes'][-1]}"))
    found.append(("model", f"{kind} on {', '.join(bodies) or 'features'}"))
    found.append(("views", ", ".join(record["views"])))
    if record.get("binding"):
        found.append(("data", str(record["binding"].get("dataset") or "")))
    if material.evaluation is not None:
        own = material.evaluation.get("manifest")
        found.append(("measured on", own or "the run's own test samples"))
    seed = (record.get("split") or {}).get("seed", record["config"].get("seed"))
    if seed is not None:
        found.append(("seed", str(seed)))
    made = str(record.get("created", "")).partition("T")[0]
    found.append(("made", f"featurecache {record['featurecache']}" + (f", {made}" if made else "")))
    return [(name, value) for name, value in found if value]


def how_evaluated(material: Material) -> list[str]:
    """Sentences on an evaluation."""
    evaluation = material.evaluation or {}
    found = [str(note)[:1].upper() + str(note)[1:] + "." for note in evaluation.get("notes") or ()]
    failed = evaluation.get("failed") or ()
    if failed:
        found.append(f"{len(failed):,} images or samples could not be used.")
    return found


def samples(material: Material) -> dict[str, Any] | None:
    """Flow from manifest to split, and per split its size, targets and views."""
    record, rows = material.record, []
    for split in SPLITS:
        part = material.predictions.of(split)
        if not (n := len(part.sample_ids)):
            continue
        had = [set(text.split("+")) for text in part.views]
        complete = [(view, sum(view in views for views in had) / n) for view in record["views"]]
        name = material.split_name if material.evaluation is not None else split_name(record, split)
        groups = len(np.unique(part.groups))
        rows.append({"split": name, "n": n, "groups": groups, "targets": target_counts(part), "views": complete})
    flow = (record if material.evaluation is None else material.evaluation).get("flow") or {}
    used = {
        split_name(record, side) if material.evaluation is None else material.split_name: count
        for side, count in (flow.get("used") or {}).items()
    }
    return {"rows": rows, "flow": flow, "used": used, "left_out": [] if flow else left_out(material)}


def left_out(material: Material) -> list[str]:
    """What did not take part, in words, where the run has not kept its flow."""
    record, predictions = material.record, material.predictions
    if material.evaluation is not None:
        record = {}
    failed = record.get("n_failed", len(record.get("failed") or ()))
    counts = (
        (int(record.get("n_dropped") or 0), "dropped for a missing view"),
        (int(failed or 0), "not readable"),
        (int((~predictions.known()).sum()), "without a known target"),
        (int(((predictions.splits == "") & predictions.known()).sum()), "in no split"),
    )
    return [f"{count:,} {why}" for count, why in counts if count]


def target_counts(part: Predictions) -> str:
    """Events and prevalence, sizes of classes, or mean and spread, in words."""
    n = len(part.sample_ids)
    if part.task == "binary":
        events = int((part.true == 1).sum())
        return f"{part.names[0]} = {part.classes[1]}: {events:,} ({percent(events / n)})"
    if part.task == "multiclass":
        counts = np.bincount(part.true, minlength=len(part.classes))
        return f"{len(counts)} classes, {counts.min():,} to {counts.max():,} samples each"
    if part.task == "dense":
        shares = part.true.sum(axis=0) / max(part.true.sum(), 1)
        return "pixels: " + ", ".join(f"{c} {percent(float(s))}" for c, s in zip(part.classes, shares, strict=True))
    if part.task == "multilabel":
        known = ~np.isnan(part.true)
        return f"{len(part.names)} labels, {int(np.nansum(part.true)):,} positive of {int(known.sum()):,} known"
    described = []
    for column, name in enumerate(part.names[:4]):
        mean, spread = np.nanmean(part.true[:, column]), np.nanstd(part.true[:, column])
        described.append(f"{name} {number(float(mean))} \N{PLUS-MINUS SIGN} {number(float(spread))}")
    return ", ".join(described)


def split(material: Material) -> dict[str, Any] | None:
    """How the samples were divided, and whether anything is on two sides."""
    record = material.record
    about = record.get("split") or {}
    if not about or material.evaluation is not None:
        return None
    check = record.get("leak_check") or {}
    level = about.get("group")
    if cv := record.get("cv"):
        how = f"{cv['folds']} folds, stratified by target; each sample is tested once (seed {about['seed']})."
    elif about.get("split", "auto") == "auto":
        shares = f"{percent(about['valid'])} validation, {percent(about['test'])} test"
        how = f"Drawn at random, stratified by target: {shares} (seed {about['seed']})."
    else:
        how = f"As the column {about['split']} of the manifest says."
    kept = f"All samples with the same {level} are on one side." if level else "Each sample stands for itself."
    torn = int(check.get("torn_groups") or 0) + int(check.get("torn_images") or 0)
    return {"how": how, "kept": kept, "check": check, "torn": torn}


def recipes(material: Material) -> dict[str, Any] | None:
    """Per view its body, tap and preprocessing; what becomes of a missing view."""
    record = material.record
    rows = [_recipe(view, recipe) for view, recipe in record["recipes"].items()]
    wanted = str(record.get("missing") or record["config"].get("missing") or "")
    policy = MISSING.get(wanted, "")
    if wanted == "zero":
        policy += STANDS_FOR.get(str((record.get("head") or {}).get("name", "")), "")
    return {"rows": rows, "policy": policy and f"{policy}."}


def _recipe(view: str, recipe: Mapping[str, Any]) -> dict[str, str]:
    """One view's recipe in the words of a person; the whole of it stands in the details."""
    fields: Mapping[str, Any] = recipe["recipe"]
    steps = fields["preprocessing"]
    more = [str(steps["interpolation"])] if steps.get("interpolation") else []
    for name in ("mean", "std"):
        if steps.get(name):
            more.append(f"{name} {', '.join(f'{value:g}' for value in steps[name])}")
    return {
        "view": view,
        "body": str(fields["body"]["architecture"]),
        "tap": ", ".join(tap_text(tap) for tap in fields["taps"]),
        "input": input_text(steps, fields["reader"].get("parameters", {}).get("channels", 3)),
        "more": "; ".join(more),
        "reader": str(fields["reader"]["name"]),
        "computed": " ".join(str(fields[n]) for n in ("engine", "precision", "storage_dtype") if fields.get(n)),
        "digest": str(recipe.get("digest", ""))[:16],
    }


def stated(material: Material) -> dict[str, Any] | None:
    """What only a person can state; what nobody stated says so."""
    about = material.about()
    rows = [(title, str(getattr(about, name))) for name, title in STATED.items()]
    return {"rows": rows, "missing": not any(text for _, text in rows)}


def again(material: Material) -> dict[str, Any] | None:
    """Command, versions, digests, and the whole configuration."""
    record = material.record
    details = {
        name: json.dumps(record[name], indent=1, ensure_ascii=False)
        for name in ("head", "config", "recipes", "bodies", "split")
        if record.get(name)
    }
    measured = str((material.evaluation or {}).get("command") or "")
    return {"details": details, "evaluated": material.evaluation is not None, "measured": measured}
