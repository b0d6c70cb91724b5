"""What a joint network ends in: the fc head for targets of samples, the decoder for masks; settings, loss, module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from featurecache.config import JointConfig
from featurecache.data.dense import DenseTarget
from featurecache.data.targets import Target
from featurecache.errors import InputError
from featurecache.heads.decoder import DecoderHead, DecoderModule, DecoderSettings, DenseLoss
from featurecache.heads.fc import FCHead, FCModule, FCSettings
from featurecache.heads.losses import HeadLoss
from featurecache.joint.build import make_head
from featurecache.joint.dense import said_masks
from featurecache.joint.images import Failure, SampleImages
from featurecache.joint.predict import joint_scores
from featurecache.joint.runner import Runner
from featurecache.joint.samples import Samples
from featurecache.joint.settings import head_settings
from featurecache.joint.start import Start
from featurecache.rundir.densefit import count_masks, kept

HeadSettings = FCSettings | DecoderSettings


class Said(NamedTuple):
    """What a trained network says of the samples that could be read, as `write_results` takes it.

    Attributes:
        rows: of the manifest.
        head: the network's end as a head of its own.
        target: aligned with `rows`.
        scores: aligned with `rows`.
        masks: files of predicted masks; empty for other tasks.
        failed: what could not be read.
    """

    rows: NDArray[np.int64]
    head: FCHead | DecoderHead
    target: Target
    scores: NDArray[np.float64]
    masks: list[str]
    failed: list[Failure]


def settings_of(start: Start) -> HeadSettings:
    """The head's settings: those of the fitted head, changed where the configuration says so."""
    config: JointConfig = start.config
    if not isinstance(start.target, DenseTarget):
        return head_settings(config, start.head if isinstance(start.head, FCHead) else None)
    known = start.head.settings.model_dump() if start.head is not None else {}
    return DecoderSettings.create({**known, **config.settings}, source="head 'decoder'")


def loss_of(target: Target, settings: HeadSettings) -> HeadLoss | DenseLoss:
    """What is minimised, from the target of the training rows."""
    if isinstance(target, DenseTarget) and isinstance(settings, DecoderSettings):
        smoothing = settings.label_smoothing
        return DenseLoss(target, class_weight=settings.class_weight, dice=settings.dice, label_smoothing=smoothing)
    assert isinstance(settings, FCSettings)
    return HeadLoss(
        target,
        class_weight=settings.class_weight,
        pos_weight=settings.pos_weight,
        label_smoothing=settings.label_smoothing,
    )


def module_of(start: Start, target: Target, settings: HeadSettings, *, missing: bool) -> FCModule | DecoderModule:
    """The head's module: the fitted one's weights, or random ones."""
    seed = start.config.seed
    if isinstance(settings, FCSettings):
        fitted = start.head if isinstance(start.head, FCHead) else None
        dropout = start.config.view_dropout or 0.0
        return make_head(fitted, start.blocks, target, settings, missing=missing, view_dropout=dropout, seed=seed)
    assert isinstance(target, DenseTarget)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = DecoderModule(start.blocks, len(target.classes), settings, target.size)
    if start.head is not None:
        try:
            module.load_state_dict(start.head.module.state_dict())
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise InputError(f"the settings given don't fit the head that training starts from: {reason}") from None
    return module


def say(
    start: Start,
    runner: Runner,
    images: SampleImages,
    module: nn.Module,
    settings: HeadSettings,
    samples: Samples,
    *,
    directory: Path,
    ids: Sequence[str],
    skipped: Sequence[str],
    batch_size: int,
    workers: int,
    advance: Callable[[int], None],
) -> Said:
    """Predict all samples; masks are written into the directory of the run."""
    seed = start.config.seed
    options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "advance": advance}
    if isinstance(module, FCModule) and isinstance(settings, FCSettings):
        rows, outputs, failed = runner.predict(images, samples.rows, **options)
        target = start.target.subset(rows)
        fc = FCHead.adopt(module, target, start.blocks, settings, skipped=skipped, seed=seed)
        return Said(rows, fc, target, joint_scores(fc, outputs), [], failed)
    masks = start.target.subset(samples.rows)
    assert isinstance(masks, DenseTarget)
    assert isinstance(module, DecoderModule)
    assert isinstance(settings, DecoderSettings)
    lost: list[Failure] = []
    counted = count_masks(
        said_masks(runner, images, samples.rows, lost, **options),
        masks,
        directory=directory,
        sample_ids=[ids[row] for row in samples.rows],
        written=kept(samples.splits),
    )
    there = np.flatnonzero(~np.isin(samples.rows, [failure.sample for failure in lost]))
    decoder = DecoderHead.adopt(module, masks, start.blocks, settings, seed=seed)
    files = [counted.files[place] for place in there.tolist()]
    return Said(samples.rows[there], decoder, counted.target.subset(there), counted.scores[there], files, lost)
