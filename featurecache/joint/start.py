"""What joint training starts from: manifest, views, bodies, target as configured, or as a fitted head has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurecache.bodies.identity import identify
from featurecache.bodies.split import Upper, split_body
from featurecache.bodies.stem import share_stem
from featurecache.bodies.taps import map_tap, resolve_taps
from featurecache.config import (
    BodyConfig,
    ExtractConfig,
    JointConfig,
    ManifestConfig,
    Settings,
    Tap,
    TargetConfig,
    for_view,
)
from featurecache.data.dense import DENSE
from featurecache.data.manifest import Manifest, read_manifest, with_readers
from featurecache.data.splits import read_splits
from featurecache.data.targets import Target, read_target
from featurecache.errors import InputError, RecipeMismatchError, RunError
from featurecache.features.features import Block
from featurecache.features.masks import MaskFiles, read_masks
from featurecache.fusion import get_fusion
from featurecache.heads.base import read_record as read_head_record
from featurecache.heads.decoder import DecoderHead
from featurecache.heads.decodermodule import maps_by_size
from featurecache.heads.fc import FCHead
from featurecache.joint.dense import check_options, mask_files
from featurecache.run import Run, load_run
from featurecache.rundir.recorded import check_bodies, read_recipe, recipe_differences
from featurecache.stageone.viewsetup import ViewSetup, set_up_view

NO_STORE = Path("-")  # set_up_view takes the configuration of stage one, whose store is of no concern here


@dataclass(frozen=True)
class Start:
    """Everything that training needs but the images.

    Attributes:
        config: as given, completed from the run it starts from.
        manifest, target: of all samples; `target` is aligned with `manifest.table`.
        setups: reader, body, preprocessing and taps per view, in the model's order.
        blocks: the columns of the concatenated features.
        head: the fitted head that it starts from, or None.
        splits: (n,) the split of the run that it starts from, or None where a new one is to be made.
        seed: of random weights.
        uppers: per view the part of its body that learns, where the rest is cached.
        single: what is paired, where pairs of one view are compared.
        masks: where they are, if the target is dense.
        division: what the run says of how its split was made, where that split is taken.
    """

    config: JointConfig
    manifest: Manifest
    target: Target
    setups: dict[str, ViewSetup]
    blocks: tuple[Block, ...]
    head: FCHead | DecoderHead | None
    splits: NDArray[Any] | None
    seed: int
    uppers: dict[str, Upper] = field(default_factory=dict)
    single: Start | None = None
    masks: MaskFiles | None = None
    division: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tap(self) -> dict[str, list[str]]:
        """Tap names per view."""
        return {view: [tap.name for tap in setup.taps] for view, setup in self.setups.items()}


def prepare(config: JointConfig) -> Start:
    """Read and check everything but images.

    Raises:
        InputError: the manifest or configuration is not valid, or the run to start from does not fit.
        RunError: that run is damaged.
    """
    run, head, taps = None, None, {}
    if config.init is not None:
        run = load_run(config.init)
        if run.record.get("cv"):
            raise InputError(
                f"{config.init}: a cross-validation, whose head was fitted on all samples in the end, so that none are "
                "left to test on. Give a run fitted without --cv."
            )
        head = _fitted_head(run)
        config = _completed(config, run, head)
        taps = _taps(run, head)
    if not config.target:
        raise InputError("no target: give --target COLUMN, or --init RUN to take it from a fitted fc head")
    config = _settled(config)
    manifest = read_manifest(config)
    config = with_readers(config, manifest)
    recorded = run.record["body_config"].get("seed") if run is not None else None
    seed = config.seed if recorded is None else int(recorded)
    setups = set_up(config, manifest.views, taps=taps, seed=seed)
    if run is not None:
        for view, setup in setups.items():
            _check_recipe(run, view, setup)
    masks = None
    if config.head == "decoder":
        check_options(config, tuple(setups))
        masks = mask_files(config, manifest, setups)
        maps_by_size(make_blocks(setups))  # refuses what is no map
        target: Target = read_masks(masks, source=str(manifest.path), classes=head.classes_ if head else None)
    else:
        target = read_target(
            manifest.table, config.target, task=config.task, uncertain=config.uncertain, source=str(manifest.path)
        )
    blocks = make_blocks(setups)
    fusion = get_fusion(config.fusion)
    fusion.check_preprocessing({view: setup.preprocessing.parameters() for view, setup in setups.items()})
    fusion(blocks)  # refuses features that it can't join, before anything is read
    splits, division = None, {}
    if run is not None and head is not None:
        if (head.task_, head.classes_, head.names_) != (target.task, tuple(target.classes), tuple(target.names)):
            raise InputError(
                f"{config.init}: the head was fitted for {head.task_} {', '.join(head.names_)} "
                f"({', '.join(head.classes_) or 'no classes'}); {manifest.path.name} holds {target.task} "
                f"{', '.join(target.names)} ({', '.join(target.classes) or 'no classes'})"
            )
        if head.blocks_ != blocks:
            raise RecipeMismatchError(f"{config.init}: the head takes other features than the bodies give: {blocks}")
        if config.split == "auto":
            splits, division = _splits_of(run, manifest), dict(run.record.get("split") or {})
    uppers = cut_bodies(config, setups)
    return Start(config, manifest, target, setups, blocks, head, splits, seed, uppers, masks=masks, division=division)


def _settled(config: JointConfig) -> JointConfig:
    """The configuration with what one option says of another.

    Raises:
        InputError: options that contradict each other.
    """
    changes: dict[str, Any] = {"head": "decoder"} if config.task == DENSE else {}
    if (config.share_bodies == "stem") != (config.stem is not None):
        raise InputError(
            "--share-bodies stem and --stem MODULE, the last module that is shared, go together: give both or neither. "
            "`featurecache bodies show NAME` lists modules."
        )
    if config.detach:
        if config.epochs == 0:
            raise InputError("--detach trains the head for --epochs, which is 0")
        changes |= {"freeze_epochs": config.epochs, "epochs": 0}
    if get_fusion(config.fusion).needs_all:
        changes["view_dropout"] = 0.0
    return config.model_copy(update=changes)


def set_up(
    config: JointConfig, views: tuple[str, ...], *, taps: Mapping[str, tuple[Tap, ...]], seed: int
) -> dict[str, ViewSetup]:
    """Load the bodies, one for each view, or one for all; `seed` is that of random weights.

    Args:
        config: says what to load, and what is shared.
        views: in order.
        taps: those of the head to start from; empty for those of the configuration.
        seed: of random weights.

    Raises:
        InputError: the views can't share a body.
    """
    if taps and config.tap:
        raise InputError("--tap: the head that training starts from says which taps it takes; leave out --tap")
    fields = config.fields_of(BodyConfig, ManifestConfig)
    stage = ExtractConfig(store=NO_STORE, seed=seed, tap=dict(taps) or config.tap, **fields)
    bodies: dict[tuple[Any, ...], Any] | None = {} if config.share_bodies == "all" else None
    setups = {view: set_up_view(stage, view, bodies=bodies) for view in views}
    if config.fusion == "spatial" and not taps:
        setups = {view: setup if for_view(config.tap, view, ()) else _mapped(setup) for view, setup in setups.items()}
    first = setups[views[0]]
    if config.share_bodies == "all":
        for view, setup in setups.items():
            if setup.body is not first.body or [tap.name for tap in setup.taps] != [tap.name for tap in first.taps]:
                raise InputError(
                    f"--share-bodies: view {view!r} has another body, weights or tap than view {views[0]!r}. "
                    "Give both the same, or leave --share-bodies out."
                )
    elif config.stem is not None:
        share_stem([s.body for s in setups.values()], config.stem, [s.size for s in setups.values()])
    return setups


def _mapped(setup: ViewSetup) -> ViewSetup:
    """The same view with the last map of its body, rows only, for its tap."""
    taps = resolve_taps(setup.body, [map_tap(setup.body, setup.size)], setup.size)
    return replace(setup, taps=taps, identities=identify(setup.body, taps, setup.size))


def cut_bodies(config: JointConfig, setups: Mapping[str, ViewSetup]) -> dict[str, Upper]:
    """Per view the part of its body above the module that training starts from; views that share a body share it.

    Raises:
        InputError: a view has no such module, its body can't be cut there, or nothing says where the cache is.
    """
    if not config.train_from:
        return {}
    if config.store is None:
        raise InputError("--train-from needs --store STORE, where the activations below the module are cached")
    made: dict[int, Upper] = {}
    for view, setup in setups.items():
        module = for_view(config.train_from, view, "")
        if not module:
            raise InputError(f"--train-from: no module for view {view!r}. Give one for all, or for every view.")
        if id(setup.body) not in made:
            made[id(setup.body)] = split_body(setup.body, setup.taps, module, setup.size)
    return {view: made[id(setup.body)] for view, setup in setups.items()}


def make_blocks(setups: Mapping[str, ViewSetup]) -> tuple[Block, ...]:
    """The columns that the taps of the views fill, side by side."""
    blocks: list[Block] = []
    for view, setup in setups.items():
        for tap in setup.taps:
            start = blocks[-1].stop if blocks else 0
            blocks.append(Block(view, tap.name, start, start + int(np.prod(tap.shape)), tuple(tap.shape)))
    return tuple(blocks)


def _fitted_head(run: Run) -> FCHead | DecoderHead:
    if run.kind != "head" or read_head_record(run.path).head not in ("fc", "decoder"):
        what = "a joint run" if run.kind == "joint" else f"a head {read_head_record(run.path).head!r}"
        raise InputError(
            f"{run.path}: --init needs a run of fit-head --head fc or decoder, this is {what}. Joint training goes on "
            "from these only: their weights become the last layers of the network."
        )
    return (FCHead if read_head_record(run.path).head == "fc" else DecoderHead).load(run.path)


def _given(config: Settings, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group that differ from their defaults, so were asked for."""
    return {name: value for name, field in fields.items() if (value := getattr(config, name)) != field.get_default()}


