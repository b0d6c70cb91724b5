"""Where the batches of joint training come from: images, or what the lower part of the bodies made of them."""

from __future__ import annotations

from typing import Any

from featurecache.joint.dense import DenseImages
from featurecache.joint.images import SampleImages
from featurecache.joint.own import own_augmentations
from featurecache.joint.pairing import PairImages
from featurecache.joint.parallel import Processes
from featurecache.joint.prefix import AsStored, StoredMaps, cache_lower_part, compare_speed
from featurecache.joint.runner import Normalises
from featurecache.joint.samples import Samples, choose_samples
from featurecache.joint.settings import augmentations
from featurecache.joint.start import Start
from featurecache.progress import Reporter


def open_images(start: Start, processes: Processes, reporter: Reporter) -> SampleImages:
    """What training reads; where activations are cached, the first process has seen to it that they are there."""
    config = start.config
    views = tuple((start.single or start).setups)
    usual = augmentations(config, views)
    own = own_augmentations(config, start.manifest, usual, views)
    if start.single is not None:
        return PairImages(start, usual, own)
    if not start.uppers:
        options: dict[str, Any] = {
            "seed": config.seed, "augmentation": usual, "own": own, "view_dropout": config.view_dropout or 0.0
        }  # fmt: skip
        if start.masks is not None:
            return DenseImages(start.masks, start.target.classes, start.manifest, start.setups, **options)
        return SampleImages(start.manifest, start.setups, **options)
    if processes.rank == 0:
        cache_lower_part(start, reporter)
    processes.wait()
    maps = StoredMaps(start)
    if processes.rank == 0:
        compare_speed(start, maps, reporter)
        for view, upper in start.uppers.items():
            count = sum(parameter.numel() for parameter in upper.parameters())
            reporter.note(f"{view}: {count:,} parameters learn above {upper.cut.tap}; those below stay as they are")
    return maps


def normalisers(start: Start) -> dict[str, Normalises]:
    """Per view, what is done to a batch on the device before the body takes it."""
    return {view: AsStored() if start.uppers else setup.preprocessing for view, setup in start.setups.items()}


def choose(start: Start, images: SampleImages, *, workers: int, reporter: Reporter) -> Samples:
    """The samples, or pairs, that take part."""
    if isinstance(images, PairImages):
        return images.choose(start, workers=workers, reporter=reporter)
    return choose_samples(start, images, workers=workers, reporter=reporter)


def sample_ids(start: Start, images: SampleImages, samples: Samples) -> list[str]:
    """An id for every sample of the manifest, or for every pair."""
    if isinstance(images, PairImages):
        return images.pair(samples)
    ids: list[str] = start.manifest.table["sample_id"].to_list()
    return ids
