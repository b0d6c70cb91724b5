"""A joint run on new samples: its tuned bodies and head as one network again, live on the images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from featurecache.bodies.engines import resolve_device
from featurecache.bodies.identity import identify
from featurecache.bodies.registry import Body, load_run_body, trusted_factories
from featurecache.bodies.taps import resolve_taps
from featurecache.config import JointConfig, Tap
from featurecache.data.dense import DENSE
from featurecache.data.manifest import Manifest
from featurecache.data.readers import get_reader
from featurecache.data.transforms import Augmentation
from featurecache.errors import InputError, RecipeMismatchError, RunError
from featurecache.features.features import Block
from featurecache.heads.decoder import DecoderHead
from featurecache.heads.fc import FCHead
from featurecache.heads.losses import scores_from_outputs
from featurecache.joint.build import make_model
from featurecache.joint.dense import said_masks
from featurecache.joint.images import Failure, SampleImages
from featurecache.joint.model import JointModel
from featurecache.joint.own import own_augmentations
from featurecache.joint.runner import Runner, make_fabric
from featurecache.joint.samples import failure_rows
from featurecache.joint.settings import augmentations
from featurecache.progress import Reporter, Silent
from featurecache.run import Run
from featurecache.rundir.densefit import write_masks
from featurecache.rundir.recorded import check_reader
from featurecache.stageone.viewsetup import ViewSetup

Own = dict[str, list[Augmentation | None]]


class JointPrediction(NamedTuple):
    """What a joint run says about samples.

    Attributes:
        sample_ids: (n,) those with an image that could be read, in the manifest's order.
        scores: (n, classes), (n, labels) probabilities, NaN where a label was not trained; regression (n, targets).
        present: (n, n_views) bool: the views that each has.
        failed: a row of failures.csv for each image that could not be read.
        files: (n,) of predicted masks, relative to what their folder lies in; of a dense run.
    """

    sample_ids: NDArray[np.str_]
    scores: NDArray[np.float64]
    present: NDArray[np.bool_]
    failed: list[dict[str, str]]
    files: tuple[str, ...] = ()


class LoadedJoint(NamedTuple):
    """A joint run as a network: `model` in eval mode on the CPU, its `head`, and what prepares each view's images."""

    model: JointModel
    head: FCHead | DecoderHead
    setups: dict[str, ViewSetup]


def load_joint(run: Run, *, trust: Sequence[str] = ()) -> LoadedJoint:
    """Build the network of a joint run.

    Args:
        run: from `load_run`, which has checked its files.
        trust: factories that the run may name as bodies.

    Raises:
        InputError: the run is no joint one, or names a factory that is not trusted.
        RecipeMismatchError: bodies or readers of this installation work in another way than those of the run.
        RunError: its record is incomplete.
    """
    if run.kind != "joint":
        raise InputError(f"{run.path}: a {run.kind} run, not one of finetune-joint")
    try:
        setups = _setups(run, trust)
        blocks = [Block.from_json(block) for block in run.record["blocks"]]
        multi = str(run.config["multi"])
    except (KeyError, TypeError) as error:
        raise RunError(f"{run.path}: run.json is incomplete ({type(error).__name__}: {error})") from None
    head = (DecoderHead if run.task == DENSE else FCHead).load(run.path)
    if list(head.blocks_) != blocks:
        raise RunError(f"{run.path}: the head takes other features than the bodies give; train the run anew")
    return LoadedJoint(make_model(setups, blocks, head.module, multi=multi), head, setups)


