"""The samples that teach most about a model: its most confident mistakes, and those where one view alone was right."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from featurecache.errors import FeatureCacheError
from featurecache.reporting.thumbnails import Pictures
from featurecache.rundir.cut import threshold_of
from featurecache.rundir.predictions import Predictions
from featurecache.rundir.record import dump_json, plain

FILE, FOLDER = "mistakes.json", "pictures"
LISTED = 12  # of each kind, where no pictures are wanted
SIZE = 224  # pixels of the longest edge
MOST_ERRORS = 200  # of a regression that are looked through
MOST_ASKED = 20_000  # samples that are shown to the model once more, a view at a time


def write_mistakes(
    directory: Path,
    predictions: Predictions,
    threshold: Mapping[str, Any],
    single: Mapping[str, NDArray[np.float64]],
    *,
    images: int | Literal["none"],
    pictures: Callable[[], Pictures] | None = None,
) -> None:
    """Write mistakes.json, and the pictures of its samples into pictures/.

    Args:
        directory: of the run being written.
        predictions: of all samples; those of the split `test` are looked at.
        threshold: as the run records it.
        single: by view the scores (n, outputs) of the samples where the model got that view alone, NaN elsewhere.
        images: how many samples of each kind are shown; `none` (or 0) lists them without pictures.
        pictures: gives them; asked for only if they are wanted. None where there are none to be had.
    """
    rows = np.flatnonzero((predictions.splits == "test") & predictions.known())
    part = predictions.take(rows)
    most = LISTED if images == "none" or images == 0 else int(images)
    alone = {view: scores[rows] for view, scores in single.items()}
    found = {
        "mistakes": confident_mistakes(part, threshold)[:most],
        "one_view_right": one_view_right(part, threshold, alone)[:most],
    }
    notes: list[str] = []
    if pictures is None:
        pass
    elif images == "none" or images == 0:
        notes.append("Pictures were not wanted.")
    elif any(found.values()):
        try:
            notes = _save_pictures(directory, found, pictures())
        except (FeatureCacheError, OSError) as error:
            notes.append(f"No pictures: {type(error).__name__} while the images were read.")
    record = {"schema": 1, "split": "test", "notes": notes, **found}
    (directory / FILE).write_text(dump_json(plain(record, directory)), encoding="utf-8")


def single_views(
    views: Sequence[str],
    present: NDArray[np.bool_],
    splits: NDArray[Any],
    outputs: int,
    ask: Callable[[int, NDArray[np.int64]], NDArray[np.float64]],
) -> dict[str, NDArray[np.float64]]:
    """By view the scores (n, outputs) where the model gets that view alone; NaN where there is none or it isn't asked.

    Test samples are asked, the first of them where there are many: they serve to show some. Nothing for a single view.

    Args:
        views: of the model, in its order.
        present: (n, n_views) which each sample has.
        splits: (n,) train, valid, test or ''.
        outputs: columns of the scores.
        ask: scores (m, outputs) of so many rows from the view of this number alone.
    """
    found = {}
    test = np.flatnonzero(splits == "test")[:MOST_ASKED].astype(np.int64)
    for number, view in enumerate(views if len(views) > 1 else ()):
        scores = np.full((len(splits), outputs), np.nan)
        rows = test[present[test, number]]
        if len(rows):
            scores[rows] = ask(number, rows)
        found[view] = scores
    return found


def confident_mistakes(part: Predictions, threshold: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Wrong decisions, the most confident first; of numbers the largest errors, in units of the target's spread.

    Each has `sample_id`, `group`, `views`, `label` (multilabel and regression: which target), `target`, `prediction`
    and `probability`: of the predicted class; of the positive class or label where a threshold decides; None for a
    regression.
    """
    if part.task == "regression":
        return _largest_errors(part)
    limit = part.cut(threshold)
    said = part.decisions(limit)
    found: list[tuple[float, dict[str, Any]]] = []
    if part.classes:
        for row in np.flatnonzero(said != part.true).tolist():
            p = _shown(part, part.scores[row], int(said[row]))
            cut = threshold_of(limit, part.names[0], np.array([row])) if part.task == "binary" else 0.0
            names = {"target": part.classes[part.true[row]], "prediction": part.classes[said[row]]}
            found.append((_sure(p, float(np.squeeze(cut))), {**_sample(part, row), **names, "probability": p}))
    else:
        known = ~np.isnan(part.true) & ~np.isnan(said)
        for row, column in zip(*np.nonzero(known & (said != part.true)), strict=True):
            p = float(part.scores[row, column])
            cut = threshold_of(limit, part.names[column], np.array([row]))
            names = {"label": part.names[column], "target": str(int(part.true[row, column]))}
            entry = {**_sample(part, row), **names, "prediction": str(int(said[row, column])), "probability": p}
            found.append((_sure(p, float(np.squeeze(cut))), entry))
    return [entry for _, entry in sorted(found, key=lambda pair: (-pair[0], pair[1]["sample_id"]))]


