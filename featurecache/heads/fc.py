"""The FC head: a small network sized like fastai's `create_head`, for cached features and for joint training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from featurecache import config
from featurecache.data.targets import Target
from featurecache.errors import FeatureCacheError, InputError, RunError
from featurecache.features import Block, views_of
from featurecache.fusion import drop_views
from featurecache.heads.base import Fold, Head
from featurecache.heads.losses import (
    ClassWeight,
    HeadLoss,
    n_outputs,
    regression_scale,
    scores_from_outputs,
)
from featurecache.heads.rows import Rows, open_rows

WARM_UP = 0.25  # part of the steps in which the learning rate rises

Fraction = Annotated[float, Field(ge=0, lt=1)]


class FCSettings(config.Settings):
    """Settings of the FC head.

    `dropout` stands before the last layer, half of it before each earlier one, as in fastai. `batch_size` auto is a
    fiftieth of the training rows, as a power of two between 32 and 512. `lr` is the peak of the one-cycle schedule.
    Training ends when the validation loss has not improved for `patience` epochs, counted at the earliest from the
    peak of `lr`; the best epoch is kept.
    """

    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (512,)
    dropout: Fraction = 0.5
    batch_norm: bool = True
    epochs: Annotated[int, Field(ge=1)] = 30
    patience: Annotated[int, Field(ge=1)] = 8
    batch_size: Annotated[int, Field(ge=2)] | Literal["auto"] = "auto"
    lr: Annotated[float, Field(gt=0)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    class_weight: ClassWeight = None
    label_smoothing: Fraction = 0.0
    view_dropout: Fraction = 0.0


class PresentBatchNorm(nn.BatchNorm1d):
    """BatchNorm whose statistics come from the samples that have the view; what is missing becomes 0 after it."""

    def forward(self, x: Tensor, missing: Tensor | None = None) -> Tensor:
        """Normalise.

        Args:
            x: (n, d) float32, finite.
            missing: (n, d) bool, or None where nothing is; then this is `nn.BatchNorm1d`.
        """
        if missing is None:
            return super().forward(x)
        keep = ~missing
        mean, var = self.running_mean, self.running_var
        assert mean is not None
        assert var is not None
        if self.training:
            count = keep.sum(dim=0)
            safe = count.clamp(min=1)
            here = torch.where(keep, x, 0).sum(dim=0) / safe
            spread = torch.where(keep, x - here, 0).square().sum(dim=0) / safe
            enough = count > 1  # one sample has no variance: such columns fall back on the running statistics
            with torch.no_grad():
                step = enough * (self.momentum or 0.1)
                mean.lerp_(here, step)
                var.lerp_(spread * safe / (safe - 1).clamp(min=1), step)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
            mean, var = torch.where(enough, here, mean), torch.where(enough, spread, var)
        return torch.where(keep, (x - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias, 0)


class FCModule(nn.Module):
    """BatchNorm, dropout, linear, ReLU, BatchNorm, dropout, linear; missing views are zeros plus an indicator.

    Args:
        blocks: the columns of the input.
        n_out: outputs.
        settings: sizes and dropout.
        indicators: adds an input per view that is 1 where the view is missing. Without them a missing view is a zero
            (the mean, after BatchNorm) and nothing tells.

    `forward` takes float (n, d), NaN in the blocks of missing views, and gives float (n, n_out): logits, for regression
    values in the target's unit (`out_mean`, `out_scale` are buffers).
    """

    first: Tensor
    view_of: Tensor
    out_mean: Tensor
    out_scale: Tensor

    def __init__(self, blocks: Sequence[Block], n_out: int, settings: FCSettings, *, indicators: bool) -> None:
        super().__init__()
        views = views_of(tuple(blocks))
        n_in = blocks[-1].stop
        view_of = np.concatenate([np.full(b.stop - b.start, views.index(b.view)) for b in blocks])
        first = [next(b.start for b in blocks if b.view == view) for view in views]
        self.register_buffer("first", torch.tensor(first), persistent=False)
        self.register_buffer("view_of", torch.as_tensor(view_of), persistent=False)
        self.register_buffer("out_mean", torch.zeros(n_out))
        self.register_buffer("out_scale", torch.ones(n_out))
        self.indicators = indicators
        self.norm = PresentBatchNorm(n_in) if settings.batch_norm else None
        sizes = [n_in, *settings.hidden]
        self.drop = nn.Dropout(settings.dropout / 2 if settings.hidden else settings.dropout)
        layers: list[nn.Module] = []
        extra = len(views) if indicators else 0
        for i, size in enumerate(settings.hidden):
            layers += [nn.Linear(sizes[i] + (extra if i == 0 else 0), size), nn.ReLU()]
            layers += [nn.BatchNorm1d(size)] if settings.batch_norm else []
            layers += [nn.Dropout(settings.dropout if i == len(settings.hidden) - 1 else settings.dropout / 2)]
        layers.append(nn.Linear(sizes[-1] + (0 if settings.hidden else extra), n_out))
        self.layers = nn.Sequential(*layers)

    @property
    def n_in(self) -> int:
        """Columns of the input."""
        return len(self.view_of)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = x.float()
        missing = x[:, self.first].isnan()
        hidden = missing[:, self.view_of] if bool(missing.any()) else None
        if hidden is not None:
            x = torch.where(hidden, 0, x)
        if self.norm is not None:
            x = self.norm(x, hidden)
        x = self.drop(x)
        if self.indicators:
            x = torch.cat([x, missing.to(x.dtype)], dim=1)
        outputs: Tensor = self.layers(x)
        return outputs.float() * self.out_scale + self.out_mean


def build_fc(blocks: Sequence[Block], target: Target, settings: FCSettings, *, indicators: bool) -> FCModule:
    """A fresh module for a task, with regression targets standardised on `target`, the training rows.

    The weights are drawn from torch's global generator: seed it before.
    """
    module = FCModule(blocks, n_outputs(target), settings, indicators=indicators)
    if target.task == "regression":
        mean, scale = regression_scale(target)
        module.out_mean.copy_(torch.as_tensor(mean))
        module.out_scale.copy_(torch.as_tensor(scale))
    return module


def hide_views(x: Tensor, module: FCModule, p: float, generator: torch.Generator | None = None) -> Tensor:
    """View dropout on fused features: NaN in the blocks of views hidden at random, never in all that a row has."""
    there = ~x[:, module.first].isnan()
    kept = drop_views(there, p, generator)
    return torch.where(kept[:, module.view_of], x, torch.nan)


def one_cycle(step: int, steps: int, peak: float) -> float:
    """Learning rate at a step: cosine from peak/25 up over the first quarter, then down to peak/1e5, as in fastai."""
    turn = WARM_UP * steps
    if step < turn:
        low, high, part = peak / 25, peak, step / turn
    else:
        low, high, part = peak, peak / 1e5, (step - turn) / max(steps - 1 - turn, 1.0)
    return high + (low - high) * (1 + math.cos(math.pi * min(part, 1.0))) / 2


def batch_bounds(n: int, size: int) -> list[tuple[int, int]]:
    """Start and stop of each batch; a last batch of one row, which BatchNorm can't take, joins the one before it."""
    starts = list(range(0, n, size))
    if len(starts) > 1 and n - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], n], strict=True))


