"""The stages of a pipeline in order, each with the configuration that its table and [data] make, and its digest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from featurecache.bodies.registry import FACTORY, RUN_PREFIX
from featurecache.config import (
    BodyConfig,
    ExtractConfig,
    FitConfig,
    JointConfig,
    ManifestConfig,
    Settings,
    SplitConfig,
    TargetConfig,
)
from featurecache.data.manifest import Manifest, read_manifest
from featurecache.data.readers import PLUGIN
from featurecache.errors import InputError
from featurecache.features.masks import mask_cells
from featurecache.pipeline.config import NOWHERE, RUNS, PipelineConfig
from featurecache.pipeline.makers import check_maker, made_at, make
from featurecache.pipeline.state import cells_digest, digest_of, files_digest, run_digest
from featurecache.progress import Reporter, Silent
from featurecache.store.format import StorePaths
from featurecache.store.store import FeatureStore

# What says where and how fast, not what comes out.
FREE = {"manifest", "root", "store", "out", "overwrite", "resume", "init", "body", "dataset", "name", "device",
        "workers", "trust_factory", "allow_outside", "memory"}  # fmt: skip
CACHED, TO_RUN = "cached", "to run"


@dataclass
class Step:
    """One stage of the plan.

    Attributes:
        kind: as its table in the file.
        name: by which other stages know it.
        stage: its options.
        needs: names of the stages before it.
        state: `cached` or `to run`; after the pipeline ran, `done` or `cached`.
        why: the reason, or what came out, in words.
        figures: what a script wants to know of it.
    """

    kind: str
    name: str
    stage: Any
    needs: list[str]
    state: str = TO_RUN
    why: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


def as_keys(text: str) -> str:
    """A message about the manifest with the options that it names, `--root DIR`, as the file's keys, `[data] root`."""
    keys = {name.replace("_", "-"): name for name in ManifestConfig.model_fields} | {"view": "views"}
    return re.sub(rf"--({'|'.join(keys)})(?![\w-])(?: [A-Z]+\b(?!=))?", lambda found: f"[data] {keys[found[1]]}", text)


