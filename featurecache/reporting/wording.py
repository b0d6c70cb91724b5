"""Words and number formats that the report and the model card share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = {
    "n": "samples",
    "events": "positive",
    "roc_auc": "AUROC",
    "average_precision": "average precision",
    "log_loss": "log loss",
    "brier": "Brier score",
    "f1": "F1",
    "f1_macro": "F1, mean of classes",
    "mcc": "Matthews correlation",
    "ece": "calibration error",
    "balanced_accuracy": "balanced accuracy",
    "sensitivity_at_90_specificity": "sensitivity at 90 % specificity",
    "ppv": "PPV (precision)",
    "npv": "NPV",
    "r2": "R\N{SUPERSCRIPT TWO}",
    "rmse": "RMSE",
    "mae": "mean absolute error",
    "iou": "IoU",
    "dice": "Dice",
    "sample_iou": "IoU, mean of samples",
    "sample_dice": "Dice, mean of samples",
}
STATED = {
    "intended_use": "Intended use",
    "users": "Users",
    "out_of_scope": "Out of scope",
    "data_source": "Data source and place",
    "data_dates": "Dates of the data",
    "reference_standard": "Reference standard",
    "external_test": "External test",
    "limitations": "Known limitations",
    "licence": "Licence",
    "contact": "Contact",
}  # fields of featurecache.config.About
SPLIT_NAMES = {"test": "test", "valid": "validation", "train": "training"}
HEADLINE = {
    "binary": ("roc_auc", "average_precision", "sensitivity", "specificity", "accuracy"),
    "multiclass": ("accuracy", "balanced_accuracy", "roc_auc", "f1_macro"),
    "multilabel": ("roc_auc", "average_precision", "f1_macro", "brier"),
    "regression": ("r2", "rmse", "mae"),
    "dense": ("iou", "dice", "pixel_accuracy"),
}


RULES = {
    "youden": "Youden's J, the highest sensitivity + specificity",
    "default": "one half, since validation shows one side only",
}
CALIBRATIONS = {"temperature": "temperature scaling", "isotonic": "isotonic regression"}
BOUND_REACHED = (
    "The temperature stopped at an end of the range searched: the validation samples are too few, or too easy, to tell "
    "how sure to be"
)
HEADS = {"fc": "FC", "decoder": "Decoder", "logistic": "Logistic", "xgboost": "XGBoost"}


def input_text(steps: Mapping[str, Any], channels: Any) -> str:
    """What a body gets to see, from the preprocessing of a recipe: `256 -> 224 px, 3 channels`, with a true arrow."""
    resize, crop, mode = steps.get("resize"), steps.get("crop"), steps.get("resize_mode")
    if mode in ("squash", "pad"):
        size = f"{'squashed' if mode == 'squash' else 'padded'} to {crop or resize} px" if crop or resize else ""
    else:
        size = " \N{RIGHTWARDS ARROW} ".join(str(step) for step in (resize, crop) if step)
        size = f"{size} px" if size else ""
    return ", ".join(part for part in (size, f"{channels} channel{'' if channels == 1 else 's'}") if part)


def metric_name(name: str) -> str:
    """`roc_auc` -> `AUROC`; unknown ones with spaces for underscores."""
    return NAMES.get(name, name.replace("_", " "))


def number(value: Any) -> str:
    """Counts with separators, others with three decimals or significant digits; a dash for nothing."""
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if 1e-3 <= abs(value) < 10 or abs(value) < 1e-9 else f"{value:.3g}"


def percent(value: float) -> str:
    """`0.123` -> `12.3 %`, on one line; whole numbers without a decimal."""
    return f"{100 * value:.1f}".removesuffix(".0") + "\N{NO-BREAK SPACE}%"


def interval(values: Any) -> str:
    """`0.912-0.957` with a true dash, in words where a minus stands beside it; nothing for no interval."""
    if not values or None in values:
        return ""
    low, high = values
    return f"{number(low)}{' to ' if low < 0 else chr(0x2013)}{number(high)}"


def tap_text(tap: Any) -> str:
    """A tap of a recipe as the user would write it."""
    if not isinstance(tap, Mapping):
        return str(tap)
    return str(tap.get("name") or tap.get("tap") or tap.get("module") or "")


def split_name(record: Mapping[str, Any], split: str) -> str:
    """What the samples of a split are called: `test`, or `out-of-fold` in a cross-validation."""
    return "out-of-fold" if record.get("cv") and split == "test" else SPLIT_NAMES.get(split, split)


def chosen_on(record: Mapping[str, Any]) -> str:
    """On what the decision threshold was chosen."""
    chosen = str((record.get("threshold") or {}).get("chosen_on") or "")
    name = SPLIT_NAMES.get(chosen, chosen) or "no"
    return f"the kept head's {name}" if record.get("cv") and chosen else name


def how_measured(record: Mapping[str, Any]) -> list[str]:
    """Sentences on a cross-validation and on calibrated probabilities, where there are any."""
    found = []
    if cv := record.get("cv"):
        found.append(
            f"Cross-validated in {cv['folds']} folds: every sample was scored by a head that had not seen it. "
            "The head that is kept was fitted afterwards, on all samples but a share of validation."
        )
        if (record.get("threshold") or {}).get("folds"):
            found.append(
                "Each fold decides by a threshold of its own, chosen on its validation samples; new samples "
                "are decided by that of the kept head."
            )
        if lacking := cv.get("skipped"):
            found.append(f"Not in the training samples of every fold: {', '.join(lacking)}.")
    if calibration := record.get("calibration"):
        method = str(calibration["method"])
        where = "each fold's validation samples" if record.get("cv") else "the validation samples"
        flattered = "" if record.get("cv") else ", whose own figures therefore say too much"
        by = CALIBRATIONS.get(method, method)
        found.append(f"Probabilities are calibrated by {by}, fitted on {where} only{flattered}.")
        if calibration.get("bound_reached"):
            found.append(f"{BOUND_REACHED}.")
    if record.get("best_epoch") == 0:
        found.append("No epoch had a lower validation loss than the start, whose weights were kept.")
    return found


def head_name(record: Mapping[str, Any]) -> str:
    """What the head of a run is called: `XGBoost`; empty where it has none."""
    head = record.get("head") or {}
    name = str(head.get("name", "") if isinstance(head, Mapping) else head)
    if name == "logistic" and record["task"] == "regression":
        return "Ridge"
    return HEADS.get(name, name)


def sentence(record: Mapping[str, Any], metrics: Mapping[str, Any], split: str, *, where: str | None = None) -> str:
    """What the run is, in one sentence with its first figure."""
    kind = (
        "Jointly fine-tuned network"
        if record["kind"] == "joint"
        else f"{head_name(record) or 'Fitted'} head on cached features"
    )
    targets = list(record["targets"])
    what = targets[0] if len(targets) == 1 else f"{len(targets)} targets"
    views = list(record["views"])
    seen = "one view" if len(views) == 1 else f"{len(views)} views"
    task = "regression" if record["task"] == "regression" else f"{record['task']} prediction"
    text = f"{kind}: {task} of {what} from {seen} ({', '.join(views)})"
    figures = metrics.get(split) or {}
    first = next((key for key in HEADLINE.get(str(record["task"]), ()) if figures.get(key) is not None), None)
    if first is None:
        return text + "."
    bounds = interval((figures.get("intervals") or {}).get(first))
    within = f" (95 % interval {bounds})" if bounds else ""
    shown, name = metric_name(first), where or split_name(record, split)
    told = f"{shown[0].upper()}{shown[1:]} {number(figures[first])}{within} on {figures['n']:,} {name} samples"
    return f"{text}. {told}."