def predict_joint(
    run: Run,
    manifest: Manifest,
    *,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int | Literal["auto"] = "auto",
    workers: int | Literal["auto"] = "auto",
    trust: Sequence[str] = (),
    tta: int = 0,
    masks: Path | None = None,
    reporter: Reporter | None = None,
) -> JointPrediction:
    """Predict samples with a joint run, by a live forward pass.

    Args:
        run: a run of `finetune-joint`.
        manifest: with the views of the run; a view that it lacks counts as missing.
        device: `auto`, `cpu`, `cuda:0`, ...
        precision: `auto` is the one that the run was trained in, where the device can do it.
        batch_size: samples at a time; `auto` is 32.
        workers: threads that read images; `auto` is one per core.
        trust: factories that the run may name as bodies.
        tta: test-time augmentation: the mean over the plain images and so many versions, drawn as while training, the
            same for all samples.
        masks: where a dense run writes its masks; None for nowhere.
        reporter: told of progress.

    Raises:
        InputError, RecipeMismatchError, RunError: as `load_joint`; also where no view of the run is in the manifest, or
            the run was trained without the augmentation that `tta` draws from.
    """
    model, head, setups = load_joint(run, trust=trust)
    if not set(setups) & set(manifest.views):
        raise InputError(
            f"{manifest.path}: has the views {', '.join(manifest.views)}, but the run reads {', '.join(setups)}"
        )
    reporter = reporter or Silent()
    if tta and run.task == DENSE:
        raise InputError(f"--tta {tta}: masks of augmented versions don't lie on each other. Leave it out.")
    versions, own = _versions(run, manifest, tta)
    where = resolve_device(device)
    if precision == "auto":
        recorded = str(run.record.get("precision", "fp32"))
        precision = "fp32" if recorded == "fp16" and where.type != "cuda" else recorded
    fabric = make_fabric(where, precision)
    runner = Runner(fabric, fabric.setup_module(model), {view: setup.preprocessing for view, setup in setups.items()})
    images = SampleImages(manifest, setups)
    wanted = np.flatnonzero(images.present.any(axis=1)).astype(np.int64)
    drawn = SampleImages(manifest, setups, seed=int(run.config["seed"]), augmentation=versions, own=own, alike=True)
    reporter.begin("predict", len(wanted) * (1 + tta), "samples")
    options: dict[str, Any] = {
        "batch_size": 32 if batch_size == "auto" else batch_size,
        "workers": (os.cpu_count() or 1) if workers == "auto" else workers,
        "advance": lambda n: reporter.advance("predict", n),
    }
    try:
        if isinstance(head, DecoderHead):
            return _predict_masks(run, runner, images, wanted, manifest, masks, **options)
        rows, outputs, failed = _predict_present(runner, images, wanted, **options)
        for failure in failed:
            drawn.leave_out(failure)
        scores = joint_scores(head, outputs)
        for version in range(1, tta + 1):
            scores = scores + joint_scores(head, runner.predict(drawn, rows, epoch=version, **options)[1])
        scores = scores / (1 + tta)
    finally:
        reporter.end("predict")
    ids = manifest.table["sample_id"].to_list()
    chosen = np.array([ids[row] for row in rows], dtype=np.str_)
    return JointPrediction(chosen, scores, images.present[rows], failure_rows(ids, failed))


def _predict_present(
    runner: Runner, images: SampleImages, wanted: NDArray[np.int64], **options: Any
) -> tuple[NDArray[np.int64], torch.Tensor, list[Failure]]:
    """As `Runner.predict`, but that an image that can't be read counts as missing where its sample has another."""
    found = [runner.predict(images, wanted, **options)]
    while again := [failure.sample for failure in found[-1][2] if images.leave_out(failure)]:
        found.append(runner.predict(images, np.array(again, np.int64), **{**options, "advance": lambda n: None}))
    rows = np.concatenate([part[0] for part in found])
    order = np.argsort(rows)
    outputs = [part[1] for part in found if len(part[0])] or [found[0][1]]
    return rows[order], torch.cat(outputs)[torch.from_numpy(order)], [failure for part in found for failure in part[2]]


