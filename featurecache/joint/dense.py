"""Joint training towards masks: they are read as often as the images are, and cropped and mirrored as these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featurecache.config import JointConfig
from featurecache.data.dense import DENSE, IGNORE
from featurecache.data.manifest import Manifest
from featurecache.errors import InputError
from featurecache.features.masks import Map, MaskFiles, check_dense, mask_cells
from featurecache.joint.images import Batch, Failure, Loaded, SampleImages
from featurecache.joint.mixing import MIXINGS
from featurecache.joint.runner import Runner
from featurecache.stageone.viewsetup import ViewSetup


def check_options(config: JointConfig, views: Sequence[str]) -> None:
    """Refuse what a mask can't go along with.

    Raises:
        InputError: names it.
    """
    check_dense(config.target, views, config.multi, config.uncertain)
    problems = {
        "--pairs": config.pairs,
        "--train-from": bool(config.train_from),
        f"--fusion {config.fusion}": config.fusion != "concat",
        **{f"--augment {name}": any(name in names for names in config.augment.values()) for name in MIXINGS},
    }
    for option, given in problems.items():
        if given:
            raise InputError(f"{option}: not for masks ({config.target[0]}). Leave it out.")
    if config.task not in ("auto", DENSE):
        raise InputError(f"--task {config.task}: a decoder predicts masks; leave it out, or give --head fc")


def mask_files(config: JointConfig, manifest: Manifest, setups: Mapping[str, ViewSetup]) -> MaskFiles:
    """The masks of a manifest's samples, as the one view is seen."""
    [(view, setup)] = setups.items()
    ids = manifest.table["sample_id"].to_list()
    cells = mask_cells(manifest, config, config.target[0], view)
    return MaskFiles(config.target[0], ids, cells, setup.preprocessing, config.masks, config.uncertain)


class DenseImages(SampleImages):
    """The images of a manifest; where an epoch is given, each with its mask, augmented by the same geometric draw.

    Args:
        files: the masks.
        classes: pixel values as text.
        given: as `SampleImages` takes them.
        options: as `SampleImages` takes them.
    """

    def __init__(self, files: MaskFiles, classes: Sequence[str], *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._files, self._classes = files, tuple(classes)

    def load(self, sample: int, epoch: int | None = None) -> Loaded | Failure:
        """See `SampleImages`."""
        found = super().load(sample, epoch)
        augmentation = self._augmented(self.views[0], sample)
        if epoch is None or isinstance(found, Failure) or augmentation is None:
            return found
        draw = augmentation.draw(self._seed, epoch, sample)
        geometric = replace(augmentation, names=tuple(name for name in augmentation.names if name != "colour"))
        mask = self._files.load(sample, lambda decoded, way: geometric.apply(decoded, way, draw, 0))
        if isinstance(mask, str):
            return Failure(sample, self._files.column, str(self._files.ids[sample]), mask)
        size = self._files.size
        indices = mask.indices(self._classes) if isinstance(mask, Map) else np.full(size, IGNORE, np.uint8)
        return replace(found, mask=torch.from_numpy(indices))

    def collate(self, items: Sequence[Loaded | Failure]) -> Batch:
        """See `SampleImages`."""
        masks = [item.mask for item in items if isinstance(item, Loaded) and item.mask is not None]
        return replace(super().collate(items), masks=torch.stack(masks) if masks else None)


def said_masks(
    runner: Runner,
    images: SampleImages,
    rows: NDArray[np.int64],
    failed: list[Failure],
    **options: Any,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    """Positions in `rows` and the most probable class of every pixel (k, height, width), batch by batch.

    Args:
        runner: of the model.
        images: to read.
        rows: samples.
        failed: what can't be read is added to it.
        options: of `Runner.stream`.
    """
    place = {int(row): number for number, row in enumerate(rows)}
    for samples, outputs in runner.stream(images, rows, failed, **options):
        yield np.array([place[int(row)] for row in samples]), most_probable(outputs)


def most_probable(outputs: Tensor) -> NDArray[np.uint8]:
    """(n, height, width) class indices of logits (n, classes, height, width)."""
    return outputs.argmax(dim=1).to(torch.uint8).cpu().numpy()