def _completed(config: JointConfig, run: Run, head: FCHead | DecoderHead) -> JointConfig:
    """The configuration with what the run knows where nothing else was asked for."""
    values: dict[str, Any] = {}
    parts: dict[str, type[Settings]] = {
        "body_config": BodyConfig,
        "manifest_config": ManifestConfig,
        "target_config": TargetConfig,
    }
    for name, part in parts.items():
        recorded = run.body_config if name == "body_config" else run.record.get(name)
        if not isinstance(recorded, dict) or not recorded:
            raise RunError(f"{run.path}: run.json holds no {name}, so the bodies can't be set up as the head knew them")
        given = _given(config, {key: JointConfig.model_fields[key] for key in part.model_fields if key != "manifest"})
        known = {key: value for key, value in recorded.items() if key in part.model_fields and key != "manifest"}
        values |= known | given
    if not _given(config, {"views": JointConfig.model_fields["views"]}):
        kept = {view: column for view, column in values["views"].items() if view in run.views}
        values["views"] = kept or values["views"]
    for key in ("body", "trust_factory"):  # a name that only data holds is never imported
        values.setdefault(key, getattr(config, key))
    values["trust_factory"] = tuple(config.trust_factory)
    if config.group is None:  # what the head's split kept together, the intervals must draw together
        values["group"] = run.record.get("split", {}).get("group")
    merged = JointConfig.create({**config.model_dump(), **values}, source=str(run.path))
    typed = set(config.body.values()) if config.body != JointConfig.model_fields["body"].get_default() else set()
    check_bodies(run.path, run.views, merged.model_dump(), typed | set(config.reader.values()))
    missing = [view for view in run.views if merged.views and view not in merged.views]
    if missing or (merged.views and set(merged.views) != set(run.views)):
        raise InputError(
            f"{run.path}: the head was fitted on the views {', '.join(run.views)}, not on {', '.join(merged.views)}"
        )
    if merged.views:
        merged = merged.model_copy(update={"views": {view: merged.views[view] for view in run.views}})
    fusion = head.settings.fusion if isinstance(head, FCHead) else "concat"
    if "fusion" in _given(config, {"fusion": JointConfig.model_fields["fusion"]}) and merged.fusion != fusion:
        takes = "takes concatenated features" if fusion == "concat" else f"joins views by {fusion}"
        raise InputError(f"{run.path}: the head {takes}, so --fusion {merged.fusion} can't start from it")
    return merged.model_copy(update={"fusion": fusion, "head": head.name})