@dataclass
class Layout:
    """A checked pipeline and the folder it works in.

    Attributes:
        config: what is to be done.
        folder: where everything goes.
        command: the command line, for the record of the runs.
        reporter: told of progress.
        failed: samples that could not be used, as rows of failures.csv.
    """

    config: PipelineConfig
    folder: Path
    command: str = ""
    reporter: Reporter = field(default_factory=Silent)
    failed: list[dict[str, str]] = field(default_factory=list)

    @cached_property
    def steps(self) -> list[Step]:
        """All stages, each behind those that it needs."""
        config = self.config
        return [Step(kind, stage.called, stage, config.needs(kind, stage)) for kind, stage in config.ordered()]

    # The data

    def data_is_there(self) -> bool:
        """Whether the manifest is there; checks the maker's options."""
        data = self.config.data
        if data.manifest != NOWHERE:
            return True
        check_maker(str(data.maker), data.options)
        return made_at(self.folder / "data", str(data.maker), data.options).exists()

    @cached_property
    def source(self) -> tuple[Path, Path | None]:
        """The manifest, and what its paths start from if that is another folder."""
        data = self.config.data
        if data.manifest != NOWHERE:
            return data.manifest, data.root
        manifest, root = make(self.folder / "data", str(data.maker), data.options)
        return manifest, root or data.root

    def prepare_data(self) -> None:
        """Make the manifest where it is not there, and read it once, so that all complaints come first."""
        self.manifest  # noqa: B018

    @cached_property
    def manifest(self) -> Manifest:
        """The samples, as [data] says."""
        try:
            return read_manifest(ManifestConfig.create(self.shared(ManifestConfig), source="[data]"))
        except InputError as error:
            error.args = (as_keys(str(error)),)
            raise

    # From a stage's table to the configuration of the stage

    def shared(self, *parts: type[Settings]) -> dict[str, Any]:
        """What [data] says of these parts of a configuration."""
        data, (manifest, root) = self.config.data, self.source
        names = {name for part in parts for name in part.model_fields}
        values = {name: getattr(data, name) for name in data.model_fields_set & names}
        return {**values, **({"manifest": manifest, "root": root} if ManifestConfig in parts else {})}

    def own(self, step: Step, kind: type[Settings]) -> dict[str, Any]:
        """What the stage's table says, names of other stages turned into places."""
        values = {name: getattr(step.stage, name) for name in step.stage.model_fields_set if name in kind.model_fields}
        if "body" in values:
            values["body"] = {view: self.place(body) for view, body in values["body"].items()}
        if issubclass(kind, BodyConfig):
            values["trust_factory"] = tuple(self.typed)
        return values

    def place(self, body: str) -> str:
        """`run:NAME` of a stage as `run:DIR`."""
        name = body.removeprefix(RUN_PREFIX)
        return f"{RUN_PREFIX}{self.run_path(name)}" if body.startswith(RUN_PREFIX) and "/" not in name else body

    @cached_property
    def typed(self) -> list[str]:
        """Bodies and readers of users that the file names: what a person wrote there is allowed."""
        found = set(self.config.data.reader.values())
        for _, stage in self.config.stages():
            for option in (getattr(stage, "body", {}), getattr(stage, "reader", {})):
                found |= set(option.values()) if isinstance(option, Mapping) else {option}
        return sorted(name for name in found if FACTORY.fullmatch(name) or PLUGIN.fullmatch(name))

    def run_path(self, name: str) -> Path:
        """Where a stage's run is."""
        return (self.folder / "runs" / name).resolve()

    def extract_config(self, step: Step) -> ExtractConfig:
        """Stage one."""
        values = {**self.shared(ManifestConfig), **self.own(step, ExtractConfig)}
        place = {"store": self.folder / "store", "name": step.name, "replace": True}
        return ExtractConfig.create({**values, **place}, source=f"[{step.kind}] {step.name}")

    def fit_config(self, step: Step) -> FitConfig:
        """Stage two."""
        values = {**self.shared(TargetConfig, SplitConfig), **self.own(step, FitConfig)}
        extract = step.stage.extract or self.config.extract[0].called
        place = {"store": self.folder / "store", "dataset": extract, "out": self.run_path(step.name), "overwrite": True}
        return FitConfig.create({**values, **place}, source=f"[{step.kind}] {step.name}")

    def joint_config(self, step: Step) -> JointConfig:
        """Joint training. What a fit that it starts from knows is not said again."""
        if step.stage.init is not None:
            values = {**self.shared(SplitConfig), **self.own(step, JointConfig)}
            manifest, root = self.source
            values |= {"manifest": manifest, "root": root, "init": self.run_path(str(step.stage.init))}
        else:
            values = {**self.shared(ManifestConfig, TargetConfig, SplitConfig), **self.own(step, JointConfig)}
        if step.stage.train_from:
            values["store"] = self.folder / "store"
        place = {"out": self.run_path(step.name), "overwrite": True}
        return JointConfig.create({**values, **place}, source=f"[{step.kind}] {step.name}")

    # What a stage depends on

    def digest(self, step: Step) -> str:
        """Of everything that decides what a stage's outcome is."""
        options = step.stage.model_dump(mode="json")
        if step.kind == "joint":
            options = {**self.joint_config(step).model_dump(mode="json"), "body": options["body"]}
            inputs: dict[str, Any] = {"manifest": self.manifest.digest, "cells": cells_digest(self.manifest.cells)}
        elif step.kind in ("fit", "tune", "ablate"):
            own = {name: options[name] for name in options.keys() - FitConfig.model_fields.keys()}
            config = self.fit_config(step)
            options = {**own, **config.model_dump(mode="json")}
            inputs = {"features": self.binding_digest(config.dataset)}
        else:
            inputs = {"cells": cells_digest(self.manifest.cells)} if step.kind == "classify" else {}
        fits = [other.stage.head for other in self.steps if other.kind == "fit" and other.name in step.needs]
        if step.kind in RUNS and "decoder" in (step.stage.head, *fits):
            inputs["masks"] = self.masks_digest(step)
        runs = [name for name in step.needs if any(name == other.name and other.kind in RUNS for other in self.steps)]
        inputs["runs"] = {name: run_digest(self.run_path(name)) for name in runs}
        kept = {name: value for name, value in options.items() if name not in FREE - {"body"}}
        return digest_of({"kind": step.kind, "options": kept, "inputs": inputs})

    def masks_digest(self, step: Step) -> str:
        """Of the mask images that a dense stage learns from."""
        columns = step.stage.target or self.config.data.target
        config = ManifestConfig.create(self.shared(ManifestConfig), source="[data]")
        cells = mask_cells(self.manifest, config, columns[0], self.manifest.views[0])
        return files_digest(cell.location for cell in cells if cell is not None)

    def binding_digest(self, dataset: str) -> str:
        """Of the features that a dataset of the store joins."""
        with FeatureStore(self.folder / "store") as store:
            return str(store.binding(dataset).digest)

    def bound_manifest(self, dataset: str) -> str | None:
        """The digest of the manifest that a dataset of the store was made from, None where there is no such dataset."""
        place = self.folder / "store"
        if not StorePaths(place).index.exists():
            return None
        with FeatureStore(place) as store:
            return str(store.binding(dataset).manifest_digest) if dataset in store.bindings() else None
