"""The options of joint training: what can't be is refused, what depends on the head or the views is worked out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from featurecache.config import ANY_VIEW, JointConfig, for_view
from featurecache.data.transforms import Augmentation
from featurecache.errors import InputError, did_you_mean
from featurecache.heads.fc import FCHead, FCSettings
from featurecache.joint.mixing import MIXINGS
from featurecache.joint.plan import Every

REFERENCE_LR = 1e-3  # of a fresh head; what body_lr belongs to where the rate is to be found: it is scaled along
WARM_LR = 3e-4  # of a fitted head: of 1e-4, 3e-4, 1e-3 the one that always beat its start (docs/joint.md)
# Settings of the fc head that say how stage two trains; here an option says it.
OWN = {
    "epochs": "--epochs", "patience": "--patience", "batch_size": "--batch-size", "lr": "--lr",
    "weight_decay": "--weight-decay", "mixup": "--augment mixup", "view_dropout": "--view-dropout",
    "fusion": "--fusion",
}  # fmt: skip


def with_defaults(config: JointConfig) -> JointConfig:
    """The configuration with what depends on whether the head is a fitted one: rates, frozen epochs, view dropout."""
    warm = config.init is not None
    lr = (WARM_LR if warm else REFERENCE_LR) if config.lr is None else config.lr
    changes: dict[str, Any] = {"lr": lr}
    if config.body_lr is None:
        changes["body_lr"] = (REFERENCE_LR if lr == "find" else lr) / 10
    if config.view_dropout is None:
        changes["view_dropout"] = 0.0 if warm else 0.1
    if config.freeze_epochs is None:
        changes["freeze_epochs"] = 0 if warm else 1
    return config.model_copy(update=changes)


def rates(config: JointConfig) -> tuple[float, float | tuple[float, float]]:
    """Peak rates of the head and of the bodies; where the head's is to be found, those that are scaled then."""
    config = with_defaults(config)
    assert config.lr is not None
    assert config.body_lr is not None
    return REFERENCE_LR if config.lr == "find" else config.lr, config.body_lr


def check(config: JointConfig) -> None:
    """Refuse settings that can't be, before anything is read.

    Raises:
        InputError: names each of them.
    """
    problems = []
    config = with_defaults(config)
    for name in ("epochs", "freeze_epochs", "clip", "weight_decay"):
        if getattr(config, name) < 0:
            problems.append(f"{name}={getattr(config, name)}: must not be negative")
    if config.epochs == 0 and config.freeze_epochs == 0:
        problems.append("epochs=0 and freeze_epochs=0: nothing would be trained")
    head, bodies = rates(config)
    if not 0 < head < math.inf:
        problems.append(f"lr={head}: must be above 0, or 'find'")
    ends = bodies if isinstance(bodies, tuple) else (bodies,)
    if not 0 < ends[0] <= ends[-1] < math.inf:
        problems.append(f"body_lr={':'.join(map(str, ends))}: must be above 0, the lowest layers' first")
    for name in ("view_dropout", "warm_up", "ema"):
        if not 0 <= getattr(config, name) < 1:
            problems.append(f"{name}={getattr(config, name)}: must be in [0, 1)")
    for name in ("accumulate", "patience"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            problems.append(f"{name}={getattr(config, name)}: must be at least 1")
    if config.batch_size != "auto" and config.batch_size < 2:
        problems.append(f"batch_size={config.batch_size}: must be at least 2, for the head's BatchNorm")
    if config.resume and config.out is None:
        problems.append("--resume needs --out: the name of the run to go on with")
    problems += [f"settings: {name} is of fit-head. Give {OWN[name]}." for name in config.settings if name in OWN]
    if problems:
        raise InputError.from_problems("finetune-joint: not valid", problems)
    Every.parse(config.checkpoint_every)


def head_settings(config: JointConfig, head: FCHead | None) -> FCSettings:
    """The head's settings: those of the fitted head, changed where `settings` says so."""
    known = head.settings.model_dump() if head is not None else {}
    values = {**known, **config.settings, "view_dropout": config.view_dropout or 0.0, "fusion": config.fusion}
    return FCSettings.create(values, source="head 'fc'")


def augmentations(config: JointConfig, views: Sequence[str]) -> dict[str, Augmentation]:
    """What is changed at random in the images of each view; nothing in those that are left out.

    Raises:
        InputError: an unknown view or augmentation, or mixing of one view only.
    """
    found = {}
    for view, names in config.augment.items():
        if view != ANY_VIEW and view not in views:
            raise InputError(
                f"--augment {view}=...: no view {view!r}.{did_you_mean(view, views)} There are: {', '.join(views)}."
            )
        mixed = [name for name in names if name in MIXINGS]
        if view != ANY_VIEW and mixed:
            raise InputError(
                f"--augment {view}={mixed[0]}: samples are mixed with all their views, so leave out the view"
            )
    for view in views:
        names = tuple(name for name in for_view(config.augment, view, ()) if name not in MIXINGS)
        if names:
            found[view] = Augmentation.of(names)
    return found


def mixing(config: JointConfig) -> tuple[str, ...]:
    """The ways in which samples are mixed."""
    return tuple(name for name in config.augment.get(ANY_VIEW, ()) if name in MIXINGS)


def batch_size(config: JointConfig, n: int, processes: int = 1) -> int:
    """Samples that a process takes at a time: as configured, else 32, or fewer to make at least eight steps.

    Args:
        config: says it, or `auto`.
        n: training samples.
        processes: that train together.
    """
    return config.batch_size if config.batch_size != "auto" else min(32, max(4, n // (8 * processes)))
