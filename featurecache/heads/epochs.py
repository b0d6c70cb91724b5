"""Heads that are a torch module trained in epochs: one-cycle, early stopping, the best epoch kept; and their file."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from featurecache import config
from featurecache.data.targets import Target
from featurecache.errors import FeatureCacheError, InputError, RunError
from featurecache.features.features import Block
from featurecache.heads.base import Fold, Head
from featurecache.heads.rows import Batch, Bounds, Rows

WARM_UP = 0.25  # part of the steps in which the learning rate rises

Sums = tuple[Tensor, Tensor]
Step = Callable[[Tensor, Tensor], Sums]
Module = TypeVar("Module", bound=nn.Module)


class EpochSettings(Protocol):
    """What the loop needs of a head's settings; each head declares them in its own order and with its own defaults."""

    @property
    def epochs(self) -> int:
        """The most there can be."""

    @property
    def patience(self) -> int:
        """Epochs without a better validation loss, counted at the earliest from the peak of `lr`."""

    @property
    def lr(self) -> float:
        """Peak of the one-cycle schedule."""

    @property
    def weight_decay(self) -> float:
        """That of AdamW."""


class Loss(Protocol):
    """A loss that can be added up over batches, as `HeadLoss` and `DenseLoss` can."""

    def train(self, mode: bool = True) -> Any:
        """As that of a module; label smoothing is for training only."""

    def sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Sum of the losses and sum of the weights."""


class EpochHead(Head, Generic[Module]):
    """A head that is a torch module, `.module`.

    A subclass writes `_train`, which makes the module and ends with `_epochs`; `_facts`; and `_read`, by `_load`.

    Attributes:
        summed: dtype in which the validation loss is added up.
    """

    file: ClassVar[str] = "head.safetensors"
    summed: ClassVar[torch.dtype] = torch.float64
    module: Module

    @classmethod
    def adopt(
        cls,
        module: Module,
        target: Target,
        blocks: Sequence[Block],
        settings: config.Settings,
        *,
        skipped: Sequence[str] = (),
        seed: int = 0,
    ) -> Self:
        """A fitted head around a module that was trained elsewhere, so that it can be saved and used as any other."""
        head = cls(settings.model_dump(), seed=seed)
        head.task_, head.classes_, head.names_ = target.task, tuple(target.classes), tuple(target.names)
        head.blocks_, head.skipped_, head.history_ = tuple(blocks), tuple(skipped), []
        head.module = module
        head.fitted_ = head._facts()
        head._is_fitted = True
        return head

    @abstractmethod
    def _train(self, train: Fold, valid: Fold | None, device: torch.device) -> None:
        """Make the module and train it."""

    @abstractmethod
    def _facts(self) -> dict[str, Any]:
        """Plain values without which the module can't be made again."""

    def _fit(self, train: Fold, valid: Fold | None) -> None:
        if len(train) < 2:
            raise InputError(f"head {self.name!r} needs at least 2 training rows, got {len(train)}")
        device = head_device(self.device)
        devices = [device] if device.type == "cuda" else []
        # Initial weights and dropout come from torch's global generator: seed it, and give it back as it was.
        with torch.random.fork_rng(devices=devices, device_type="cuda"):
            torch.manual_seed(self.seed)
            self._train(train, valid, device)

    def _epochs(
        self,
        settings: EpochSettings,
        loss: Loss,
        step: Step,
        rows: Rows,
        bounds: Bounds,
        generator: torch.Generator,
        checks: Callable[[], Iterable[Batch]] | None,
    ) -> None:
        """Train the module, report every epoch, and keep the best one.

        Args:
            settings: of the head.
            loss: for the validation rows.
            step: from a batch's features and targets, the sum of its losses and that of their weights.
            rows: to learn from.
            bounds: see `Rows.epoch`.
            generator: see `Rows.epoch`.
            checks: gives the batches of the validation rows; None trains all epochs and keeps the last.

        Raises:
            FeatureCacheError: the loss is not finite.
        """
        module = self.module
        device = next(module.parameters()).device
        optimizer = make_adamw(module, device, lr=settings.lr, weight_decay=settings.weight_decay)
        steps, warm = settings.epochs * len(bounds), math.ceil(WARM_UP * settings.epochs)
        best, best_epoch, best_state = math.inf, 0, {}
        for epoch in range(1, settings.epochs + 1):
            done = (epoch - 1) * len(bounds)
            rates = [one_cycle(number, steps, settings.lr) for number in range(done, done + len(bounds))]
            module.train()
            loss.train()
            train_loss = _one_epoch(step, rows.epoch(bounds, generator), optimizer, rates, device)
            valid_loss = mean_loss(module, loss, checks(), self.summed) if checks is not None else None
            if not math.isfinite(train_loss if valid_loss is None else valid_loss):
                raise FeatureCacheError(
                    f"head {self.name!r}: the loss is not finite in epoch {epoch}. Lower lr (now {settings.lr})."
                )
            self._report(epoch=epoch, train_loss=train_loss, valid_loss=valid_loss, lr=rates[-1])
            if valid_loss is None:
                best_epoch = epoch
            elif valid_loss < best:
                best, best_epoch = valid_loss, epoch
                best_state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
            elif epoch - max(best_epoch, warm) >= settings.patience:
                break
        if best_state:
            module.load_state_dict(best_state)
        self.fitted_ = {**self._facts(), "epoch": best_epoch}
        module.eval()

    def _write(self, path: Path) -> None:
        save_file({name: t.detach().cpu().contiguous() for name, t in self.module.state_dict().items()}, path)

    def _load(self, path: Path, make: Callable[[], Module]) -> None:
        """The module that `make` makes, with the tensors of a file; they are checked before memory is taken for it."""
        with torch.device("meta"):
            empty = make()
        tensors = read_tensors(path, empty)
        module = make()
        module.load_state_dict(tensors)
        self.module = module.to(head_device(self.device)).eval()


def _one_epoch(
    step: Step,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    rates: Sequence[float],
    device: torch.device,
) -> float:
    """A step of the optimizer for each batch, at the learning rate for it; the mean loss on the way."""
    sums = torch.zeros(2, device=device)  # read once, at the end: a GPU need not wait
    for (x, y), lr in zip(batches, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        total, weight = step(x, y)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(total / weight.clamp(min=1e-12))
        optimizer.step()
        sums += torch.stack([total.detach(), weight.detach()])
    return float(sums[0] / sums[1].clamp(min=1e-12))


def mean_loss(module: nn.Module, loss: Loss, batches: Iterable[Batch], dtype: torch.dtype) -> float:
    """Loss over all rows with the module in eval mode, added up in `dtype`; NaN where no target is known."""
    module.eval()
    loss.train(False)
    sums = torch.zeros(2, dtype=dtype)
    with torch.inference_mode():
        for x, y in batches:
            sums += torch.stack(loss.sums(module(x), y)).cpu()
    return float(sums[0] / sums[1])


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


def make_adamw(module: nn.Module, device: torch.device, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; biases and BatchNorm are not decayed."""
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, fused=device.type in ("cpu", "cuda"))


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


def head_device(name: str) -> torch.device:
    """The torch device of a name; `auto` is a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r}: torch finds no CUDA device here. Use device 'cpu'.")
    return device