def _taps(run: Run, head: FCHead | DecoderHead) -> dict[str, tuple[Tap, ...]]:
    """Per view the taps that the head takes, in its order."""
    found: dict[str, list[Tap]] = {}
    for block in head.blocks_:
        recipe = run.recipes.get(block.view, {}).get("recipe", {})
        entries = {entry["name"]: entry for entry in recipe.get("taps", [])}
        if block.tap not in entries:
            raise RunError(f"{run.path}: run.json has no recipe of tap {block.tap!r} of view {block.view!r}")
        entry = entries[block.tap]
        found.setdefault(block.view, []).append(Tap.create({"module": entry["tap"], "pool": entry["pool"]}))
    return {view: tuple(taps) for view, taps in found.items()}


def _splits_of(run: Run, manifest: Manifest) -> NDArray[Any]:
    """The run's split of the manifest's samples; those that it does not know are not used ('').

    Raises:
        InputError: it knows none of them.
    """
    path = run.path / "splits.csv"
    listed = pl.read_csv(path, infer_schema=False)["sample_id"].to_list()
    known = dict(zip(listed, read_splits(path, listed).tolist(), strict=True))
    ids = manifest.table["sample_id"].to_list()
    if not known.keys() & set(ids):
        raise InputError(
            f"{path}: none of its samples ({listed[0]!r}, ...) is in {manifest.path} ({ids[0]!r}, ...). "
            "Give the manifest that the head was fitted on, or --split COLUMN."
        )
    return np.array([known.get(name, "") for name in ids], dtype="<U5")


def _check_recipe(run: Run, view: str, setup: ViewSetup) -> None:
    """Refuse a body that would give other features than those that the head was fitted on."""
    here = setup.recipe(engine="torch", precision="fp32", storage_dtype="float32")
    serious, _ = recipe_differences(read_recipe(run.recipes[view]), here)
    if serious:
        raise RecipeMismatchError(
            f"{run.path}: view {view!r} would start from another body than the head was fitted on (then -> now): "
            f"{serious}. Give the same body, weights and preprocessing, or fit the head anew."
        )
