"""Samples as batches of live images: read, decoded, augmented alike in all views, and what can't be read as a value."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featurecache.data.manifest import Manifest
from featurecache.data.preprocessing import stack
from featurecache.data.readers.base import ReadFailure, read
from featurecache.data.transforms import Augmentation
from featurecache.fusion import drop_views
from featurecache.stageone.keys import Cell, present_cells, read_payload
from featurecache.stageone.viewsetup import ViewSetup

AHEAD = 3  # batches in memory before the one that the device works on
_VIEW_DROPOUT = 0x76696577  # tells the draw of view dropout apart from the other draws of a sample


@dataclass(frozen=True)
class Failure:
    """An image that can't be read, a row of failures.csv; `cell` is its row in the manifest's cells, -1 for none."""

    sample: int
    view: str
    path: str
    error: str
    cell: int = -1


@dataclass(frozen=True)
class Loaded:
    """The images of one sample, per view (channels, height, width), and the keys of all its payloads.

    `mask` (height, width) uint8 is what an augmented sample is to become, of a dense target.
    """

    sample: int
    images: Mapping[str, Sequence[Tensor]]
    keys: tuple[bytes, ...]
    mask: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """What goes through the model at once.

    Attributes:
        samples: (n,) int64 rows of the manifest's table.
        present: (n, n_views) bool: what the model gets, which is less than there is under view dropout.
        images: per view (m, channels, height, width), uint8 or float32 in 0..1, not normalised.
        owner: per view (m,) int64, position in the batch of each image's sample.
        failures: samples that should have been in this batch and could not be read.
        masks: (n, height, width) uint8 in the place of the samples' targets, where they change with the images.
    """

    samples: NDArray[np.int64]
    present: Tensor
    images: Mapping[str, Tensor]
    owner: Mapping[str, Tensor]
    failures: tuple[Failure, ...]
    masks: Tensor | None = None

    def alone(self, views: Sequence[str], number: int) -> Batch:
        """The same samples, of which the model gets that one of the views."""
        present = torch.zeros_like(self.present)
        present[:, number] = self.present[:, number]
        kept = {views[number]} & set(self.images)
        images, owner = ({view: held[view] for view in kept} for held in (self.images, self.owner))
        return replace(self, present=present, images=images, owner=owner)


class SampleImages:
    """The images of a manifest by sample; safe to use from several threads.

    Args:
        manifest: the table and its cells.
        setups: reader and preprocessing of each view, in the order of the model's views.
        seed: of every draw; a draw depends on (seed, epoch, sample) alone.
        augmentation: applied where an epoch is given, with one geometric draw for all views of a sample; per view, or
            one for all.
        own: by view the augmentation of each sample, in the place of the view's.
        alike: whether all samples get the same draws, so that none depends on its place in the manifest.
        view_dropout: probability that a view is hidden where an epoch is given.
    """

    def __init__(
        self,
        manifest: Manifest,
        setups: Mapping[str, ViewSetup],
        *,
        seed: int = 0,
        augmentation: Augmentation | Mapping[str, Augmentation] | None = None,
        own: Mapping[str, Sequence[Augmentation | None]] = MappingProxyType({}),
        view_dropout: float = 0.0,
        alike: bool = False,
    ) -> None:
        self.views = tuple(setups)
        self._setups = dict(setups)
        self._seed, self._view_dropout, self._alike = seed, view_dropout, alike
        if isinstance(augmentation, Augmentation):
            augmentation = dict.fromkeys(self.views, augmentation)
        self._augmentation, self._own = dict(augmentation or {}), dict(own)
        self._cells: dict[str, list[list[Cell]]] = {}
        owners = manifest.cells["sample"].to_numpy()
        for view in self.views:
            held: list[list[Cell]] = [[] for _ in range(manifest.table.height)]
            for cell in present_cells(manifest.cells, view):
                held[int(owners[cell.index])].append(cell)
            several = manifest.multi in ("mean", "max")
            self._cells[view] = held if several else [cells[:1] for cells in held]

    def __len__(self) -> int:
        return len(self._cells[self.views[0]])

    def close(self) -> None:
        """Let go of what is held open: here nothing, since files are opened one at a time."""

    @property
    def present(self) -> NDArray[np.bool_]:
        """(n_samples, n_views) bool: which views a sample has an image of."""
        return np.array([[bool(cells) for cells in self._cells[view]] for view in self.views], dtype=bool).T

    def leave_out(self, failure: Failure) -> bool:
        """Go on without an image that can't be read, as if it were missing; False where its sample has no other."""
        kept = [cell for cell in self._cells[failure.view][failure.sample] if cell.index != failure.cell]
        others = any(self._cells[view][failure.sample] for view in self.views if view != failure.view)
        if kept or others:
            self._cells[failure.view][failure.sample] = kept
        return bool(kept or others)

    def shown(self, sample: int, epoch: int | None) -> Tensor:
        """(n_views,) bool: the views of a sample that the model gets to see, at least one of those it has."""
        present = torch.tensor([bool(self._cells[view][sample]) for view in self.views])
        if epoch is None or not self._view_dropout:
            return present
        words = np.random.SeedSequence([self._seed, epoch, sample, _VIEW_DROPOUT]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))
        return drop_views(present[None], self._view_dropout, generator)[0]

    def _augmented(self, view: str, sample: int) -> Augmentation | None:
        return self._own[view][sample] if view in self._own else self._augmentation.get(view)

    def load(self, sample: int, epoch: int | None = None) -> Loaded | Failure:
        """Read, decode and bring to size the images of one sample; nothing that an image does raises.

        Args:
            sample: row of the manifest's table.
            epoch: draws augmentation and view dropout for this epoch; None: the plain images of all views.
        """
        shown = self.shown(sample, epoch)
        images: dict[str, list[Tensor]] = {}
        keys: list[bytes] = []
        for number, view in enumerate(self.views):
            if not shown[number]:
                continue
            for cell in self._cells[view][sample]:
                payload = read_payload(cell)
                if isinstance(payload, ReadFailure):
                    return Failure(sample, view, cell.value, payload.message, cell.index)
                image = self._image(view, number, sample, json.loads(cell.selector), payload.data, epoch)
                if isinstance(image, str):
                    return Failure(sample, view, cell.value, image, cell.index)
                images.setdefault(view, []).append(image)
                keys.append(payload.key)
        return Loaded(sample, images, tuple(keys))

    def _image(
        self, view: str, number: int, sample: int, selector: Mapping[str, Any], data: bytes, epoch: int | None
    ) -> Tensor | str:
        """One image at its size, augmented where an epoch is given; or why there is none."""
        setup, augmentation = self._setups[view], self._augmented(view, sample)
        decoded = read(setup.reader, data, selector)
        if isinstance(decoded, ReadFailure):
            return decoded.message
        try:
            if augmentation is None or epoch is None:
                return setup.preprocessing.apply(decoded)
            draw = augmentation.draw(self._seed, epoch, 0 if self._alike else sample)
            return augmentation.apply(decoded, setup.preprocessing, draw, number)
        except (ValueError, RuntimeError, MemoryError) as error:
            return f"can't be preprocessed: {error or 'out of memory'}"

    def collate(self, items: Sequence[Loaded | Failure]) -> Batch:
        """One batch of what could be read, in order."""
        loaded = [item for item in items if isinstance(item, Loaded)]
        images: dict[str, Tensor] = {}
        owner: dict[str, Tensor] = {}
        for view in self.views:
            pairs = [(i, image) for i, item in enumerate(loaded) for image in item.images.get(view, ())]
            if not pairs:
                continue
            images[view] = stack([image for _, image in pairs])
            owner[view] = torch.tensor([i for i, _ in pairs], dtype=torch.int64)
        present = torch.tensor([[bool(item.images.get(view)) for view in self.views] for item in loaded])
        return Batch(
            np.array([item.sample for item in loaded], dtype=np.int64),
            present.reshape(len(loaded), len(self.views)),
            images,
            owner,
            tuple(item for item in items if isinstance(item, Failure)),
        )

    def items(
        self, samples: Sequence[int] | NDArray[np.int64], *, epoch: int | None = None, workers: int = 1, ahead: int = 64
    ) -> Generator[Loaded | Failure, None, None]:
        """`load` of many samples, in order, by threads that are at most `ahead` samples in front."""
        waiting: deque[Future[Loaded | Failure]] = deque()
        # Threads, not processes: decoding and resizing release the GIL, nothing is copied, and nothing outlives a kill.
        with ThreadPoolExecutor(max(workers, 1), thread_name_prefix="images") as pool:
            try:
                for sample in samples:
                    waiting.append(pool.submit(self.load, int(sample), epoch))
                    if len(waiting) >= ahead:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def readable(
        self, samples: Sequence[int] | NDArray[np.int64], *, workers: int = 1, ahead: int = 64
    ) -> Generator[tuple[Loaded | Failure, list[Failure]], None, None]:
        """`items`, each with its images that can't be read; these count as missing where their sample has another."""
        for item in self.items(samples, workers=workers, ahead=ahead):
            failed: list[Failure] = []
            while isinstance(item, Failure):
                failed.append(item)
                if not self.leave_out(item):
                    break
                [item] = self.items([item.sample])
            yield item, failed

    def batches(
        self, plan: Sequence[NDArray[np.int64]], *, epoch: int | None = None, workers: int = 1
    ) -> Generator[Batch, None, None]:
        """The batches of a plan, in order; a batch may be smaller than planned, even empty, where samples failed."""
        flat = np.concatenate(plan) if len(plan) else np.empty(0, dtype=np.int64)
        largest = max((len(part) for part in plan), default=1)
        stream = self.items(flat, epoch=epoch, workers=workers, ahead=AHEAD * largest)
        try:
            for part in plan:
                yield self.collate([next(stream) for _ in part])
        finally:
            stream.close()


def plan_batches(samples: NDArray[np.int64], batch_size: int) -> list[NDArray[np.int64]]:
    """Cut samples into batches; one left over joins the batch before it (the head's BatchNorm can't learn from one)."""
    parts = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [np.concatenate(parts[-2:])]
    return parts


def shuffled(samples: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of one epoch, from (seed, epoch) alone."""
    return samples[np.random.default_rng([seed, epoch]).permutation(len(samples))]