def one_view_right(
    part: Predictions, threshold: Mapping[str, Any], alone: Mapping[str, NDArray[np.float64]]
) -> list[dict[str, Any]]:
    """Samples that the model gets right from exactly one view alone; those that it gets wrong from all come first.

    As `confident_mistakes`, with `right` (whether all views together were right), `view` (the one that was) and
    `single`: by view what was said from it alone. Binary and multiclass only.
    """
    if not part.classes or len(alone) < 2:
        return []
    cut = part.cut(threshold)
    said = part.decisions(cut)
    found = []
    by_view = {}
    for view, scores in alone.items():
        decided = Predictions(
            part.task, part.names, part.classes, part.true, np.nan_to_num(scores), part.sample_ids, part.groups,
            part.splits, part.views,
        ).decisions(cut)  # fmt: skip
        by_view[view] = np.where(np.isfinite(scores).all(axis=1), decided, -1)
    there = np.stack([decided >= 0 for decided in by_view.values()]).sum(axis=0) > 1
    right = np.stack([decided == part.true for decided in by_view.values()])
    for row in np.flatnonzero(there & (right.sum(axis=0) == 1)).tolist():
        together = bool(said[row] == part.true[row])
        single = {
            view: {
                "prediction": part.classes[decided[row]],
                "probability": _shown(part, alone[view][row], int(decided[row])),
            }
            for view, decided in by_view.items()
            if decided[row] >= 0
        }
        winner = list(by_view)[int(right[:, row].argmax())]
        names = {"target": part.classes[part.true[row]], "prediction": part.classes[said[row]]}
        p = _shown(part, part.scores[row], int(said[row]))
        entry = {**_sample(part, row), **names, "probability": p, "right": together, "view": winner}
        sure = float(alone[winner][row, part.true[row]])
        found.append((together, -sure, {**entry, "single": single}))
    return [entry for *_, entry in sorted(found, key=lambda item: (item[0], item[1], item[2]["sample_id"]))]


def _shown(part: Predictions, scores: NDArray[np.float64], said: int) -> float:
    """The probability that is told: of the positive class, or of the class that was said."""
    return float(scores[1] if part.task == "binary" else scores[said])


def _sure(p: float, cut: float) -> float:
    """How far a probability lies from the threshold, as a share of how far it could."""
    return (p - cut) / (1 - cut) if p >= cut and cut < 1 else (cut - p) / cut if cut > 0 else p


def _largest_errors(part: Predictions) -> list[dict[str, Any]]:
    spread = np.nanstd(part.true, axis=0)
    error = np.abs(part.scores - part.true) / np.where(spread > 0, spread, 1)
    found = []
    worst = np.argsort(-np.where(np.isfinite(error), error, -1), axis=None)[:MOST_ERRORS]
    for row, column in zip(*np.unravel_index(worst, error.shape), strict=True):
        if not np.isfinite(error[row, column]):
            continue
        true, value = float(part.true[row, column]), float(part.scores[row, column])
        names = {"label": part.names[column], "target": f"{true:.4g}", "prediction": f"{value:.4g}"}
        found.append((float(error[row, column]), {**_sample(part, row), **names, "probability": None}))
    return [entry for _, entry in sorted(found, key=lambda pair: (-pair[0], pair[1]["sample_id"]))]


def _sample(part: Predictions, row: int) -> dict[str, Any]:
    names = {"sample_id": part.sample_ids[row], "group": part.groups[row], "views": part.views[row]}
    return {name: str(value) for name, value in names.items()}


def _save_pictures(directory: Path, found: Mapping[str, list[dict[str, Any]]], pictures: Pictures) -> list[str]:
    """Write the pictures of all listed samples, each once, and name them in their entries; what is to be said of it."""
    made: dict[str, list[dict[str, str]]] = {}
    for entry in (entry for entries in found.values() for entry in entries):
        name = entry["sample_id"]
        if name not in made:
            made[name] = []
            for number, picture in enumerate(pictures.of(name, SIZE)):
                shown = {"view": picture.view, "file": "", "text": picture.text}
                if picture.data:
                    kind = "webp" if picture.data[:4] == b"RIFF" else "jpg"
                    file = f"{len(made):03}-{number}-{re.sub(r'[^A-Za-z0-9_-]', '_', picture.view)}.{kind}"
                    (directory / FOLDER).mkdir(exist_ok=True)
                    (directory / FOLDER / file).write_bytes(picture.data)
                    shown["file"] = f"{FOLDER}/{file}"
                made[name].append(shown)
        entry["pictures"] = made[name]
    nothing = "The image files are no longer where they were, or have changed, so no pictures are shown."
    return pictures.notes + ([nothing] if not any(made.values()) and not pictures.notes else [])
