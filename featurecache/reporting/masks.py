"""Section of a report on a dense run: figures per class, and image, true and predicted mask side by side."""

from __future__ import annotations

from typing import Any

from featurecache.reporting.material import Material
from featurecache.reporting.wording import metric_name

FIGURES = ("iou", "dice", "sensitivity", "ppv")
VIEWS = ("image", "true", "predicted")


def masks(material: Material) -> dict[str, Any] | None:
    """The table of the classes, with intervals over groups, and the pictures; None for other tasks."""
    if material.record["task"] != "dense":
        return None
    shown = material.json("masks.json")
    colours = shown.get("colours") or {}
    table = material.figures.get("classes") or {}
    rows = [
        {
            "label": label,
            "colour": colours.get(label, ""),
            "pixels": figures["n"],
            "share": figures.get("prevalence"),
            "cells": [
                {"value": figures.get(name), "interval": (figures.get("intervals") or {}).get(name)} for name in FIGURES
            ],
        }
        for label, figures in table.items()
    ]
    cases = []
    for entry in shown.get("samples") or ():
        files = entry["pictures"]
        pictures = [{"what": what, "uri": material.picture(files[what])} for what in VIEWS if what in files]
        cases.append({**entry, "pictures": [picture for picture in pictures if picture["uri"]]})
    return {
        "title": f"Masks, {material.split_name} samples",
        "columns": [metric_name(name) for name in FIGURES],
        "rows": rows,
        "cases": [case for case in cases if case["pictures"]],
    }
