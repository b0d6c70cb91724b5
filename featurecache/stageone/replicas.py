"""Augmented replicas: random versions of every image whose features are cached like any others.

A replica's geometric draw follows from seed and replica alone, in relative coordinates: the views of a sample, and all
images of a data set, are cropped, mirrored and turned alike. Its photometric draw follows from seed, content and
replica. So a replica is the same in any order and any process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from featurecache.data.readers.base import Decoded
from featurecache.data.transforms import Augmentation, Draw, Preprocessing
from featurecache.store.recipe import Recipe

VERSION = 1  # of how replicas are drawn and made: raised whenever equal parameters would give other pixels
DEFAULT = ("crop", "flip")
PLAIN = bytes(32)  # stands for the content where there is none: in the canary


@dataclass(frozen=True)
class Replica:
    """One random version of every image; `of` says what is done to one of them.

    Attributes:
        preprocessing: of the plain images.
        augmentation: what is changed at random.
        seed: of the draws.
        number: from 0.
    """

    preprocessing: Preprocessing
    augmentation: Augmentation
    seed: int
    number: int

    def of(self, key: bytes) -> DrawnVersion:
        """What is done to the content of this key."""
        draw = self.augmentation.draw(self.seed, self.number, 0)
        return DrawnVersion(self.preprocessing, self.augmentation, draw, int.from_bytes(key, "big"))

    def of_canary(self) -> DrawnVersion:
        """What is done to the synthetic inputs: by the first of the replicas, since one recipe holds them all."""
        return replace(self, number=0).of(PLAIN)

    def recipe(self, plain: Recipe) -> Recipe:
        """The recipe of the features of all replicas, from that of the plain images."""
        drawn = {"version": VERSION, "seed": self.seed, **self.augmentation.parameters()}
        return Recipe({**plain.fields, "augmentation": drawn}, plain.taps)


@dataclass(frozen=True)
class DrawnVersion:
    """A replica of one image; stands where its `Preprocessing` would."""

    preprocessing: Preprocessing
    augmentation: Augmentation
    draw: Draw
    content: int

    @property
    def channels(self) -> int:
        """Of the images."""
        return self.preprocessing.channels

    def apply(self, image: Decoded) -> torch.Tensor:
        """As `Preprocessing.apply`, with the same errors."""
        self.preprocessing.check_channels(image)
        return self.augmentation.apply(image, self.preprocessing, self.draw, self.content)


def augmentation(names: Sequence[str]) -> Augmentation:
    """The augmentation of these names, in whatever order they are given; see `Augmentation.of`."""
    return Augmentation.of(sorted(set(names or DEFAULT)))


def replica_of(recipe: Recipe, preprocessing: Preprocessing, number: int) -> Replica | None:
    """A replica as a recipe of replicas describes it; None where it is a plain recipe."""
    found: Mapping[str, Any] | None = recipe.fields.get("augmentation")
    if found is None:
        return None
    made = {name: value for name, value in found.items() if name not in ("version", "seed")}
    return Replica(preprocessing, Augmentation.from_parameters(made), int(found["seed"]), number)
