"""The decoder head: a class for every pixel from cached maps of several depths, the skip connections of a U-Net."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from featurecache import config
from featurecache.data.dense import DenseTarget
from featurecache.errors import FeatureCacheError, InputError, RunError
from featurecache.features.features import Block, Features, chunk_rows, reading_order, views_of
from featurecache.heads.base import Fold, Head
from featurecache.heads.decodermodule import DecoderModule, DecoderSettings, DenseLoss, Size
from featurecache.heads.fc import WARM_UP, batch_bounds, head_device, make_adamw, one_cycle, read_tensors
from featurecache.heads.rows import FeatureRows, Rows, StreamRows

OUTPUT_BYTES = 64 << 20  # of logits at a time

__all__ = ["DecoderHead", "DecoderModule", "DecoderSettings", "DenseLoss"]


class DecoderHead(Head):
    """See the module; `.module` is the network, a `DecoderModule`. `scores` are the shares of the picture.

    Maps are read batch by batch, never held: a row may have megabytes.
    """

    name: ClassVar[str] = "decoder"
    input: ClassVar[Literal["vector", "maps"]] = "maps"
    tasks: ClassVar[tuple[str, ...]] = ("dense",)
    Settings: ClassVar[type[config.Settings]] = DecoderSettings
    file: ClassVar[str] = "head.safetensors"
    settings: DecoderSettings
    module: DecoderModule

    @classmethod
    def adopt(
        cls,
        module: DecoderModule,
        target: DenseTarget,
        blocks: Sequence[Block],
        settings: DecoderSettings,
        *,
        seed: int,
    ) -> Self:
        """A fitted head around a module that was trained elsewhere."""
        head = cls(settings.model_dump(), seed=seed)
        head.task_, head.classes_, head.names_ = target.task, tuple(target.classes), tuple(target.names)
        head.blocks_, head.skipped_, head.history_ = tuple(blocks), (), []
        head.fitted_ = {"size": list(module.size)}
        head.module = module
        head._is_fitted = True
        return head

    @property
    def outputs(self) -> tuple[str, ...]:
        """The classes."""
        return self.classes_

    @property
    def size(self) -> Size:
        """(height, width) of the masks."""
        return self.module.size

    def scores(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        """The share of the picture that each class takes: mean probability over its pixels, (n, classes)."""
        self._check_rows(x)
        size = self.rows_at_once
        parts = [self._scores(x[start : start + size]) for start in range(0, len(x), size)]
        return np.concatenate(parts) if parts else np.empty((0, len(self.classes_)))

    def masks(self, x: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The most probable class of every pixel, (n, height, width), of few enough rows (n, n_features)."""
        self._check_rows(x)
        return self._logits(x).argmax(dim=1).to(torch.uint8).cpu().numpy()

    def mask_rows(
        self, features: Features, rows: NDArray[np.int64] | None = None
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        """Positions in `rows` and their masks, some at a time, in the order in which they are best read."""
        rows = np.arange(features.shape[0]) if rows is None else np.asarray(rows, dtype=np.int64)
        order = reading_order(features, rows)
        for start in range(0, len(rows), self.rows_at_once):
            part = order[start : start + self.rows_at_once]
            yield part, self.masks(features[rows[part]])

    @property
    def rows_at_once(self) -> int:
        """Rows whose maps and logits are in memory at a time."""
        logits = 4 * len(self.classes_) * math.prod(self.size)
        return max(1, min(chunk_rows(self.n_features), OUTPUT_BYTES // logits))

    def _fit(self, train: Fold, valid: Fold | None) -> None:
        if len(train) < 2:
            raise InputError(f"head 'decoder' needs at least 2 training rows, got {len(train)}")
        if len(views_of(self.blocks_)) != 1:
            raise InputError("head 'decoder': masks lie on one view; choose it with --views")
        device = head_device(self.device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], device_type="cuda"):
            torch.manual_seed(self.seed)
            self._train(train, valid, device)

    def _train(self, train: Fold, valid: Fold | None, device: torch.device) -> None:
        settings, target = self.settings, train.target
        assert isinstance(target, DenseTarget)
        rows, checks = _open(train, device), _open(valid, device) if valid is not None else None
        self.fitted_ = {"size": list(target.size)}
        self.module = module = DecoderModule(self.blocks_, len(target.classes), settings, target.size).to(device)
        loss = DenseLoss(
            target, class_weight=settings.class_weight, dice=settings.dice, label_smoothing=settings.label_smoothing
        ).to(device)
        optimizer = make_adamw(module, device, lr=settings.lr, weight_decay=settings.weight_decay)
        generator = torch.Generator().manual_seed(self.seed)
        bounds = batch_bounds(len(train), _batch_size(settings, len(train)))
        steps, step, warm = settings.epochs * len(bounds), 0, math.ceil(WARM_UP * settings.epochs)
        best, best_epoch, best_state = math.inf, 0, {}
        for epoch in range(1, settings.epochs + 1):
            module.train()
            loss.train()
            total = torch.zeros(2, device=device)
            for x, y in rows.epoch(bounds, generator):
                lr = one_cycle(step, steps, settings.lr)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                sums = torch.stack(loss.sums(module(x), y))
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(sums[0] / sums[1].clamp(min=1))
                optimizer.step()
                total += sums.detach()
                step += 1
            train_loss = float(total[0] / total[1].clamp(min=1))
            valid_loss = self._mean_loss(loss, checks) if checks is not None else None
            if not math.isfinite(train_loss if valid_loss is None else valid_loss):
                raise FeatureCacheError(
                    f"head 'decoder': the loss is not finite in epoch {epoch}. Lower lr (now {settings.lr})."
                )
            self._report(epoch=epoch, train_loss=train_loss, valid_loss=valid_loss, lr=lr)
            if valid_loss is None:
                best_epoch = epoch
            elif valid_loss < best:
                best, best_epoch = valid_loss, epoch
                best_state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
            elif epoch - max(best_epoch, warm) >= settings.patience:
                break
        if best_state:
            module.load_state_dict(best_state)
        self.fitted_["epoch"] = best_epoch
        module.eval()

    def _mean_loss(self, loss: DenseLoss, rows: Rows) -> float:
        """Loss over all rows with the module in eval mode."""
        self.module.eval()
        loss.eval()
        sums, size = torch.zeros(2, device=loss.weights.device), self.rows_at_once
        with torch.inference_mode():
            for start in range(0, len(rows), size):
                x, y = rows.batch(torch.arange(start, min(start + size, len(rows))))
                sums += torch.stack(loss.sums(self.module(x), y))
        return float(sums[0] / sums[1]) if sums[1] else math.nan

    def _logits(self, x: NDArray[np.float32]) -> torch.Tensor:
        module = self.module.eval()
        device = next(module.parameters()).device
        with torch.inference_mode():
            found: torch.Tensor = module(torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)).to(device))
        return found

    def _scores(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        return self._logits(x).double().softmax(dim=1).mean(dim=(2, 3)).cpu().numpy()

    def _write(self, path: Path) -> None:
        save_file({name: t.detach().cpu().contiguous() for name, t in self.module.state_dict().items()}, path)

    def _read(self, path: Path) -> None:
        size = self.fitted_.get("size")
        if not (
            isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and 0 < n < 1 << 15 for n in size)
        ):
            raise RunError(f"{path.parent / 'head.json'}: fitted: 'size' must be two lengths (found {size!r})")

        def make() -> DecoderModule:
            return DecoderModule(self.blocks_, len(self.classes_), self.settings, (size[0], size[1]))

        with torch.device("meta"):
            empty = make()
        tensors = read_tensors(path, empty)
        module = make()
        module.load_state_dict(tensors)
        self.module = module.to(head_device(self.device)).eval()


def _open(fold: Fold, device: torch.device) -> Rows:
    """Rows that are read as they are asked for: by random access where they are mapped, else by whole chunks."""
    streamed = getattr(fold.features, "buffer_rows", None) is not None
    return (StreamRows if streamed else FeatureRows)(fold, device)


def _batch_size(settings: DecoderSettings, n: int) -> int:
    return settings.batch_size if settings.batch_size != "auto" else min(16, max(4, n // 8))


def is_dense(kind: type[Any]) -> bool:
    """Whether a head predicts masks and nothing else."""
    return tuple(kind.tasks) == ("dense",)