class FCHead(Head):
    """See the module; `.module` is the network, an `FCModule`."""

    name: ClassVar[str] = "fc"
    Settings: ClassVar[type[config.Settings]] = FCSettings
    file: ClassVar[str] = "head.safetensors"
    settings: FCSettings
    module: FCModule

    @classmethod
    def adopt(
        cls,
        module: FCModule,
        target: Target,
        blocks: Sequence[Block],
        settings: FCSettings,
        *,
        skipped: Sequence[str] = (),
        seed: int = 0,
    ) -> Self:
        """A fitted head around a module that was trained elsewhere, so that it can be saved and used as any other."""
        head = cls(settings.model_dump(), seed=seed)
        head.task_, head.classes_, head.names_ = target.task, tuple(target.classes), tuple(target.names)
        head.blocks_, head.skipped_ = tuple(blocks), tuple(skipped)
        head.history_, head.fitted_ = [], {"indicators": module.indicators}
        head.module = module
        head._is_fitted = True
        return head

    def _fit(self, train: Fold, valid: Fold | None) -> None:
        if len(train) < 2:
            raise InputError(f"head 'fc' needs at least 2 training rows, got {len(train)}")
        device = _device(self.device)
        devices = [device] if device.type == "cuda" else []
        # Initial weights and dropout come from torch's global generator: seed it, and give it back as it was.
        with torch.random.fork_rng(devices=devices, device_type="cuda"):
            torch.manual_seed(self.seed)
            self._train(train, valid, device)

    def _train(self, train: Fold, valid: Fold | None, device: torch.device) -> None:
        settings = self.settings
        rows = open_rows(train, device, self.memory)
        checks = open_rows(valid, device, self.memory) if valid is not None else None
        indicators = settings.view_dropout > 0 or rows.missing
        self.fitted_ = {"indicators": indicators}
        self.module = module = build_fc(self.blocks_, train.target, settings, indicators=indicators).to(device)
        loss = HeadLoss(train.target, class_weight=settings.class_weight, label_smoothing=settings.label_smoothing).to(
            device
        )
        optimizer = _optimizer(module, settings, device)
        generator = torch.Generator().manual_seed(self.seed)
        bounds = batch_bounds(len(train), _batch_size(settings, len(train)))
        steps, step = settings.epochs * len(bounds), 0
        best, best_epoch, best_state = math.inf, 0, {}
        warm = math.ceil(WARM_UP * settings.epochs)
        for epoch in range(1, settings.epochs + 1):
            module.train()
            loss.train()
            total = torch.zeros((), device=device)
            weight = torch.zeros((), device=device)
            order = torch.randperm(len(train), generator=generator)
            for start, stop in bounds:
                lr = one_cycle(step, steps, settings.lr)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                x, y = rows.batch(order[start:stop])
                if settings.view_dropout > 0:
                    x = hide_views(x, module, settings.view_dropout, generator)
                batch_total, batch_weight = loss.sums(module(x), y)
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(batch_total / batch_weight.clamp(min=1e-12))
                optimizer.step()
                total += batch_total.detach()
                weight += batch_weight.detach()
                step += 1
            train_loss = float(total / weight.clamp(min=1e-12))
            valid_loss = _mean_loss(module, loss, checks) if checks is not None else None
            if not math.isfinite(train_loss if valid_loss is None else valid_loss):
                raise FeatureCacheError(
                    f"head 'fc': the loss is not finite in epoch {epoch}. Lower lr (now {settings.lr})."
                )
            self._report(epoch=epoch, train_loss=train_loss, valid_loss=valid_loss, lr=lr)
            if valid_loss is None:
                best_epoch = epoch
                continue
            if valid_loss < best:
                best, best_epoch = valid_loss, epoch
                best_state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
            elif epoch - max(best_epoch, warm) >= settings.patience:
                break
        if best_state:
            module.load_state_dict(best_state)
        self.fitted_["epoch"] = best_epoch
        module.eval()

    def _scores(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        module = self.module.eval()
        with torch.inference_mode():
            outputs = module(torch.from_numpy(np.ascontiguousarray(x)).to(module.out_mean.device))
        found = scores_from_outputs(self.task_, outputs)
        return found if self.task_ in ("binary", "multiclass") else found[:, self.active]

    def _write(self, path: Path) -> None:
        save_file({name: t.detach().cpu().contiguous() for name, t in self.module.state_dict().items()}, path)

    def _read(self, path: Path) -> None:
        indicators = self.fitted_.get("indicators")
        if not isinstance(indicators, bool):
            raise RunError(
                f"{path.parent / 'head.json'}: fitted: 'indicators' must be true or false (found {indicators!r})"
            )
        tensors = load_file(path)
        with torch.device("meta"):
            module = FCModule(self.blocks_, len(self.outputs), self.settings, indicators=indicators)
        expected = {name: (t.shape, t.dtype) for name, t in module.state_dict().items()}
        for name in sorted(expected.keys() | tensors.keys()):
            if name not in expected or name not in tensors:
                raise RunError(f"{path}: tensor {name!r} is {'unknown' if name in tensors else 'missing'}")
            shape, dtype = expected[name]
            if tensors[name].shape != shape or tensors[name].dtype != dtype:
                found = f"{tuple(tensors[name].shape)} {tensors[name].dtype}"
                raise RunError(f"{path}: tensor {name!r} is {found}, expected {tuple(shape)} {dtype}")
        module = FCModule(self.blocks_, len(self.outputs), self.settings, indicators=indicators)
        module.load_state_dict(tensors)
        self.module = module.to(_device(self.device)).eval().requires_grad_(True)


def _mean_loss(module: FCModule, loss: HeadLoss, rows: Rows) -> float:
    """Loss over all rows with the module in eval mode."""
    module.eval()
    loss.eval()
    total, weight = 0.0, 0.0
    with torch.inference_mode():
        for start in range(0, len(rows), 4096):
            x, y = rows.batch(torch.arange(start, min(start + 4096, len(rows))))
            batch_total, batch_weight = loss.sums(module(x), y)
            total += float(batch_total)
            weight += float(batch_weight)
    return total / weight if weight else math.nan


def _optimizer(module: FCModule, settings: FCSettings, device: torch.device) -> torch.optim.AdamW:
    """AdamW; biases and BatchNorm are not decayed."""
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, fused=device.type in ("cpu", "cuda"))


def _batch_size(settings: FCSettings, n: int) -> int:
    """The batch size of the settings, or the automatic one."""
    if settings.batch_size != "auto":
        return settings.batch_size
    return int(min(512, max(32, 2 ** round(math.log2(max(n / 50, 1))))))


def _device(name: str) -> torch.device:
    """The torch device of a name; `auto` is a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r}: torch finds no CUDA device here. Use device 'cpu'.")
    return device
