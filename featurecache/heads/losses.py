"""What the FC head minimises, alone and at the end of joint training: masked, weighted losses on logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from featurecache.data.dense import DenseTarget
from featurecache.data.targets import Target
from featurecache.errors import InputError, did_you_mean

ClassWeight = Literal["balanced"] | dict[str, float] | None
PositiveWeight = Literal["balanced"] | float | dict[str, float] | None


def class_weights(target: Target, setting: ClassWeight) -> NDArray[np.float64] | None:
    """Weights of the classes or of a label's two sides, counted on `target`, the training rows.

    Args:
        target: binary, multiclass or multilabel; anything else has no classes.
        setting: None; `balanced` as scikit-learn has it, n / (number of classes * count of the class); or a weight for
            some classes (multilabel: for the positives of some labels), 1 for the others.

    Returns:
        None, or (n_classes,); multilabel (n_labels, 2), for negatives and positives.

    Raises:
        InputError: a name in `setting` is no class or label, or the task has none.
    """
    if setting is None:
        return None
    values = target.values
    if target.task == "regression":
        raise InputError("class_weight: a regression has no classes")
    if target.task == "multilabel":
        weights = np.ones((len(target.names), 2))
        if isinstance(setting, Mapping):
            weights[:, 1] = _named(setting, target.names, "label")
            return weights
        counts = np.stack([(values == 0).sum(axis=0), (values == 1).sum(axis=0)], axis=1)
        return np.asarray(counts.sum(axis=1, keepdims=True) / (2 * np.maximum(counts, 1)))
    if isinstance(setting, Mapping):
        return _named(setting, target.classes, "class")
    counts = np.bincount(values[values >= 0], minlength=len(target.classes))
    return np.asarray(counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1)))


def positive_weights(target: Target, setting: PositiveWeight) -> NDArray[np.float64] | None:
    """`pos_weight` as torch has it, as `class_weights` gives them: what positives count, where negatives count 1.

    Args:
        target: binary or multilabel, the training rows.
        setting: None; a weight for all positives; one for those of some labels; or `balanced`, negatives divided by
            positives.

    Raises:
        InputError: the task has no positives, or a name in `setting` is no label.
    """
    if setting is None:
        return None
    if target.task not in ("binary", "multilabel"):
        raise InputError(f"pos_weight: a {target.task} target has no positives; use class_weight")
    values = target.values if target.task == "multilabel" else target.values[:, None]
    if isinstance(setting, Mapping):
        found = _named(setting, target.names, "label", option="pos_weight")
    elif setting == "balanced":
        found = np.maximum((values == 0).sum(axis=0), 1) / np.maximum((values == 1).sum(axis=0), 1)
    else:
        found = np.full(values.shape[1], float(setting))
    weights = np.stack([np.ones(len(found)), found], axis=1)
    return weights if target.task == "multilabel" else np.asarray(weights[0])


def entry_weights(target: Target, weights: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """The weight of every target value, 0 where unknown.

    Args:
        target: any task.
        weights: what `class_weights` gave.

    Returns:
        (n,), or (n, n_names) for multilabel and regression.
    """
    values = target.values
    if target.task in ("binary", "multiclass"):
        found = np.ones(len(values)) if weights is None else weights[np.maximum(values, 0)]
        return np.asarray(np.where(values >= 0, found, 0.0))
    known = ~np.isnan(values)
    if weights is None:
        return np.asarray(known, dtype=np.float64)
    return np.asarray(np.where(known, np.where(values == 1, weights[:, 1], weights[:, 0]), 0.0))


class HeadLoss(nn.Module):
    """Mean loss over known targets: cross-entropy, per-label binary cross-entropy, or squared error.

    Built from the training rows: class weights, which labels can be trained, and the scale of regression targets, so
    that the loss does not depend on their units.

    Args:
        target: of the training rows.
        class_weight: see `class_weights`.
        pos_weight: see `positive_weights`; not beside `class_weight`.
        label_smoothing: in [0, 1); for classes and labels, in training mode only.
    """

    weights: Tensor
    active: Tensor
    scale: Tensor

    def __init__(
        self,
        target: Target,
        *,
        class_weight: ClassWeight = None,
        pos_weight: PositiveWeight = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.task = target.task
        self.label_smoothing = label_smoothing
        weights = class_weights(target, class_weight)
        weights = positive_weights(target, pos_weight) if weights is None else weights
        n_weights = len(target.classes) if target.task in ("binary", "multiclass") else (len(target.names), 2)
        weights = np.ones(n_weights) if weights is None else weights
        values, n = target.values, len(target.names)
        active, scale = np.ones(n, dtype=bool), np.ones(n)
        if target.task == "multilabel":
            active = (values == 0).any(axis=0) & (values == 1).any(axis=0)
        elif target.task == "regression":
            active = ~np.isnan(values).all(axis=0)
            scale = regression_scale(target)[1]
        self.register_buffer("weights", torch.as_tensor(weights, dtype=torch.float32), persistent=False)
        self.register_buffer("active", torch.as_tensor(active), persistent=False)
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float32), persistent=False)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over the known targets of a batch, a scalar; 0 where none is known.

        Args:
            outputs: (n, n_outputs) logits, for regression predicted values.
            targets: what `target_tensor` gives for these rows.
        """
        total, weight = self.sums(outputs, targets)
        return total / weight.clamp(min=torch.finfo(weight.dtype).tiny)

    def sums(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted sum of the losses and sum of the weights, so that the batches of an epoch can be added up."""
        outputs = outputs.float()
        smoothing = self.label_smoothing if self.training else 0.0
        if self.task in ("binary", "multiclass"):
            known = targets >= 0
            index = targets.clamp(min=0)
            weight = self.weights[index] * known
            losses = F.cross_entropy(outputs, index, reduction="none", label_smoothing=smoothing)
            return (losses * weight).sum(), weight.sum()
        known = ~targets.isnan() & self.active
        filled = torch.where(known, targets, torch.zeros_like(targets))
        if self.task == "multilabel":
            smooth = filled * (1 - smoothing) + smoothing / 2
            losses = F.binary_cross_entropy_with_logits(outputs, smooth, reduction="none")
            weight = torch.where(filled > 0.5, self.weights[:, 1], self.weights[:, 0]) * known
        else:
            losses = ((outputs - filled) / self.scale) ** 2
            weight = known.to(outputs.dtype)
        return torch.where(known, losses * weight, torch.zeros_like(losses)).sum(), weight.sum()


def target_tensor(target: Target) -> Tensor:
    """Targets as `HeadLoss` takes them: int64 (n,) with -1, or float32 (n, n_names) with NaN where unknown.

    Of a dense target int64 (n,), which of its masks are meant.
    """
    if isinstance(target, DenseTarget):
        return torch.from_numpy(np.array(target.rows))
    integer = target.task in ("binary", "multiclass")
    return torch.from_numpy(np.array(target.values, dtype=np.int64 if integer else np.float32))


def scores_from_outputs(task: str, outputs: Tensor) -> NDArray[np.float64]:
    """Outputs of an FC module as the metrics take them: softmax, sigmoid per label, or the values; in double."""
    outputs = outputs.detach().double().cpu()
    if task in ("binary", "multiclass"):
        outputs = outputs.softmax(dim=1)
    elif task == "multilabel":
        outputs = outputs.sigmoid()
    return outputs.numpy()


def n_outputs(target: Target) -> int:
    """Outputs that an FC module needs: one per class (two for binary), label or regression target."""
    return len(target.classes) if target.task in ("binary", "multiclass") else len(target.names)


def regression_scale(target: Target) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation (1 where that is 0) of each regression target over its known values."""
    known = ~np.isnan(target.values)
    values = np.where(known, target.values, 0.0).astype(np.float64)
    count = np.maximum(known.sum(axis=0), 1)
    mean = values.sum(axis=0) / count
    deviation = np.sqrt((np.where(known, values - mean, 0.0) ** 2).sum(axis=0) / count)
    return mean, np.where(deviation > 0, deviation, 1.0)


def _named(
    setting: Mapping[str, float], names: tuple[str, ...], what: str, option: str = "class_weight"
) -> NDArray[np.float64]:
    """Weights in the order of `names`."""
    for name, weight in setting.items():
        if name not in names:
            raise InputError(f"{option}: no {what} {name!r}.{did_you_mean(name, names)} There are: {', '.join(names)}.")
        if not weight > 0:
            raise InputError(f"{option}: {name!r}={weight}: must be positive")
    return np.array([float(setting.get(name, 1.0)) for name in names])
