"""The FC head: a small network sized like fastai's `create_head`, for cached features and for joint training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from featurecache import config
from featurecache.data.targets import Target
from featurecache.errors import FeatureCacheError, InputError, RunError
from featurecache.features.features import Block
from featurecache.heads.base import Fold, Head
from featurecache.heads.fcmodule import FCModule, FCSettings, PresentBatchNorm, build_fc, hide_views, mix_rows
from featurecache.heads.losses import HeadLoss, scores_from_outputs
from featurecache.heads.rows import Rows, open_rows
from featurecache.heads.space import Choice, Space, Span

__all__ = ["FCHead", "FCModule", "FCSettings", "PresentBatchNorm", "build_fc", "hide_views"]

WARM_UP = 0.25  # part of the steps in which the learning rate rises


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
    search_space: ClassVar[Space] = {
        "hidden": Choice(((), (128,), (256,), (512,), (512, 256))),
        "dropout": Span(0.0, 0.7),
        "lr": Span(1e-4, 3e-2, log=True),
        "weight_decay": Span(1e-4, 1.0, log=True),
    }
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
        device = head_device(self.device)
        devices = [device] if device.type == "cuda" else []
        # Initial weights and dropout come from torch's global generator: seed it, and give it back as it was.
        with torch.random.fork_rng(devices=devices, device_type="cuda"):
            torch.manual_seed(self.seed)
            self._train(train, valid, device)

    def _train(self, train: Fold, valid: Fold | None, device: torch.device) -> None:
        settings = self.settings
        rows = open_rows(train, device, self.memory)
        left = None if self.memory is None else self.memory - rows.nbytes
        checks = open_rows(valid, device, left) if valid is not None else None
        indicators = settings.view_dropout > 0 or rows.missing
        self.fitted_ = {"indicators": indicators}
        self.module = module = build_fc(self.blocks_, train.target, settings, indicators=indicators).to(device)
        loss = HeadLoss(
            train.target,
            class_weight=settings.class_weight,
            pos_weight=settings.pos_weight,
            label_smoothing=settings.label_smoothing,
        ).to(device)
        optimizer = make_adamw(module, device, lr=settings.lr, weight_decay=settings.weight_decay)
        generator, rng = torch.Generator().manual_seed(self.seed), np.random.default_rng(self.seed)
        bounds = batch_bounds(len(train), _batch_size(settings, len(train)))
        steps, step = settings.epochs * len(bounds), 0
        best, best_epoch, best_state = math.inf, 0, {}
        warm = math.ceil(WARM_UP * settings.epochs)
        for epoch in range(1, settings.epochs + 1):
            module.train()
            loss.train()
            total = torch.zeros((), device=device)
            weight = torch.zeros((), device=device)
            for x, y in rows.epoch(bounds, generator):
                lr = one_cycle(step, steps, settings.lr)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                if settings.view_dropout > 0:
                    x = hide_views(x, module, settings.view_dropout, generator)
                if settings.mixup > 0:
                    x, partner, own = mix_rows(x, settings.mixup, rng, generator)
                    outputs = module(x)
                    both = zip(loss.sums(outputs, y), loss.sums(outputs, y[partner]), strict=True)
                    batch_total, batch_weight = (own * mine + (1 - own) * other for mine, other in both)
                else:
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
        with torch.device("meta"):
            module = FCModule(self.blocks_, len(self.outputs), self.settings, indicators=indicators)
        tensors = read_tensors(path, module)
        module = FCModule(self.blocks_, len(self.outputs), self.settings, indicators=indicators)
        module.load_state_dict(tensors)
        self.module = module.to(head_device(self.device)).eval().requires_grad_(True)


def read_tensors(path: Path, module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which must be those of `module` (it may be on the meta device).

    Raises:
        RunError: one is missing, unknown, or of another shape or type.
    """
    tensors = load_file(path)
    expected = {name: (t.shape, t.dtype) for name, t in module.state_dict().items()}
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in expected or name not in tensors:
            raise RunError(f"{path}: tensor {name!r} is {'unknown' if name in tensors else 'missing'}")
        shape, dtype = expected[name]
        if tensors[name].shape != shape or tensors[name].dtype != dtype:
            found = f"{tuple(tensors[name].shape)} {tensors[name].dtype}"
            raise RunError(f"{path}: tensor {name!r} is {found}, expected {tuple(shape)} {dtype}")
    return tensors


def _mean_loss(module: FCModule, loss: HeadLoss, rows: Rows) -> float:
    """Loss over all rows with the module in eval mode."""
    module.eval()
    loss.eval()
    total, weight = 0.0, 0.0
    with torch.inference_mode():
        for x, y in rows.in_order():
            batch_total, batch_weight = loss.sums(module(x), y)
            total += float(batch_total)
            weight += float(batch_weight)
    return total / weight if weight else math.nan


def make_adamw(module: nn.Module, device: torch.device, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; biases and BatchNorm are not decayed."""
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, fused=device.type in ("cpu", "cuda"))


def _batch_size(settings: FCSettings, n: int) -> int:
    """The batch size of the settings, or the automatic one."""
    if settings.batch_size != "auto":
        return settings.batch_size
    return int(min(512, max(32, 2 ** round(math.log2(max(n / 50, 1))))))


def head_device(name: str) -> torch.device:
    """The torch device of a name; `auto` is a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r}: torch finds no CUDA device here. Use device 'cpu'.")
    return device
