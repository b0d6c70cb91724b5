"""Siamese training on the images of one view: each with one of its class and one of another, drawn anew every epoch."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from featurecache.config import ANY_VIEW, for_view
from featurecache.data.manifest import Manifest
from featurecache.data.targets import Target
from featurecache.data.transforms import Augmentation
from featurecache.errors import InputError
from featurecache.features.features import Block
from featurecache.features.pairs import Partners
from featurecache.joint.images import Failure, Loaded, SampleImages
from featurecache.joint.samples import Samples, choose_samples
from featurecache.joint.settings import augmentations, mixing
from featurecache.joint.start import Start, make_blocks
from featurecache.progress import Reporter
from featurecache.reporting.thumbnails import Picture, Pictures
from featurecache.store.recipe import Recipe

VIEWS = ("first", "second")
TARGET, CLASSES = "same", ("different", "same")
FIXED = 0  # stands for the epoch where the pairs are always the same: epochs count from 1
PAIRS = 2  # for each sample, the first with one of its own class, the second with one of another


def paired(start: Start) -> Start:
    """The same training on pairs: two views through one body, and whether both are of one class as target.

    Pair 2 i is sample i with a partner of its class, pair 2 i + 1 with one of another.

    Raises:
        InputError: several views, a target without classes, or an option that has no meaning for pairs.
    """
    config = start.config
    if len(start.setups) != 1:
        raise InputError(
            f"--pairs draws pairs of the images of one view, found {', '.join(start.setups)}. A manifest that lists "
            "pairs needs no --pairs: give two --view, --share-bodies all and --fusion difference-product."
        )
    if start.head is not None or start.uppers:
        raise InputError("--pairs starts from the bodies and reads images: leave out --init and --train-from")
    if start.target.task not in ("binary", "multiclass"):
        raise InputError(f"--pairs needs a target with classes, {', '.join(config.target)} is {start.target.task}")
    (setup,) = start.setups.values()
    setups = {view: replace(setup, view=view) for view in VIEWS}
    blocks: tuple[Block, ...] = make_blocks(setups)
    values = np.tile(np.array([1, 0], dtype=np.int64), len(start.target.values))
    values[~np.repeat(start.target.known, PAIRS)] = -1
    column = for_view(config.augment_column, setup.view, "")
    fusion = "difference-product" if config.fusion == "concat" else config.fusion
    reading = {**config.reader_settings.get(ANY_VIEW, {}), **config.reader_settings.get(setup.view, {})}
    augmentations(config, (setup.view,))  # refuses other views
    mixed = tuple(name for name in mixing(config) if name not in for_view(config.augment, setup.view, ()))
    as_pairs = config.model_copy(
        update={
            "views": {view: view for view in VIEWS}, "layout": "wide", "box": {}, "frame": {}, "flip_if": {},
            "reader": {ANY_VIEW: setup.reader.name}, "reader_settings": {ANY_VIEW: reading} if reading else {},
            "target": (TARGET,), "task": "binary", "uncertain": {}, "fusion": fusion,
            "share_bodies": "all", "view_dropout": 0.0,
            "augment": {ANY_VIEW: (*for_view(config.augment, setup.view, ()), *mixed)},
            "augment_column": {ANY_VIEW: column} if column else {},
        }
    )  # fmt: skip
    target = Target("binary", (TARGET,), CLASSES, values)
    return replace(start, config=as_pairs, setups=setups, blocks=blocks, target=target, single=start)


class PairPictures(Pictures):
    """The images of pairs, by the id of the pair.

    Attributes:
        pairs: the two samples of each.
    """

    pairs: Mapping[str, tuple[str, str]]

    def of(self, sample_id: str, size: int) -> list[Picture]:
        """The pictures of both."""
        both = zip(VIEWS, self.pairs[sample_id], strict=True)
        return [replace(picture, view=view) for view, one in both for picture in Pictures.of(self, one, size)]


class PairImages(SampleImages):
    """Pairs of images by number; see `paired`.

    Where an epoch is given, partners are drawn for it; otherwise they are always the same. They come from the
    same side of the split.

    Args:
        start: from `paired`.
        augmentation: by view of the manifest, drawn for each image by itself.
        own: by view that of each sample, in the place of the view's.

    Attributes:
        apart: the samples that pairs are made of, in the process that has chosen them.
    """

    apart: Samples

    def __init__(
        self,
        start: Start,
        augmentation: Mapping[str, Augmentation],
        own: Mapping[str, Sequence[Augmentation | None]] = MappingProxyType({}),
    ) -> None:
        assert start.single is not None  # `paired` has made it
        single = start.single
        self.views = VIEWS
        self.singles = SampleImages(
            single.manifest, single.setups, seed=start.config.seed, augmentation=augmentation, own=own
        )
        (self._view,) = single.setups
        self._names: list[str] = single.manifest.table["sample_id"].to_list()
        self._classes: NDArray[np.int64] = single.target.values
        self._seed = start.config.seed
        self._pairs: dict[str, tuple[str, str]] = {}
        self._sides: list[tuple[NDArray[np.int64], Partners]] = []
        self._drawn: tuple[int, NDArray[np.int64]] | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return PAIRS * len(self.singles)

    @property
    def present(self) -> NDArray[np.bool_]:
        """(n_pairs, 2) bool: whether the sample has an image; its partner has."""
        found: NDArray[np.bool_] = np.repeat(np.repeat(self.singles.present, PAIRS, axis=0), 2, axis=1)
        return found

    def choose(self, start: Start, *, workers: int, reporter: Reporter) -> Samples:
        """The pairs that take part: every image is read once and split, then paired within its side of the split."""
        assert start.single is not None
        samples = choose_samples(start.single, self.singles, workers=workers, reporter=reporter)
        rows: list[NDArray[np.int64]] = []
        for side in ("train", "valid", "test"):
            here = samples.of(side)
            partners = Partners(self._classes[here])
            rows += [PAIRS * here[partners.has_same], PAIRS * here[partners.has_other] + 1]
        chosen = np.sort(np.concatenate(rows))
        if not len(chosen):
            raise InputError("--pairs: no side of the split has two samples of one class, or of two")
        place = {int(row): position for position, row in enumerate(samples.rows)}
        of = np.array([place[int(row) // PAIRS] for row in chosen])
        failed = tuple(replace(failure, sample=PAIRS * failure.sample) for failure in samples.failed)
        both = np.ones((len(of), 2), dtype=np.bool_)
        content = tuple(samples.content[place] for place in of)
        self.apart = samples
        return Samples(chosen, samples.splits[of], samples.groups[of], both, content, failed)

    def leave_out(self, failure: Failure) -> bool:
        """False: a sample has one image, and the pairs are made without it."""
        return False

    def pair(self, samples: Samples) -> list[str]:
        """Learn from the chosen pairs which samples may be partners; returns an id for each of all pairs."""
        self._sides = []
        for side in ("train", "valid", "test"):
            here = np.unique(samples.of(side) // PAIRS)
            if len(here):
                self._sides.append((here, Partners(self._classes[here])))
        names = self._names
        found = [(name, names[int(i)]) for name, two in zip(names, self.partners(None), strict=True) for i in two]
        ids = ["+".join(pair) for pair in found]
        self._pairs = dict(zip(ids, found, strict=True))
        return ids

    def pictures(self, manifest: Manifest, recipes: Mapping[str, Recipe]) -> PairPictures:
        """The images of the pairs, where validation has drawn them."""
        found = PairPictures.of_manifest(manifest, recipes)
        found.pairs = self._pairs
        return found

    def partners(self, epoch: int | None) -> NDArray[np.int64]:
        """(n_samples, 2) int64: the partner of its own class, and of another; its own number where it has none."""
        number = FIXED if epoch is None else epoch
        with self._lock:
            if self._drawn is None or self._drawn[0] != number:
                self._drawn = (number, self._draw(number))
            return self._drawn[1]

    def _draw(self, number: int) -> NDArray[np.int64]:
        drawn = np.tile(np.arange(len(self.singles))[:, None], PAIRS)
        for side, (here, partners) in enumerate(self._sides):
            for kind, found in enumerate(partners.draw(np.random.default_rng([self._seed, number, side]))):
                drawn[here, kind] = here[found]
        return drawn

    def load(self, sample: int, epoch: int | None = None) -> Loaded | Failure:
        """Both images of a pair, as `SampleImages.load` gives those of a sample."""
        images: dict[str, list[Tensor]] = {}
        keys: tuple[bytes, ...] = ()
        first, kind = divmod(sample, PAIRS)
        pair = (first, int(self.partners(epoch)[first, kind]))
        for view, one in zip(VIEWS, pair, strict=True):
            loaded = self.singles.load(one, epoch)
            if isinstance(loaded, Failure):
                return replace(loaded, sample=sample, view=view)
            images[view] = list(loaded.images[self._view])
            keys += loaded.keys
        return Loaded(sample, images, keys)
