"""Sections of a report that help to judge the model: what views add, its mistakes, heat maps, how it was trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from featurecache.reporting import drawn
from featurecache.reporting.material import Material
from featurecache.reporting.measured import kept_epoch, learning
from featurecache.reporting.wording import CALIBRATIONS, metric_name, number

ARMS = {
    "alone": "{} alone",
    "fused": "all views, fused on features",
    "late": "all views, mean of their probabilities",
    "missing": "all views, {} missing at test",
    "shuffled": "all views, partners of other samples",
}
TRIALS = 5  # listed
WEIGHTING = ("class_weight", "pos_weight")
JOINT = (
    "epochs", "freeze_epochs", "unfreeze", "lr", "body_lr", "warm_up", "weight_decay", "clip", "accumulate", "ema",
    "batch_size", "patience", "view_dropout", "share_bodies", "train_from", "augment",
)  # fmt: skip
"""What joint training goes by; where the head has a setting of that name, it is not used."""
MOST_MAPS = 12


def views(material: Material) -> dict[str, Any] | None:
    """What an ablation found, and the share of each view in what the head goes by."""
    if material.evaluation is not None or len(material.record["views"]) < 2:
        return None
    ablation = material.json("ablation/ablation.json")
    importance = material.json("importance.json")
    shares = [(view, float(share)) for view, share in (importance.get("views") or {}).items()]
    taps = [(f"{tap['view']} {tap['tap']}", float(tap["share"])) for tap in importance.get("taps") or ()]
    return {
        "conclusions": [_readable(text, ablation) for text in ablation.get("conclusions") or ()],
        "arms": [_arm(arm) for arm in ablation.get("arms") or ()],
        "heads": len({arm["head"] for arm in ablation.get("arms") or ()}),
        "metric": metric_name(str(ablation.get("metric") or "")),
        "about": ablation,
        "shares": shares,
        "taps": taps if len(taps) > len(shares) else [],
        "kind": str(importance.get("kind") or ""),
    }


def _readable(text: str, ablation: Mapping[str, Any]) -> str:
    """A conclusion with the metric called as on the rest of the page."""
    name = str(ablation.get("metric") or "")
    return text.replace(f" {name} ", f" {metric_name(name)} ") if name else text


def _arm(arm: Mapping[str, Any]) -> dict[str, Any]:
    kind, _, view = str(arm["arm"]).partition(":")
    inside = all(arm.get(name) is not None and 0 <= arm[name] <= 1 for name in ("test", "test_low", "test_high"))
    return {**arm, "name": ARMS.get(kind, str(arm["arm"])).format(view), "track": inside}


def mistakes(material: Material) -> dict[str, Any] | None:
    """The most confident mistakes, and the samples where one view alone was right."""
    found = material.json("mistakes.json")
    kinds = {name: [_shown(material, entry) for entry in found.get(name) or ()] for name in
             ("mistakes", "one_view_right")}  # fmt: skip
    if not any(kinds.values()):
        return None
    notes = [str(note) for note in found.get("notes") or ()]
    return {**kinds, "notes": notes if material.images else ["Pictures are not shown."]}


def _shown(material: Material, entry: Mapping[str, Any]) -> dict[str, Any]:
    pictures = [
        {"view": picture["view"], "text": picture.get("text") or "", "uri": material.picture(picture["file"])}
        for picture in entry.get("pictures") or ()
        if picture.get("file") or picture.get("text")
    ]
    single = [
        {"view": view, **said, "right": said["prediction"] == entry["target"]}
        for view, said in (entry.get("single") or {}).items()
    ]
    return {
        **entry,
        "label": entry.get("label") or "",
        "pictures": [picture for picture in pictures if picture["uri"] or (material.images and picture["text"])],
        "single": single,
    }


def heat_maps(material: Material) -> dict[str, Any] | None:
    """The heat maps that `featurecache explain` left in explain/, listed in explain/explain.json.

    Of each entry of `samples`: `sample_id`, `file` (a picture of all views side by side), and, where they are known,
    `target`, `prediction`, `alt`.
    """
    found = material.json("explain/explain.json")
    shown = []
    for entry in (found.get("samples") or ())[:MOST_MAPS]:
        uri = material.picture(f"explain/{entry.get('file', '')}")
        if uri:
            said = {name: str(entry.get(name) or "") for name in ("sample_id", "target", "prediction", "alt")}
            shown.append({**said, "uri": uri})
    return {"shown": shown, "method": str(found.get("method") or "")} if shown else None


def training(material: Material) -> dict[str, Any] | None:
    """Settings of the head, weighting, calibration, learning curves and trials."""
    record = material.record
    if material.evaluation is not None:
        return None
    settings = dict((record.get("head") or {}).get("settings") or {})
    if record["kind"] == "joint":
        settings |= {name: record["config"][name] for name in JOINT if name in record["config"]}
    weighting = {name: settings.pop(name) for name in WEIGHTING if name in settings}
    weights = ", ".join(f"{name} {_plain(value)}" for name, value in weighting.items() if value not in (None, False))
    calibration = record.get("calibration") or {}
    method = str(calibration.get("method") or "")
    temperature = (calibration.get("parameters") or [None])[0] if method == "temperature" else None
    said = CALIBRATIONS.get(method, method)
    if isinstance(temperature, int | float):
        said += f", temperature {number(float(temperature))}"
    trials = material.table("trials.csv")
    plots = learning(material)
    if "tuning" in record and not trials.is_empty():
        plots.append(drawn.trials_plot(trials, str(record["tuning"]["metric"])))
    return {
        "settings": ", ".join(f"{name} {_plain(value)}" for name, value in settings.items()),
        "kept": _kept(material),
        "weights": weights or "none: every sample counts the same",
        "calibration": f"{said}, fitted on validation samples only" if said else "none: probabilities as the head says",
        "seconds": record.get("seconds_fit"),
        "plots": plots,
        "tuning": _tuning(record, trials),
    }


def _kept(material: Material) -> str:
    """Whose weights were kept; empty where that is not known, or there is no such choice."""
    epoch, history = kept_epoch(material), material.table("history.csv")
    if epoch is None:
        return ""
    if "round" in history.columns:
        return f"the first {epoch:,} of {history.height:,} rounds, with the lowest validation loss"
    return f"those of epoch {epoch}, with the lowest validation loss" if epoch else "those of the start"


def _tuning(record: Mapping[str, Any], trials: pl.DataFrame) -> dict[str, Any] | None:
    about = record.get("tuning")
    if not about or trials.is_empty():
        return None
    value = f"valid_{about['metric']}"
    low = about["metric"] in ("log_loss", "brier", "ece", "rmse", "mae")
    final = trials.filter(pl.col("division") == "final") if "division" in trials.columns else trials
    best = final.drop_nulls(value).sort(value, descending=not low, maintain_order=True).head(TRIALS)
    known = ("division", "trial", "state", "seconds", value)
    names = [name for name in best.columns if name not in known]
    return {
        "n": trials.height,
        "ended": int((trials["state"] == "pruned").sum()),
        "metric": metric_name(str(about["metric"])),
        "nested": bool(about.get("nested")),
        "columns": names,
        "rows": [
            {"trial": row["trial"], "value": row[value], "settings": [_plain(row[name]) for name in names]}
            for row in best.iter_rows(named=True)
        ],
    }


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return (
            ", ".join(f"{_plain(each)}{'' if name == '*' else f' of {name}'}" for name, each in value.items()) or "none"
        )
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
