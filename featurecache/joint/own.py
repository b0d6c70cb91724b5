"""Augmentation that a manifest names: a column says, sample by sample, what is changed at random in its images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from featurecache.config import ANY_VIEW, JointConfig, for_view
from featurecache.data.manifest import Manifest
from featurecache.data.tables import as_text
from featurecache.data.transforms import AUGMENTATIONS, Augmentation
from featurecache.errors import InputError, did_you_mean
from featurecache.joint.mixing import MIXINGS

NONE = "none"
_SEPARATORS = re.compile(r"[\s,;+]+")


def own_augmentations(
    config: JointConfig, manifest: Manifest, usual: Mapping[str, Augmentation], views: Sequence[str]
) -> dict[str, list[Augmentation | None]]:
    """Per view that has such a column, what is changed in each sample of the manifest; None for nothing.

    An empty cell stands for what is usual in the view, `none` for nothing, `flip+rotate:5` for these and no others.

    Args:
        config: its `augment_column` names the columns, for all views or by view.
        manifest: the table.
        usual: by view what is changed where a sample does not say.
        views: of the model.

    Raises:
        InputError: an unknown view or column, or cells that name no augmentation: every one with row and column.
    """
    for view in config.augment_column:
        if view not in (ANY_VIEW, *views):
            raise InputError(
                f"--augment-column {view}=...: no view {view!r}.{did_you_mean(view, views)} "
                f"There are: {', '.join(views)}."
            )
    found: dict[str, list[Augmentation | None]] = {}
    problems: dict[str, None] = {}
    for view in views:
        if name := for_view(config.augment_column, view, ""):
            cells = [text or "" for text in as_text(manifest.column(name)).to_list()]
            made = {text: _made(text, usual.get(view)) for text in dict.fromkeys(cells)}
            rows = _rows(manifest, view) if any(isinstance(one, str) for one in made.values()) else {}
            for sample, text in enumerate(cells):
                if isinstance(one := made[text], str):
                    problems[f"{manifest.path.name}, {rows[sample]}, column {name!r}: {one}"] = None
            found[view] = [one for text in cells if not isinstance(one := made[text], str)]
    if problems:
        raise InputError.from_problems("--augment-column: not valid", list(problems))
    return found


def _made(text: str, usual: Augmentation | None) -> Augmentation | str | None:
    """What a cell says, or what is wrong with it."""
    names = tuple(part for part in _SEPARATORS.split(text) if part)
    if not names:
        return usual
    if names == (NONE,):
        return None
    for name in (word.partition(":")[0] for word in names):
        if name in MIXINGS:
            return f"{name!r} mixes two samples, so it is for all of them: --augment {name}"
        if name not in AUGMENTATIONS:
            known = f"{', '.join(AUGMENTATIONS)}, or {NONE} alone"
            return f"unknown augmentation {name!r}.{did_you_mean(name, AUGMENTATIONS)} Known: {known}."
    try:
        return Augmentation.of(names)
    except InputError as error:
        return str(error)


def _rows(manifest: Manifest, view: str) -> dict[int, str]:
    """Where each sample stands in the file."""
    cells = manifest.cells.filter(manifest.cells["view"] == view)
    kind = "line" if manifest.path.suffix.lower() in (".csv", ".tsv") else "row"
    places = zip(cells["sample"].to_list(), cells["row"].to_list(), strict=True)
    return {sample: f"{kind} {row}" for sample, row in reversed(list(places))}
