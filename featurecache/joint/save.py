"""What a joint run keeps of its bodies: their weights, and enough in run.json to find and run them again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save

from featurecache.bodies.identity import identify
from featurecache.bodies.registry import body_record
from featurecache.stageone.viewsetup import ViewSetup

FOLDER = "bodies"


def save_bodies(directory: Path, setups: Mapping[str, ViewSetup]) -> dict[str, dict[str, Any]]:
    """Write bodies/<view>.safetensors; views that share a body share the file of the first.

    Returns:
        Per view what `load_run_body` needs, for run.json.
    """
    (directory / FOLDER).mkdir(parents=True, exist_ok=True)
    files: dict[int, str] = {}
    records: dict[str, dict[str, Any]] = {}
    for view, setup in setups.items():
        if id(setup.body) not in files:
            name = _file_name(view, {Path(file).stem.lower() for file in files.values()})
            files[id(setup.body)] = f"{FOLDER}/{name}.safetensors"
            # All of the body, its unused classifier and its buffers too; contiguous, since training may have changed
            # the layout, and each on its own, since safetensors refuses tied weights.
            state = {key: t.detach().cpu().contiguous().clone() for key, t in setup.body.module.state_dict().items()}
            (directory / files[id(setup.body)]).write_bytes(save(state))  # save_file would make it unreadable to others
        records[view] = body_record(setup.body, files[id(setup.body)], setup.preprocessing)
    return records


def tuned_recipes(setups: Mapping[str, ViewSetup]) -> dict[str, dict[str, Any]]:
    """Per view the recipe of the tuned body's features in full precision, as `Run.recipes` holds it.

    `extract --body run:DIR --precision fp32 --store-dtype float32` makes features of this very recipe.
    """
    found = {}
    for view, setup in setups.items():
        tuned = replace(setup, identities=identify(setup.body, setup.taps, setup.size))
        recipe = tuned.recipe(engine="torch", precision="fp32", storage_dtype="float32")
        found[view] = {"digest": recipe.digest, "recipe": recipe.to_json()}
    return found


def _file_name(view: str, taken: set[str]) -> str:
    """A view's name as a file name on any system, unique ignoring case."""
    stem = re.sub(r"[^\w.-]", "_", view).strip(".") or "view"
    name, number = stem, 1
    while name.lower() in taken:
        number += 1
        name = f"{stem}-{number}"
    return name