def _predict_masks(
    run: Run,
    runner: Runner,
    images: SampleImages,
    wanted: NDArray[np.int64],
    manifest: Manifest,
    masks: Path | None,
    **options: Any,
) -> JointPrediction:
    """Masks of samples; `scores` are the shares of the picture that the classes take."""
    ids = manifest.table["sample_id"].to_list()
    failed: list[Failure] = []
    said = said_masks(runner, images, wanted, failed, **options)
    shares, files = write_masks(said, [ids[row] for row in wanted], run.classes, masks)
    there = np.flatnonzero(~np.isin(wanted, [failure.sample for failure in failed]))
    rows = wanted[there]
    chosen = np.array([ids[row] for row in rows], dtype=np.str_)
    kept = tuple(files[place] for place in there.tolist())
    return JointPrediction(chosen, shares[there], images.present[rows], failure_rows(ids, failed), kept)


def _versions(run: Run, manifest: Manifest, tta: int) -> tuple[dict[str, Augmentation], Own]:
    """What test-time augmentation changes in the images of each view, and of each sample where the manifest says it."""
    if tta < 0:
        raise InputError(f"--tta {tta}: 0 for none, or how many versions of each sample")
    if not tta:
        return {}, {}
    config = JointConfig.create({"manifest": "-", "augment": run.config.get("augment") or ()})
    found = augmentations(config, run.views)
    columns = run.config.get("augment_column") or {}
    there = {view: column for view, column in columns.items() if column in manifest.table.columns}
    own = own_augmentations(config.model_copy(update={"augment_column": there}), manifest, found, run.views)
    if not found and not own:
        raise InputError(
            f"{run.path}: was trained without augmentation of its images, so --tta has nothing to draw from. "
            "Leave it out."
        )
    return found, own


def joint_scores(head: FCHead, outputs: torch.Tensor) -> NDArray[np.float64]:
    """Scores (n, outputs) from the network's logits, as `Head.scores` gives them: NaN for what could not be trained."""
    scores = scores_from_outputs(head.task_, outputs.reshape(-1, len(head.outputs)))
    if head.task_ in ("multilabel", "regression"):
        scores[:, [i for i, name in enumerate(head.names_) if name in head.skipped_]] = np.nan
    return scores


def _setups(run: Run, trust: Sequence[str]) -> dict[str, ViewSetup]:
    """Reader, tuned body, preprocessing and taps of each view; a body that views share is loaded once."""
    bodies: dict[str, Body] = {}
    setups = {}
    for view in run.views:
        recipe, file = run.recipes[view]["recipe"], str(run.bodies[view]["file"])
        if file not in bodies:
            bodies[file] = load_run_body(run.path, view, trust=trust)
        body = bodies[file]
        size = body.preprocessing.size()
        if size is None:
            raise RunError(f"{run.path}: the preprocessing of view {view!r} leaves images of different sizes")
        entries = {entry["name"]: entry for entry in recipe["taps"]}
        chosen = [entries[name] for name in run.record["tap"][view]]
        taps = resolve_taps(body, [Tap.create({"module": e["tap"], "pool": e["pool"]}) for e in chosen], size)
        check_reader(run.path, recipe["reader"]["name"], trusted_factories(trust))
        reader = get_reader(recipe["reader"]["name"], **recipe["reader"]["parameters"])
        setups[view] = ViewSetup(view, body, reader, body.preprocessing, size, taps, identify(body, taps, size))
        _check_same(run, view, recipe, setups[view])
    return setups


def _check_same(run: Run, view: str, recipe: Mapping[str, Any], setup: ViewSetup) -> None:
    """Refuse code that would compute something else from the same weights."""
    if recipe["reader"]["version"] != setup.reader.version:
        raise RecipeMismatchError(
            f"{run.path}: view {view!r} was trained on images of reader {setup.reader.name} version "
            f"{recipe['reader']['version']}, this is version {setup.reader.version}"
        )
    then = {entry["name"]: entry for entry in recipe["taps"]}
    for tap, identity in zip(setup.taps, setup.identities, strict=True):
        for field, here in identity._asdict().items():
            if then[tap.name][field] != here:
                raise RecipeMismatchError(
                    f"{run.path}: the body of view {view!r} is not what it was when trained: its {field} differ "
                    f"({then[tap.name][field][:16]} then, {here[:16]} now). Use the versions of then (run.json lists "
                    "them)."
                )
